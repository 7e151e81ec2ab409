"""Which module makes the dataset of a task, and the documented names of data processors.

Decides the table, and that equal parameters give the same object in one process, so that a model,
its metrics and its loader can ask independently. Does not decide anything about the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from torch.utils.data import DataLoader

from openwafer.data.dataloader import make_dataloader
from openwafer.data.dataset import Batch, KeyedDataset
from openwafer.data.params import InputParams, Split
from openwafer.errors import ConfigError, nearest

__all__ = ["PROCESSORS", "TASKS", "build_dataset", "input_dataloader", "input_keys"]

TASKS: dict[str, str] = {
    "causal_lm": "causal",
    "masked_lm": "masked",
    "span_corruption": "spans",
    "translation": "pairs",
    "classification": "tsv",
    "token_classification": "conll",
    "question_answering": "squad",
    "summarization": "summaries",
    "segmentation": "images",
    "digits": "digits",
}
"""Task and the module of this room that builds its dataset."""

PROCESSORS: dict[str, str] = {
    "GptHDF5DataProcessor": "causal_lm",
    "GptTextDataProcessor": "causal_lm",
    "GptTfRecordsProcessor": "causal_lm",
    "BertCSVDataProcessor": "masked_lm",
    "BertCSVDynamicMaskDataProcessor": "masked_lm",
    "BertTfRecordsProcessor": "masked_lm",
    "BertMlmOnlyTfRecordsDynamicMaskProcessor": "masked_lm",
    "BertMlmOnlyTfRecordsStaticMaskProcessor": "masked_lm",
    "T5DynamicDataProcessor": "span_corruption",
    "TransformerDynamicDataProcessor": "translation",
    "SST2DataProcessor": "classification",
    "MNLIDataProcessor": "classification",
    "Sst2DataProcessor": "classification",
    "MnliDataProcessor": "classification",
    "BertTokenClassifierDataProcessor": "token_classification",
    "NerDataProcessor": "token_classification",
    "BertQADataProcessor": "question_answering",
    "QuestionAnsweringDataProcessor": "question_answering",
    "BertSumCSVDataProcessor": "summarization",
    "BertSumTfRecordsProcessor": "summarization",
    "UNetTfRecordsProcessor": "segmentation",
}
"""Documented `data_processor` names of release 1.6 and the task each belongs to."""


class _TaskModule(Protocol):
    KEYS: dict[str, Any]

    def build(self, params: InputParams) -> KeyedDataset: ...


_built: dict[str, KeyedDataset] = {}


def _module(task: str) -> _TaskModule:
    if task not in TASKS:
        raise ConfigError(
            f"there are no data for the task `{task}`",
            allowed=", ".join(TASKS),
            hint=nearest(task, TASKS),
        )
    return cast(_TaskModule, import_module(f"openwafer.data.{TASKS[task]}"))


def input_keys(task: str) -> dict[str, Any]:
    """The keys that the task's `*_input` may have, with their defaults (None: by the split)."""
    return dict(_module(task).KEYS)


def build_dataset(task: str, input_params: Mapping[str, Any], split: Split) -> KeyedDataset:
    """The task's dataset for one section; the same object for the same parameters.

    Raises:
        ConfigError: an unknown task, key or data processor, or a wrong value.
        DataError: the data are missing or broken, with their place.
    """
    module = _module(task)
    params = InputParams(input_params, module.KEYS, split)
    _check_processor(params, task)
    key = json.dumps([task, split, _content(input_params)], sort_keys=True, default=str)
    if key not in _built:
        # One training and one evaluation set, and their like: no more are kept.
        while len(_built) >= 4:
            del _built[next(iter(_built))]
        _built[key] = _build(task, module, params)
    return _built[key]


def _build(task: str, module: _TaskModule, params: InputParams) -> KeyedDataset:
    """Of TFRecords where the section has such files, or as the task's module reads its data."""
    # It knows the modules of several tasks, which are loaded when they are needed.
    from openwafer.data.tfrecords import record_dataset

    return record_dataset(task, params) or module.build(params)


def _content(input_params: Mapping[str, Any]) -> dict[str, Any]:
    """What the dataset itself depends on."""
    sizes = ("batch_size", "train_batch_size", "eval_batch_size")
    of_the_loader = (*sizes, "shuffle", "shuffle_seed", "num_workers", "prefetch_factor")
    left_out = (*of_the_loader, "persistent_workers", "drop_last", "pad_last_batch")
    return {key: value for key, value in input_params.items() if key not in left_out}


def _check_processor(params: InputParams, task: str) -> None:
    name = params.get("data_processor")
    if name is None or PROCESSORS.get(name) == task:
        return
    allowed = [known for known, of in PROCESSORS.items() if of == task]
    raise ConfigError(
        f"data_processor {name} is not one for {task}",
        where=params.where("data_processor"),
        allowed=", ".join(allowed) or "none: leave the key out",
        hint=nearest(str(name), PROCESSORS),
    )


def input_dataloader(task: str, input_params: Mapping[str, Any], split: Split) -> DataLoader[Batch]:
    """What a `*_input_dataloader(params)` function returns for its section."""
    return make_dataloader(build_dataset(task, input_params, split), input_params, split)
