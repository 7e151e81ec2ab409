"""Data for the reference models: from files, or from what every machine has, to batches.

Decides datasets, tokenizers, masking and packing, and the DataLoader over them. Does not decide
which task loads which batch (streaming/), nor what a model does with one (zoo/). The names below
are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openwafer.lazy import lazy_names

if TYPE_CHECKING:
    from openwafer.data.dataloader import make_dataloader
    from openwafer.data.dataset import Batch, DataInfo, KeyedDataset
    from openwafer.data.params import Split
    from openwafer.data.rate import InputRate, measure_rate
    from openwafer.data.registry import TASKS, build_dataset, input_dataloader, input_keys
    from openwafer.data.tokenized_text import PrepareResult
    from openwafer.data.tokenizer_files import load_tokenizer
    from openwafer.data.tokenizers import ByteTokenizer, Tokenizer

__all__ = [
    "TASKS",
    "Batch",
    "ByteTokenizer",
    "DataInfo",
    "InputRate",
    "KeyedDataset",
    "PrepareResult",
    "Split",
    "Tokenizer",
    "build_dataset",
    "input_dataloader",
    "input_keys",
    "load_tokenizer",
    "make_dataloader",
    "measure_rate",
]

_HOMES = {
    "TASKS": ".registry",
    "Batch": ".dataset",
    "ByteTokenizer": ".tokenizers",
    "DataInfo": ".dataset",
    "InputRate": ".rate",
    "KeyedDataset": ".dataset",
    "PrepareResult": ".tokenized_text",
    "Split": ".params",
    "Tokenizer": ".tokenizers",
    "build_dataset": ".registry",
    "input_dataloader": ".registry",
    "input_keys": ".registry",
    "load_tokenizer": ".tokenizer_files",
    "make_dataloader": ".dataloader",
    "measure_rate": ".rate",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
