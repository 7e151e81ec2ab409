"""Named entities and other labels of words: files in CoNLL's format, the documented CSV layout, and
the embedded sentences.

Decides how words become tokens (the first token of a word carries its label, the others do not
count), and that a sentence that is too long goes on in another sequence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.csv_files import CsvRows, holds_csv
from openwafer.data.dataset import DataInfo, Item, KeyedDataset
from openwafer.data.generated import tagged_sentences
from openwafer.data.params import InputParams
from openwafer.data.ragged import Ragged
from openwafer.data.sequences import ENCODER_KEYS, EncoderRows, task_tokenizer
from openwafer.data.split_files import Examples, SplitFiles, read_examples
from openwafer.data.tokenizers import Ids, Tokenizer, WordTokenizer, read_vocab
from openwafer.errors import ConfigError, DataError, nearest

__all__ = [
    "KEYS",
    "TokenClassification",
    "build",
    "label_names",
    "read_conll",
    "read_label_names",
]

KEYS: dict[str, Any] = {
    **ENCODER_KEYS,
    "label_vocab_file": None,
    "include_padding_in_loss": False,
}

_FILES = SplitFiles(
    stems={
        "train": ("train",),
        "eval": ("dev", "valid", "eval", "testa", "devel"),
        "predict": ("test", "testb", "predict"),
    },
    endings=(".txt", ".conll", ".tsv", ".bio", ".iob2"),
)
_EMBEDDED = {"train": 4000, "eval": 500, "predict": 500}

Sentence = tuple[list[str], list[str]]


class TokenClassification(KeyedDataset):
    """input_ids, attention_mask, loss_mask, token_type_ids, labels: [seq]."""

    def __init__(
        self,
        rows: EncoderRows,
        labels: Ragged,
        counts: Ragged,
        info: DataInfo,
        *,
        everything_counts: bool,
        with_ids: bool,
    ) -> None:
        self._rows, self._labels, self._counts = rows, labels, counts
        self._everything = everything_counts
        super().__init__(info, len(rows), with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        length = self.info.max_sequence_length
        counts = self._counts.padded(indices, length)[0]
        return {
            **self._rows.rows(indices),
            "labels": self._labels.padded(indices, length)[0],
            "loss_mask": np.ones_like(counts) if self._everything else counts,
        }


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    paths = params.paths("data_dir")
    if holds_csv(paths):
        return _documented(params, paths)
    if paths:
        read = read_examples(paths, params.split, _FILES, read_conll)
    else:
        if params.get("embedded") not in (None, "names"):
            raise params.wrong("embedded", "names")
        read = Examples(
            examples=tagged_sentences(params.split, _EMBEDDED[params.split]),
            training=tagged_sentences("train", _EMBEDDED["train"]),
            origin="generated sentences with names",
            key=("names", 2),
        )
    names = label_names(params, read.training)
    tokenizer = task_tokenizer(
        params, lambda: (" ".join(words) for words, _ in read.training), read.key
    )
    length = params.integer("max_sequence_length", minimum=8)
    number = {name: index for index, name in enumerate(names)}
    pieces = list(_tokenized(read.examples, tokenizer, length, number))
    shares = Counter(
        label for _, labels, counts in pieces for label in labels[counts == 1].tolist()
    )
    info = DataInfo(
        source=f"{len(read.examples):,} sentences of {read.origin}",
        vocab_size=tokenizer.vocab_size,
        max_sequence_length=length,
        num_classes=len(names),
        label_names=tuple(names),
        majority_share=max(shares.values(), default=0) / max(1, sum(shares.values())),
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
    )
    return TokenClassification(
        EncoderRows(((ids, len(ids)) for ids, _, _ in pieces), length),
        Ragged(labels for _, labels, _ in pieces),
        Ragged(counts for _, _, counts in pieces),
        info,
        everything_counts=params.flag("include_padding_in_loss"),
        with_ids=params.split == "predict",
    )


def _tokenized(
    sentences: Sequence[Sentence], tokenizer: Tokenizer, length: int, number: dict[str, int]
) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Token numbers, labels, and 1 for the tokens that count."""
    words = sorted({word for words, _ in sentences for word in words})
    # Each word alone, so that its tokens are known; a space before it where spaces are tokens.
    prefix = "" if tokenizer.kind in ("wordpiece", "words") else " "
    encoded = dict(
        zip(words, tokenizer.encode_many([prefix + word for word in words]), strict=True)
    )
    room = length - 2
    for sentence, labels in sentences:
        ids: list[int] = []
        targets: list[int] = []
        counts: list[int] = []
        for word, label in zip(sentence, labels, strict=True):
            tokens = encoded[word].tolist()[:room] or [tokenizer.need("unk")]
            if len(ids) + len(tokens) > room:
                yield _closed(tokenizer, ids, targets, counts)
                ids, targets, counts = [], [], []
            if label not in number:
                raise DataError(
                    f"the label {label!r} is not known",
                    allowed=", ".join(number),
                    hint=nearest(label, number),
                )
            ids += tokens
            targets += [number[label]] * len(tokens)
            counts += [1] + [0] * (len(tokens) - 1)
        if ids:
            yield _closed(tokenizer, ids, targets, counts)


