"""Translation: pairs of lines, source and target.

Decides how lines are paired and what happens to long ones. Files: one of source lines and one of
target lines each (or the documented folders with `meta.dat`), or TSV files with both in a line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.csv_files import listed_files
from openwafer.data.dataset import Batch, DataInfo, Item, KeyedDataset
from openwafer.data.generated import number_pairs, reversal_pairs, translation_words
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.ragged import Ragged
from openwafer.data.spans import add_loss_weight, decoder_start
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import Tokenizer, WordTokenizer
from openwafer.errors import ConfigError, DataError

__all__ = ["KEYS", "TranslationPairs", "build"]

_log = logging.getLogger("openwafer")

KEYS: dict[str, Any] = {
    **COMMON_KEYS,
    "src_data_dir": None,
    "tgt_data_dir": None,
    "src_vocab_file": None,
    "tgt_vocab_file": None,
    "src_max_sequence_length": 32,
    "tgt_max_sequence_length": 32,
    "dynamic_loss_weight": False,
    "extra_ids": 0,
    "vocab_file": None,
    "tokenizer": None,
    "do_lower": False,
}
_ITEMS = {"train": 20_000, "eval": 1_000, "predict": 1_000}


class TranslationPairs(KeyedDataset):
    """input_ids, attention_mask [src]; decoder_input_ids, decoder_attention_mask, labels [tgt].

    Rows of both sides end with eos; the decoder is given bos (pad where there is none) first, then
    the target.
    """

    def __init__(
        self,
        sources: Ragged,
        targets: Ragged,
        tokenizers: tuple[Tokenizer, Tokenizer],
        info: DataInfo,
        *,
        loss_weight: bool = False,
        with_ids: bool = False,
    ) -> None:
        self._sources, self._targets = sources, targets
        self._first = decoder_start(tokenizers[1])
        self._loss_weight = loss_weight
        super().__init__(info, len(sources), with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        sources, source_mask = self._sources.padded(indices, self.info.max_sequence_length)
        labels, mask = self._targets.padded(indices, self.info.tgt_max_sequence_length)
        given = np.zeros_like(labels)
        given[:, 0] = self._first
        given[:, 1:] = labels[:, :-1] * mask[:, 1:]
        return {
            "input_ids": sources,
            "attention_mask": source_mask,
            "decoder_input_ids": given,
            "decoder_attention_mask": mask,
            "labels": labels,
        }

    def finish(self, batch: Batch) -> None:
        if self._loss_weight:
            add_loss_weight(batch)


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    if params.get("src_data_dir") or params.get("data_dir"):
        sources, targets, tokenizers, origin = _from_files(params)
    else:
        sources, targets, tokenizers, origin = _generated(params)
    source_length = params.integer("src_max_sequence_length", minimum=2)
    target_length = params.integer("tgt_max_sequence_length", minimum=2)
    rows = [tokenizers[0].encode_many(sources), tokenizers[1].encode_many(targets)]
    kept = [
        index
        for index, (source, target) in enumerate(zip(*rows, strict=True))
        if len(source) < source_length and len(target) < target_length and len(source)
    ]
    if len(kept) < len(sources):
        _log.info(
            "%d of %d pairs are empty or longer than %d and %d tokens: left out",
            len(sources) - len(kept),
            len(sources),
            source_length,
            target_length,
        )
    extra_ids = params.integer("extra_ids")
    info = DataInfo(
        source=f"{len(kept):,} pairs of {origin}",
        vocab_size=tokenizers[0].vocab_size + extra_ids,
        tgt_vocab_size=tokenizers[1].vocab_size + extra_ids,
        max_sequence_length=source_length,
        tgt_max_sequence_length=target_length,
        tokenizer=tokenizers[1],
    )
    return TranslationPairs(
        Ragged(np.append(rows[0][index], tokenizers[0].need("eos")) for index in kept),
        Ragged(np.append(rows[1][index], tokenizers[1].need("eos")) for index in kept),
        tokenizers,
        info,
        loss_weight=params.flag("dynamic_loss_weight"),
        with_ids=params.split == "predict",
    )


_Pairs = tuple[list[str], list[str], tuple[Tokenizer, Tokenizer], str]


def _generated(params: InputParams) -> _Pairs:
    name = params.get("embedded") or "numbers"
    makers = {"numbers": number_pairs, "reverse": reversal_pairs}
    if name not in makers:
        raise params.wrong("embedded", ", ".join(makers))
    sources, targets = makers[name](params.split, _ITEMS[params.split])
    tokenizer = WordTokenizer(translation_words())
    kind = "numbers and their words" if name == "numbers" else "words and their reverse"
    return sources, targets, (tokenizer, tokenizer), kind


def _from_files(params: InputParams) -> _Pairs:
    lower = params.flag("do_lower")
    names = [_vocabulary(params, side) for side in ("src", "tgt")]
    tokenizers = (
        load_tokenizer(names[0], do_lower=lower),
        load_tokenizer(names[1], do_lower=lower),
    )
    if params.get("src_data_dir"):
        source_paths, target_paths = params.paths("src_data_dir"), params.paths("tgt_data_dir")
        if not target_paths:
            raise ConfigError("sources without targets", where=params.where("tgt_data_dir"))
        sources, targets = _lines(source_paths), _lines(target_paths)
        if len(sources) != len(targets):
            raise DataError(
                f"{len(sources)} source lines and {len(targets)} target lines",
                where=f"{source_paths[0]}, {target_paths[0]}",
                allowed="line n of the targets is the translation of line n of the sources",
            )
        return sources, targets, tokenizers, str(source_paths[0])
    paths = params.paths("data_dir")
    sources, targets = _tab_separated([path for path, _ in listed_files(paths, (".tsv",))])
    return sources, targets, tokenizers, str(paths[0])


def _vocabulary(params: InputParams, side: str) -> str:
    """A vocabulary file is a list of words: these texts are tokenized already, as documented."""
    given = params.text(f"{side}_vocab_file") or params.text("vocab_file")
    if given:
        return given if given.endswith(".json") else f"words:{given}"
    return params.text("tokenizer") or "byte"


def _lines(paths: Sequence[Path]) -> list[str]:
    lines: list[str] = []
    for path, expected in listed_files(paths, (".txt", "")):
        found = path.read_text(encoding="utf-8").splitlines()
        if expected is not None and expected != len(found):
            raise DataError(
                f"{len(found)} lines", where=str(path), allowed=f"{expected}, as meta.dat says"
            )
        lines += found
    return lines


def _tab_separated(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    sources: list[str] = []
    targets: list[str] = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            parts = line.split("\t")
            if len(parts) != 2:
                raise DataError(
                    f"the line has {len(parts)} parts",
                    where=f"{path}:{number}",
                    allowed="source, tab, target",
                )
            sources.append(parts[0])
            targets.append(parts[1])
    return sources, targets
