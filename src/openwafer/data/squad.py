"""Question answering: files of SQuAD's form, the documented CSV layout, and the embedded questions.

Decides how a text longer than a sequence is read in overlapping windows, and where an answer is in
one. Source: Rajpurkar et al., "SQuAD" (2016), and Devlin et al., "BERT" (2018), section 4.2. What
logits mean is in squad_answers.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from openwafer.data.csv_files import CsvRows, holds_csv, integers_of
from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.generated import questions
from openwafer.data.params import InputParams
from openwafer.data.sequences import ENCODER_KEYS, EncoderRows, task_tokenizer
from openwafer.data.split_files import Examples, SplitFiles, read_examples
from openwafer.data.squad_answers import SquadAnswers, Window
from openwafer.data.tokenizers import Ids, Tokenizer
from openwafer.errors import DataError

__all__ = ["KEYS", "QuestionAnswering", "SquadExample", "build", "read_squad"]

KEYS: dict[str, Any] = {
    **ENCODER_KEYS,
    "doc_stride": 64,
    "max_query_length": 64,
    "max_answer_length": 30,
}
_EMBEDDED = {"train": 4000, "eval": 400, "predict": 400}
_FILES = SplitFiles(
    stems={
        "train": ("train*",),
        "eval": ("dev*", "eval*", "valid*"),
        "predict": ("dev*", "eval*", "test*"),
    },
    endings=(".json",),
)


@dataclass(frozen=True, slots=True)
class SquadExample:
    """answers: (text, first character); none means that the context does not hold one."""

    identifier: str
    context: str
    question: str
    answers: tuple[tuple[str, int], ...]


class QuestionAnswering(KeyedDataset):
    """input_ids, attention_mask, token_type_ids [seq]; labels [2] (first and last token of the
    answer; 0, 0 where the window has none); label_weights [2]; unique_ids []."""

    def __init__(
        self,
        rows: EncoderRows,
        labels: npt.NDArray[np.int64],
        info: DataInfo,
        answers: SquadAnswers,
    ) -> None:
        self._rows, self._labels = rows, labels
        self.answers = answers
        super().__init__(info, len(rows), with_ids=True)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        labels = self._labels[indices]
        weights = np.ones(labels.shape, dtype=np.float32)
        return {**self._rows.rows(indices), "labels": labels, "label_weights": weights}


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    paths = params.paths("data_dir")
    if holds_csv(paths):
        return DocumentedCsv(
            CsvRows(paths, ("input_ids", "input_mask", "segment_ids", "start_position")),
            params.integer("max_sequence_length", minimum=8),
            ", ".join(map(str, paths)),
        )
    if paths:
        read = read_examples(paths, params.split, _FILES, read_squad)
    else:
        if params.get("embedded") not in (None, "purchases"):
            raise params.wrong("embedded", "purchases")
        read = Examples(
            examples=_generated(params.split),
            training=_generated("train"),
            origin="generated questions",
            key=("purchases", 2),
        )
    tokenizer = task_tokenizer(
        params, lambda: (text for e in read.training for text in (e.context, e.question)), read.key
    )
    return _from_examples(params, read.examples, tokenizer, read.origin)


def _from_examples(
    params: InputParams, examples: Sequence[SquadExample], tokenizer: Tokenizer, origin: str
) -> QuestionAnswering:
    length = params.integer("max_sequence_length", minimum=16)
    stride = params.integer("doc_stride", minimum=1)
    max_query = params.integer("max_query_length", minimum=1)
    sequences: list[tuple[Ids, int]] = []
    labels: list[tuple[int, int]] = []
    windows: list[Window] = []
    for number, example in enumerate(examples):
        for sequence, label, window in _windows(
            example, number, tokenizer, length=length, stride=stride, max_query=max_query
        ):
            sequences.append(sequence)
            labels.append(label)
            windows.append(window)
    answers = SquadAnswers(
        windows,
        [example.identifier for example in examples],
        [example.context for example in examples],
        {example.identifier: [text for text, _ in example.answers] for example in examples},
        max_answer_length=params.integer("max_answer_length", minimum=1),
    )
    info = DataInfo(
        source=f"{len(examples):,} questions of {origin}, in {len(sequences):,} windows",
        vocab_size=tokenizer.vocab_size,
        max_sequence_length=length,
        num_classes=2,
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
        answers=answers,
    )
    label_array = np.array(labels, dtype=np.int64).reshape(-1, 2)
    return QuestionAnswering(EncoderRows(sequences, length), label_array, info, answers)


def _windows(
    example: SquadExample,
    number: int,
    tokenizer: Tokenizer,
    *,
    length: int,
    stride: int,
    max_query: int,
) -> Iterator[tuple[tuple[Ids, int], tuple[int, int], Window]]:
    """Sequence, answer and place of each window of one example's context."""
    query = tokenizer.encode(example.question)[:max_query]
    tokens, offsets = tokenizer.encode_with_offsets(example.context)
    room = length - len(query) - 3
    if room < 1:
        raise DataError(
            f"a question of {len(query)} tokens leaves no room for the text",
            where=example.identifier,
            allowed=f"max_query_length below max_sequence_length - 3 = {length - 3}",
        )
    answer = _answer_tokens(example, offsets)
    first = len(query) + 2
    cls, sep = tokenizer.need("cls"), tokenizer.need("sep")
    begin = 0
    while True:
        part = tokens[begin : begin + room]
        ids = np.concatenate([[cls], query, [sep], part, [sep]]).astype(np.int32)
        label = (0, 0)
        if answer is not None and answer[0] >= begin and answer[1] < begin + len(part):
            label = (answer[0] - begin + first, answer[1] - begin + first)
        # A token may count once as an answer: where it is farthest from its window's edges.
        here = offsets[begin : begin + room]
        yield (ids, first), label, Window(number, first, here)
        if begin + len(part) >= len(tokens):
            return
        begin += min(stride, room)


