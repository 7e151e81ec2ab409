"""Classification of texts and pairs of texts: SST-2, MNLI, and the embedded tasks.

Decides which files a split is, which columns are text and label, and the order of labels. Source of
the layouts: the GLUE benchmark's files (Wang et al., 2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.chunks import ordered_chunks, package_chunks
from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.params import InputParams
from openwafer.data.sequences import ENCODER_KEYS, EncoderRows, joined, task_tokenizer
from openwafer.data.split_files import Examples, SplitFiles, read_examples
from openwafer.errors import DataError, nearest

__all__ = ["KEYS", "Classification", "Example", "build", "read_tsv"]

KEYS: dict[str, Any] = {**ENCODER_KEYS}

_FILES = SplitFiles(
    stems={
        "train": ("train",),
        "eval": ("dev_matched", "dev_mismatched", "dev"),
        "predict": ("test_matched", "test_mismatched", "test"),
    },
    endings=(".tsv",),
)
_TEXT_COLUMNS = (("sentence1", "sentence2"), ("sentence",), ("premise", "hypothesis"), ("text",))
_LABEL_COLUMNS = ("gold_label", "label")
_MNLI_LABELS = ("contradiction", "entailment", "neutral")


@dataclass(frozen=True, slots=True)
class Example:
    """label: its name, "" where there is none (a test file). matched: which of MNLI's two
    evaluation sets."""

    first: str
    second: str | None
    label: str
    matched: bool | None = None


class Classification(KeyedDataset):
    """input_ids, attention_mask, token_type_ids [seq]; labels []; for MNLI's evaluation also
    is_matched and is_mismatched []."""

    def __init__(
        self,
        rows: EncoderRows,
        labels: npt.NDArray[np.int64],
        matched: npt.NDArray[np.int64] | None,
        info: DataInfo,
        *,
        with_ids: bool,
    ) -> None:
        self._rows, self._labels, self._matched = rows, labels, matched
        super().__init__(info, len(rows), with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        rows: dict[str, npt.NDArray[Any]] = {
            **self._rows.rows(indices),
            "labels": self._labels[indices],
        }
        if self._matched is not None:
            rows["is_matched"] = self._matched[indices]
            rows["is_mismatched"] = 1 - self._matched[indices]
        return rows


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    read = _read(params)
    examples = read.examples
    names = _label_names(read.training)
    tokenizer = task_tokenizer(
        params,
        lambda: (text for e in read.training for text in (e.first, e.second) if text),
        read.key,
    )
    length = params.integer("max_sequence_length", minimum=8)
    firsts = tokenizer.encode_many([example.first for example in examples])
    seconds = tokenizer.encode_many([example.second or "" for example in examples])
    sequences = (
        joined(tokenizer, length, first, None if example.second is None else second)
        for example, first, second in zip(examples, firsts, seconds, strict=True)
    )
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([_label(example, number) for example in examples], dtype=np.int64)
    info = DataInfo(
        source=f"{len(examples):,} texts of {read.origin}",
        vocab_size=tokenizer.vocab_size,
        max_sequence_length=length,
        num_classes=len(names),
        label_names=tuple(names),
        majority_share=float(np.bincount(labels).max() / len(labels)),
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
    )
    matched = _matched(examples) if params.split != "train" else None
    with_ids = params.split == "predict"
    return Classification(EncoderRows(sequences, length), labels, matched, info, with_ids=with_ids)


def _read(params: InputParams) -> Examples[Example]:
    paths = params.paths("data_dir")
    if paths:
        return read_examples(paths, params.split, _FILES, read_tsv)
    name = params.get("embedded") or "stdlib"
    makers = {"stdlib": package_examples, "order": order_examples}
    if name not in makers:
        raise params.wrong("embedded", ", ".join(makers))
    training = makers[name]("train")
    return Examples(
        examples=training if params.split == "train" else makers[name](params.split),
        training=training,
        origin=f"the Python standard library ({name})",
        key=(name, hash_of(training)),
    )


def _matched(examples: Sequence[Example]) -> npt.NDArray[np.int64] | None:
    """1 for MNLI's matched set, 0 for its other one; None for data without such sets."""
    if all(example.matched is None for example in examples):
        return None
    return np.array([example.matched is not False for example in examples], dtype=np.int64)


def hash_of(examples: Sequence[Example]) -> int:
    """A number that changes with the texts."""
    from openwafer.data.keyed_random import derive_seed

    return derive_seed(*(example.first for example in examples))


def package_examples(split: str) -> list[Example]:
    """Pieces of the standard library, to be told apart by their package."""
    return [Example(text, None, package) for text, package in package_chunks(split)]


def order_examples(split: str) -> list[Example]:
    """Two pieces: does the second follow the first, precede it, or come from elsewhere?"""
    return [Example(first, second, label) for first, second, label in ordered_chunks(split)]


def _label(example: Example, number: dict[str, int]) -> int:
    if not example.label:
        return 0
    if example.label not in number:
        raise DataError(
            f"the label {example.label!r} does not occur in training",
            allowed=", ".join(number),
            hint=nearest(example.label, number),
        )
    return number[example.label]


def _label_names(examples: Sequence[Example]) -> list[str]:
    """MNLI's in their customary order, others sorted (numbers by value)."""
    found = Counter(example.label for example in examples if example.label)
    if set(found) <= set(_MNLI_LABELS):
        return list(_MNLI_LABELS)
    return sorted(found, key=lambda name: (int(name) if name.isdigit() else 0, name))


def read_tsv(path: Path) -> list[Example]:
    """The examples of one file with a header line. Quotation marks are text.

    Raises:
        DataError: no known columns, or a line with too few; with file and line.
    """
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    header = lines[0].rstrip("\r").split("\t")
    texts = next((columns for columns in _TEXT_COLUMNS if set(columns) <= set(header)), None)
    if texts is None:
        raise DataError(
            f"no column of text in {header}",
            where=f"{path}:1",
            allowed=" or ".join(" and ".join(columns) for columns in _TEXT_COLUMNS),
        )
    label_column = next((column for column in _LABEL_COLUMNS if column in header), None)
    places = [header.index(column) for column in texts]
    label_place = header.index(label_column) if label_column else -1
    matched = None if "matched" not in path.stem else "mismatched" not in path.stem
    examples: list[Example] = []
    for number, line in enumerate(lines[1:], start=2):
        values = line.rstrip("\r").split("\t")
        if len(values) <= max(*places, label_place):
            raise DataError(
                f"the line has {len(values)} columns",
                where=f"{path}:{number}",
                allowed=f"{len(header)}: {', '.join(header)}",
            )
        label = values[label_place].strip() if label_column else ""
        if label == "-":  # MNLI: the annotators did not agree
            continue
        second = values[places[1]] if len(places) > 1 else None
        examples.append(Example(values[places[0]], second, label, matched))
    return examples
