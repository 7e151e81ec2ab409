"""Causal language modelling: the text as one sequence, cut into windows.

Decides that window i holds the tokens from i × length on, documents ended by the eos token and
packed without padding, and that labels are the same tokens one further. Where the tokens come from:
a folder of shards, plain text (tokenized once into the cache), HDF5 files, or the embedded text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.sources import token_source
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import DataError

__all__ = ["KEYS", "CausalWindows", "build"]

KEYS: dict[str, Any] = {
    **COMMON_KEYS,
    "max_sequence_length": 128,
    "vocab_file": None,
    "vocab_size": None,
    "tokenizer": "bpe",
    "do_lower": False,
}
_VOCAB_SIZE = 1024


class CausalWindows(KeyedDataset):
    """input_ids, attention_mask, labels: [max_sequence_length]."""

    def __init__(
        self,
        shards: TokenShards,
        tokenizer: Tokenizer,
        *,
        max_sequence_length: int,
        source: str,
        with_ids: bool = False,
    ) -> None:
        self._shards, self._length = shards, max_sequence_length
        num_items = max(0, shards.num_tokens - 1) // max_sequence_length
        if num_items == 0:
            raise DataError(
                f"{shards.num_tokens} tokens are not one sequence of {max_sequence_length}",
                where=str(shards.folder),
                allowed="at least max_sequence_length + 1 tokens",
            )
        info = DataInfo(
            source=source,
            vocab_size=shards.vocab_size,
            max_sequence_length=max_sequence_length,
            bytes_per_token=shards.num_bytes / max(1, shards.num_tokens),
            pad_id=max(0, tokenizer.ids.pad),
            tokenizer=tokenizer,
        )
        super().__init__(info, num_items, with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        length = self._length
        tokens = np.empty((len(indices), length + 1), dtype=np.int64)
        for row, index in zip(tokens, indices, strict=True):
            self._shards.read_into(row, int(index) * length)
        return {
            "input_ids": tokens[:, :-1],
            "attention_mask": np.ones((len(indices), length), dtype=np.int64),
            "labels": tokens[:, 1:],
        }


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    length = params.integer("max_sequence_length", minimum=1)
    with_ids = params.split == "predict"
    paths = params.paths("data_dir")
    if _holds_hdf5(paths) or (
        str(params.get("data_processor")) == "GptHDF5DataProcessor" and paths
    ):
        from openwafer.data.hdf5_files import Hdf5Examples

        return Hdf5Examples(
            paths,
            max_sequence_length=length,
            vocab_size=params.optional_integer("vocab_size", minimum=1),
            with_ids=with_ids,
        )
    shards, tokenizer, source = token_source(params, paths, vocab_size=_VOCAB_SIZE)
    return CausalWindows(
        shards, tokenizer, max_sequence_length=length, source=source, with_ids=with_ids
    )


def _holds_hdf5(paths: list[Path]) -> bool:
    endings = (".h5", ".hdf5")
    return any(
        path.suffix in endings or (path.is_dir() and any(path.glob(f"*{end}")))
        for path in paths
        for end in endings
    )
