"""BERT's documented CSV layouts.

Decides between rows of tokens that are masked here (columns tokens, segment_ids, is_random_next)
and rows that were masked when they were written (input_ids, labels, masked_lm_positions,
masked_lm_weights, attention_mask, and with next sentences token_type_ids, next_sentence_label).
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from openwafer.data.csv_files import CsvRows, integers_of
from openwafer.data.dataset import Batch, DataInfo, Item, KeyedDataset
from openwafer.data.masked_dataset import (
    MaskedDataset,
    MaskedOptions,
    Sequences,
    add_mlm_scale,
    read_options,
)
from openwafer.data.params import InputParams
from openwafer.data.tokenizers import WordTokenizer, read_vocab
from openwafer.errors import ConfigError, DataError

__all__ = ["MaskedCsv", "TokensCsv", "build_bert_csv", "vocabulary_of"]


def vocabulary_of(params: InputParams, paths: Sequence[Path]) -> WordTokenizer:
    """The tokens of `vocab_file`, or of the `vocab.txt` beside the data.

    Raises:
        ConfigError: there is neither.
    """
    given = params.text("vocab_file")
    beside = [folder / "vocab.txt" for path in paths for folder in (path, path.parent)]
    path = Path(given).expanduser() if given else next((p for p in beside if p.is_file()), None)
    if path is None or not path.is_file():
        raise ConfigError(
            f"there is no {path}" if path else "rows of tokens need their vocabulary",
            where=params.where("vocab_file"),
            allowed="a file with one token a line, or vocab.txt beside the data",
        )
    return WordTokenizer(read_vocab(path), do_lower=params.flag("do_lower"))


def build_bert_csv(params: InputParams, paths: Sequence[Path]) -> KeyedDataset:
    """The dataset of a section whose data_dir holds CSV files."""
    rows = CsvRows(paths, ())
    tokenizer = vocabulary_of(params, paths)
    options = read_options(params, tokenizer)
    nsp = not params.flag("disable_nsp")
    info = DataInfo(
        source=f"{len(rows):,} rows of {', '.join(map(str, paths))}",
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
    )
    if "tokens" in rows.header():
        return TokensCsv(rows, tokenizer, info, options, nsp=nsp)
    return MaskedCsv(rows, info, options, nsp=nsp)


class TokensCsv(MaskedDataset):
    """Rows of tokens, masked anew in each epoch."""

    def __init__(
        self,
        rows: CsvRows,
        tokenizer: WordTokenizer,
        info: DataInfo,
        options: MaskedOptions,
        *,
        nsp: bool,
    ) -> None:
        for column in ("segment_ids", "is_random_next") if nsp else ():
            if column not in rows.header():
                raise DataError(
                    f"there is no column {column}",
                    where=rows.where(0),
                    hint="disable_nsp: True, for data without next sentences",
                )
        self._rows, self._tokenizer, self._nsp = rows, tokenizer, nsp
        super().__init__(info, len(rows), options)

    def sequences(self, indices: npt.NDArray[np.int64], seed: int) -> Sequences:
        length = self.options.max_sequence_length
        ids = np.zeros((len(indices), length), dtype=np.int64)
        segments = np.zeros_like(ids)
        lengths = np.zeros(len(indices), dtype=np.int64)
        is_random = np.zeros(len(indices), dtype=np.int64)
        for row, index in enumerate(indices.tolist()):
            values = self._rows[index]
            tokens = self._tokens(values["tokens"], index)
            if self._nsp and len(tokens) > length:
                raise DataError(
                    f"{len(tokens)} tokens",
                    where=self._rows.where(index),
                    allowed=f"at most max_sequence_length, {length}",
                    hint="a larger max_sequence_length, or `openwafer prepare text "
                    f"--max_sequence_length {length}`",
                )
            tokens = tokens[:length]
            ids[row, : len(tokens)] = self._tokenizer.numbers(tokens)
            lengths[row] = len(tokens)
            if self._nsp:
                where = self._rows.where(index) if not values["segment_ids"] else ""
                segment = integers_of(values["segment_ids"], where)[:length]
                segments[row, : len(segment)] = segment
                is_random[row] = values["is_random_next"].strip().lower() in ("1", "true")
        if self._nsp:
            return Sequences(ids, lengths, segments, is_random)
        return Sequences(ids, lengths)

    def _tokens(self, text: str, index: int) -> list[str]:
        """Of `['[CLS]', 'a', ...]` or of words between spaces."""
        if not text.startswith("["):
            return text.split()
        try:
            return [str(token) for token in cast("list[object]", ast.literal_eval(text))]
        except (ValueError, SyntaxError) as error:
            if "," not in text:
                return text.split()
            raise DataError(
                f"not a list of tokens: {text[:40]!r}",
                where=self._rows.where(index),
                allowed="['[CLS]', 'a', '[SEP]'], or words between spaces",
            ) from error


_MASKED_COLUMNS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "labels": "labels",
    "masked_lm_mask": "masked_lm_weights",
    "masked_lm_positions": "masked_lm_positions",
}
_NSP_COLUMNS = {"token_type_ids": "token_type_ids", "next_sentence_label": "next_sentence_label"}


class MaskedCsv(KeyedDataset):
    """Rows that were masked when they were written."""

    def __init__(self, rows: CsvRows, info: DataInfo, options: MaskedOptions, *, nsp: bool) -> None:
        self._columns = {**_MASKED_COLUMNS, **(_NSP_COLUMNS if nsp else {})}
        missing = [column for column in self._columns.values() if column not in rows.header()]
        if missing:
            raise DataError(
                f"there is no column {', '.join(missing)}",
                where=rows.where(0),
                allowed=f"tokens, or {', '.join(self._columns.values())}",
            )
        self._rows, self._options = rows, options
        super().__init__(info, len(rows), with_ids=options.with_ids)

    def item(self, index: int, seed: int) -> Item:
        values = self._rows[index]
        item: dict[str, npt.NDArray[Any]] = {}
        for name, column in self._columns.items():
            item[name] = integers_of(values[column], "")
            expected = self._size(name)
            if len(item[name]) != expected:
                raise DataError(
                    f"{column} has {len(item[name])} values",
                    where=self._rows.where(index),
                    allowed=str(expected),
                    hint="max_sequence_length and max_predictions_per_seq are those of the file",
                )
        return item

    def _size(self, name: str) -> int:
        if name == "next_sentence_label":
            return 1
        if name in ("labels", "masked_lm_mask", "masked_lm_positions"):
            return self._options.rule.max_predictions
        return self._options.max_sequence_length

    def finish(self, batch: Batch) -> None:
        if self._options.dynamic_scale:
            add_mlm_scale(batch)
