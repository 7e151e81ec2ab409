"""A dataset of this room as TFRecord files in a documented layout.

Decides the files' names and sizes, and what is written beside the records so that they can be read
with nothing but their folder. Masks are drawn here for layouts whose records are masked already.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.dataset import KeyedDataset
from openwafer.data.masked_dataset import MaskedDataset
from openwafer.data.subwords import vocabulary_words
from openwafer.data.tfrecord_files import writing_records
from openwafer.data.tfrecord_layouts import LAYOUTS, TOKENS, features_of
from openwafer.data.tfrecord_messages import encode_record
from openwafer.data.tfrecords import LABELS_FILE, META_FILE, meta_of
from openwafer.data.token_shards import TokenShards
from openwafer.errors import ConfigError, nearest

__all__ = ["layout_names", "write_records"]

_RECORDS_PER_FILE = 10_000
_ITEMS_AT_A_TIME = 256

Item = dict[str, npt.NDArray[Any]]


def layout_names(task: str) -> list[str]:
    """The data processors that read records of a task."""
    return [name for name, layout in LAYOUTS.items() if layout.task == task]


def write_records(
    dataset: KeyedDataset,
    processor: str,
    folder: Path,
    *,
    seed: int = 1,
    records_per_file: int = _RECORDS_PER_FILE,
) -> list[Path]:
    """`examples-00000.tfrecord` and so on in `folder`, in the place of older ones.

    Args:
        dataset: of the layout's task; masked ones with labels gathered.
        processor: the name of the layout.
        seed: of the masks.

    Raises:
        ConfigError: there is no such layout, or the vocabulary has no words to write.
    """
    if processor not in LAYOUTS:
        raise ConfigError(
            f"no TFRecords are of {processor}",
            allowed=", ".join(LAYOUTS),
            hint=nearest(processor, LAYOUTS),
        )
    encode = _encoder(dataset, processor)
    folder.mkdir(parents=True, exist_ok=True)
    # All of them or none: a reader takes whatever files there are.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".records-") as temporary:
        beside = _write_beside(dataset, Path(temporary), with_meta=not TokenShards.is_one(folder))
        written: list[Path] = []
        for number, first in enumerate(range(0, len(dataset), records_per_file)):
            written.append(Path(temporary, f"examples-{number:05d}.tfrecord"))
            last = min(first + records_per_file, len(dataset))
            with writing_records(written[-1]) as writer:
                for indices in _chunks(first, last):
                    for record in encode(indices, seed):
                        writer.write(record)
        for old in folder.glob("examples-*.tfrecord"):
            old.unlink()
        for path in (*beside, *written):
            os.replace(path, folder / path.name)
    return [folder / path.name for path in written]


def _chunks(first: int, last: int) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(first, last, _ITEMS_AT_A_TIME):
        yield np.arange(start, min(start + _ITEMS_AT_A_TIME, last), dtype=np.int64)


def _encoder(
    dataset: KeyedDataset, processor: str
) -> Callable[[npt.NDArray[np.int64], int], Iterator[bytes]]:
    layout = LAYOUTS[processor]
    if not layout.fields:
        assert isinstance(dataset, MaskedDataset), "only these are known before they are masked"
        assert dataset.info.tokenizer is not None
        words = [word.encode() for word in vocabulary_words(dataset.info.tokenizer)]

        def unmasked(indices: npt.NDArray[np.int64], seed: int) -> Iterator[bytes]:
            found = dataset.sequences(indices, seed)
            for ids, length in zip(found.ids, found.lengths.tolist(), strict=True):
                yield encode_record({}, {TOKENS: [words[number] for number in ids[:length]]})

        return unmasked

    def whole(indices: npt.NDArray[np.int64], seed: int) -> Iterator[bytes]:
        rows = dataset.rows(indices, seed)
        for row in range(len(indices)):
            item: Item = {name: values[row] for name, values in rows.items()}
            if layout.task == "segmentation":
                item["images"] = np.moveaxis(item["images"], 0, -1)
            yield encode_record(features_of(layout, item))

    return whole


def _write_beside(dataset: KeyedDataset, folder: Path, *, with_meta: bool) -> list[Path]:
    """Tokenizer, vocabulary and labels, where the data have them. Shards of tokens in the folder
    have their own meta file, which says the same."""
    info = dataset.info
    if with_meta:
        (folder / META_FILE).write_text(json.dumps(meta_of(info)), encoding="utf-8")
    if info.tokenizer is not None:
        info.tokenizer.save(folder)
        if info.tokenizer.kind in ("words", "wordpiece"):
            words = "".join(f"{word}\n" for word in vocabulary_words(info.tokenizer))
            (folder / "vocab.txt").write_text(words, encoding="utf-8")
    if info.label_names:
        numbers = {name: number for number, name in enumerate(info.label_names)}
        (folder / LABELS_FILE).write_text(json.dumps(numbers), encoding="utf-8")
    return sorted(folder.iterdir())
