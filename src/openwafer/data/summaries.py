"""Extractive summarization: which sentences of a text are its summary.

Decides the sequence (cls and sep around each sentence, segments in turn), which sentences fit, and
which are taken as right where only a written summary is known. Source: Liu, "Fine-tune BERT for
Extractive Summarization" (2019). Files: `.jsonl` with "sentences" and "labels" or "summary", and
the documented CSV layout (input_token_ids, labels, segment_ids, cls_indices).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.csv_files import CsvRows, holds_csv, integers_of
from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.generated import summaries
from openwafer.data.params import InputParams
from openwafer.data.ragged import Ragged, pad
from openwafer.data.sequences import ENCODER_KEYS, task_tokenizer
from openwafer.data.split_files import Examples, SplitFiles, read_examples
from openwafer.data.tokenizers import Ids, Tokenizer
from openwafer.errors import DataError

__all__ = ["KEYS", "Summarization", "build", "choose_sentences", "read_jsonl"]

KEYS: dict[str, Any] = {**ENCODER_KEYS, "max_cls_tokens": 16}

_EMBEDDED = {"train": 4000, "eval": 400, "predict": 400}
_FILES = SplitFiles(
    stems={
        "train": ("train*",),
        "eval": ("dev*", "eval*", "valid*"),
        "predict": ("predict*", "test*"),
    },
    endings=(".jsonl",),
)
_CSV_COLUMNS = ("input_token_ids", "labels", "segment_ids", "cls_indices")
_MAX_CHOSEN = 3

Document = tuple[list[str], list[int]]


class Summarization(KeyedDataset):
    """input_ids, attention_mask, token_type_ids [seq]; labels, cls_indices, cls_weights
    [max_cls_tokens]."""

    def __init__(
        self,
        rows: Sequence[tuple[Ids, Ids, Ids]],
        labels: Sequence[Sequence[int]],
        info: DataInfo,
        *,
        max_cls_tokens: int,
        with_ids: bool,
    ) -> None:
        self._ids = Ragged(ids for ids, _, _ in rows)
        self._segments = Ragged(segments for _, segments, _ in rows)
        self._indices = Ragged(indices for _, _, indices in rows)
        self._labels = Ragged(labels)
        self._max_cls_tokens = max_cls_tokens
        super().__init__(info, len(rows), with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        length = self.info.max_sequence_length
        ids, mask = self._ids.padded(indices, length)
        places, counted = self._indices.padded(indices, self._max_cls_tokens)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": self._segments.padded(indices, length)[0],
            "labels": self._labels.padded(indices, self._max_cls_tokens)[0],
            "cls_indices": places,
            "cls_weights": counted.astype(np.float32),
        }


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    paths = params.paths("data_dir")
    length = params.integer("max_sequence_length", minimum=8)
    max_cls = params.integer("max_cls_tokens", minimum=1)
    if holds_csv(paths):
        return DocumentedCsv(CsvRows(paths, _CSV_COLUMNS), length, max_cls)
    if paths:
        read = read_examples(paths, params.split, _FILES, read_jsonl)
    else:
        if params.get("embedded") not in (None, "subjects"):
            raise params.wrong("embedded", "subjects")
        read = Examples(
            examples=summaries(params.split, _EMBEDDED[params.split]),
            training=summaries("train", _EMBEDDED["train"]),
            origin="generated texts",
            key=("subjects", 2),
        )
    documents = read.examples
    tokenizer = task_tokenizer(
        params, lambda: (" ".join(text) for text, _ in read.training), read.key
    )
    encoded = [_encoded(tokenizer, sentences, length, max_cls) for sentences, _ in documents]
    labels = [labels[: len(row[2])] for row, (_, labels) in zip(encoded, documents, strict=True)]
    shares = Counter(label for row in labels for label in row)
    info = DataInfo(
        source=f"{len(documents):,} texts of {read.origin}",
        vocab_size=tokenizer.vocab_size,
        max_sequence_length=length,
        num_classes=2,
        majority_share=max(shares.values(), default=0) / max(1, sum(shares.values())),
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
    )
    with_ids = params.split == "predict"
    return Summarization(encoded, labels, info, max_cls_tokens=max_cls, with_ids=with_ids)


def _encoded(
    tokenizer: Tokenizer, sentences: Sequence[str], length: int, max_cls: int
) -> tuple[Ids, Ids, Ids]:
    """Token numbers, segments (0 and 1 in turn) and where each sentence's cls is; sentences that do
    not fit are left out, the first one is cut."""
    cls, sep = tokenizer.need("cls"), tokenizer.need("sep")
    ids: list[int] = []
    segments: list[int] = []
    places: list[int] = []
    for number, tokens in enumerate(tokenizer.encode_many(sentences)):
        part = [cls, *tokens.tolist()[: length - 2], sep]
        if len(ids) + len(part) > length or len(places) == max_cls:
            break
        places.append(len(ids))
        ids += part
        segments += [number % 2] * len(part)
    arrays = (np.array(values, dtype=np.int32) for values in (ids, segments, places))
    ids_array, segments_array, places_array = arrays
    return ids_array, segments_array, places_array


def choose_sentences(sentences: Sequence[str], summary: str) -> list[int]:
    """1 for at most three sentences that together share most words with a written summary, each
    chosen while it makes the F1 of common words higher."""
    wanted = Counter(summary.lower().split())
    words = [Counter(sentence.lower().split()) for sentence in sentences]
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < _MAX_CHOSEN:
        together = sum((words[index] for index in chosen), Counter[str]())
        scores = [
            -1.0 if index in chosen else _f1(together + found, wanted)
            for index, found in enumerate(words)
        ]
        place = int(np.argmax(scores)) if scores else 0
        if not scores or scores[place] <= best:
            break
        chosen.append(place)
        best = scores[place]
    return [int(index in chosen) for index in range(len(sentences))]


def _f1(found: Counter[str], wanted: Counter[str]) -> float:
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def read_jsonl(path: Path) -> list[Document]:
    """Sentences and their labels, one document a line.

    Raises:
        DataError: a line that is not of the form; with file and line.
    """
    documents: list[Document] = []
    allowed = '{"sentences": ["..."], "labels": [0]}, or "summary": "..." in place of labels'
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            content = json.loads(line)
            sentences = [str(sentence) for sentence in content["sentences"]]
            if "labels" in content:
                labels = [int(label) for label in content["labels"]]
            else:
                labels = choose_sentences(sentences, str(content["summary"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a document: {error}", where=where, allowed=allowed) from error
        if len(labels) != len(sentences) or not sentences:
            raise DataError(
                f"{len(sentences)} sentences and {len(labels)} labels", where=where, allowed=allowed
            )
        documents.append((sentences, labels))
    return documents


class DocumentedCsv(KeyedDataset):
    """Rows of features of different lengths, padded here."""

    def __init__(self, rows: CsvRows, length: int, max_cls: int) -> None:
        self._rows, self._max_cls = rows, max_cls
        info = DataInfo(source=f"{len(rows):,} rows", max_sequence_length=length, num_classes=2)
        super().__init__(info, len(rows))

    def item(self, index: int, seed: int) -> Item:
        row = self._rows[index]
        ids, labels, segments, places = (integers_of(row[name], "") for name in _CSV_COLUMNS)
        length = self.info.max_sequence_length
        if len(ids) > length or len(labels) != len(places) or len(segments) != len(ids):
            raise DataError(
                f"{len(ids)} tokens, {len(segments)} segments, {len(places)} sentences,"
                f" {len(labels)} labels",
                where=self._rows.where(index),
                allowed=f"at most {length} tokens with as many segments; a label a sentence",
            )
        return {
            "input_ids": pad(ids, length),
            "attention_mask": pad(np.ones_like(ids), length),
            "token_type_ids": pad(segments, length),
            "labels": pad(labels, self._max_cls),
            "cls_indices": pad(places, self._max_cls),
            "cls_weights": pad(np.ones_like(places), self._max_cls).astype(np.float32),
        }