def _answer_tokens(example: SquadExample, offsets: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """The first answer's first and last token in the context."""
    if not example.answers or not len(offsets):
        return None
    text, start = example.answers[0]
    found = example.context[start : start + len(text)]
    if found != text:
        raise DataError(
            f"the answer {text!r} is not at character {start}",
            where=f"question {example.identifier}",
            allowed=f"answer_start of its place; there is {found!r}",
        )
    inside = (offsets[:, 1] > start) & (offsets[:, 0] < start + len(text))
    places = np.flatnonzero(inside & (offsets[:, 1] > offsets[:, 0]))
    return (int(places[0]), int(places[-1])) if len(places) else None


def _generated(split: Any) -> list[SquadExample]:
    return [
        SquadExample(q.identifier, q.context, q.question, ((q.answer, q.start),))
        for q in questions(split, _EMBEDDED[split])
    ]


def read_squad(path: Path) -> list[SquadExample]:
    """The questions of a file of SQuAD's form, version 1.1 or 2.0.

    Raises:
        DataError: not JSON, or an entry is missing; with its place in the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"not JSON: {error}", where=f"{path}:{line}") from error
    examples: list[SquadExample] = []
    for a, article in enumerate(_list(content, "data", str(path))):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}, data[{a}]")):
            where = f"{path}, data[{a}].paragraphs[{p}]"
            context = _text(paragraph, "context", where)
            for q, entry in enumerate(_list(paragraph, "qas", where)):
                examples.append(_example(entry, context, f"{where}.qas[{q}]"))
    return examples


def _example(entry: Any, context: str, where: str) -> SquadExample:
    answers: list[tuple[str, int]] = []
    if not (isinstance(entry, Mapping) and cast("Mapping[str, Any]", entry).get("is_impossible")):
        for number, answer in enumerate(_list(entry, "answers", where, needed=False)):
            place = f"{where}.answers[{number}]"
            start = answer.get("answer_start") if isinstance(answer, Mapping) else None
            if not isinstance(start, int):
                raise DataError(
                    "the answer has no answer_start", where=place, allowed="a whole number"
                )
            answers.append((_text(answer, "text", place), start))
    identifier = str(entry.get("id", where)) if isinstance(entry, Mapping) else where
    return SquadExample(identifier, context, _text(entry, "question", where), tuple(answers))


def _list(value: Any, key: str, where: str, *, needed: bool = True) -> list[Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    if found is None and not needed:
        return []
    if not isinstance(found, list):
        raise DataError(f"there is no list `{key}`", where=where, allowed="SQuAD's form")
    return cast("list[Any]", found)


def _text(value: Any, key: str, where: str) -> str:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, str):
        raise DataError(f"there is no text `{key}`", where=where, allowed="SQuAD's form")
    return found


class DocumentedCsv(KeyedDataset):
    """Rows of features: input_ids, input_mask, segment_ids, start_position, end_position."""

    def __init__(self, rows: CsvRows, length: int, origin: str) -> None:
        self._rows, self._length = rows, length
        info = DataInfo(
            source=f"{len(rows):,} rows of {origin}", max_sequence_length=length, num_classes=2
        )
        super().__init__(info, len(rows), with_ids=True)

    def item(self, index: int, seed: int) -> Item:
        row = self._rows[index]
        names = {"input_ids": "input_ids", "attention_mask": "input_mask"}
        names["token_type_ids"] = "segment_ids"
        item: dict[str, npt.NDArray[Any]] = {
            name: integers_of(row[column], "") for name, column in names.items()
        }
        for name, values in item.items():
            if len(values) != self._length:
                raise DataError(
                    f"{names[name]} has {len(values)} values",
                    where=self._rows.where(index),
                    allowed=f"max_sequence_length, {self._length}",
                )
        known = bool(row["start_position"])
        ends = [int(row["start_position"]), int(row["end_position"])] if known else [0, 0]
        item["labels"] = np.array(ends, dtype=np.int64)
        item["label_weights"] = ((item["labels"] < self._length) & known).astype(np.float32)
        return item