def _closed(
    tokenizer: Tokenizer, ids: list[int], targets: list[int], counts: list[int]
) -> tuple[Ids, Ids, Ids]:
    whole = [tokenizer.need("cls"), *ids, tokenizer.need("sep")]
    arrays = (whole, [0, *targets, 0], [0, *counts, 0])
    ids_array, targets_array, counts_array = (np.array(a, dtype=np.int32) for a in arrays)
    return ids_array, targets_array, counts_array


def label_names(params: InputParams, training: Sequence[Sentence]) -> list[str]:
    """Of `label_vocab_file` (JSON, label to number), or those of training, `O` first."""
    given = params.text("label_vocab_file")
    if given is None:
        found = {label for _, labels in training for label in labels}
        return sorted(found, key=lambda name: (name != "O", name[2:], name))
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no {path}", where=params.where("label_vocab_file"))
    return read_label_names(path)


def read_label_names(path: Path) -> list[str]:
    """Labels by number, of a JSON file of label to number.

    Raises:
        DataError: it is no such file.
    """
    try:
        numbers: dict[str, int] = {k: int(v) for k, v in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"not labels and their numbers: {error}",
            where=str(path),
            allowed='{"O": 0, "B-PER": 1}',
        ) from error
    by_number = {number: name for name, number in numbers.items()}
    return [by_number.get(index, f"_{index}") for index in range(max(by_number) + 1)]


def read_conll(path: Path) -> list[Sentence]:
    """Words and labels: a word a line, its label in the last column, an empty line between
    sentences; `-DOCSTART-` and comments (`# `) are passed over.

    Raises:
        DataError: a line without a label; with file and line.
    """
    sentences: list[Sentence] = []
    words: list[str] = []
    labels: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if words:
                sentences.append((words, labels))
                words, labels = [], []
            continue
        if columns[0] == "#" and not words:
            continue
        if len(columns) < 2:
            raise DataError(
                f"the word {columns[0]!r} has no label",
                where=f"{path}:{number}",
                allowed="word and label between spaces or tabs",
            )
        words.append(columns[0])
        labels.append(columns[-1])
    if words:
        sentences.append((words, labels))
    return sentences


def _documented(params: InputParams, paths: Sequence[Path]) -> KeyedDataset:
    """Rows of tokens and labels, special tokens included: every token counts."""
    rows = CsvRows(paths, ("tokens", "labels"))
    vocab_file = params.text("vocab_file")
    if not vocab_file or not params.get("label_vocab_file"):
        raise ConfigError(
            "rows of tokens need their vocabularies",
            where=params.where("label_vocab_file" if vocab_file else "vocab_file"),
            allowed="vocab_file: one token a line; label_vocab_file: JSON, label to number",
        )
    tokenizer = WordTokenizer(read_vocab(Path(vocab_file)), do_lower=params.flag("do_lower"))
    names = label_names(params, ())
    number = {name: index for index, name in enumerate(names)}
    length = params.integer("max_sequence_length", minimum=8)
    ids: list[tuple[Ids, int]] = []
    labels: list[list[int]] = []
    for index in range(len(rows)):
        row = rows[index]
        words, targets = row["tokens"].split(), row["labels"].split()
        wrong = next((label for label in targets if label not in number), None)
        if len(words) != len(targets) or len(words) > length or wrong is not None:
            found = f"unknown label {wrong!r}" if wrong else f"{len(words)} tokens"
            raise DataError(
                f"{found}, {len(targets)} labels",
                where=rows.where(index),
                allowed=f"as many labels as tokens, at most {length}, of {', '.join(names)}",
            )
        ids.append((tokenizer.numbers(words), len(words)))
        labels.append([number[label] for label in targets])
    info = DataInfo(
        source=f"{len(rows):,} rows of {', '.join(map(str, paths))}",
        vocab_size=tokenizer.vocab_size,
        max_sequence_length=length,
        num_classes=len(names),
        label_names=tuple(names),
        tokenizer=tokenizer,
    )
    return TokenClassification(
        EncoderRows(ids, length),
        Ragged(labels),
        Ragged([1] * len(row) for row in labels),
        info,
        everything_counts=params.flag("include_padding_in_loss"),
        with_ids=params.split == "predict",
    )
