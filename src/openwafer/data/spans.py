"""T5's span corruption: spans of the text are replaced by sentinels, and the target is the spans.

Decides which tokens are spans, how source and target are made of them, and how long a window of
text may be so that both fit. Source: Raffel et al., "Exploring the Limits of Transfer Learning with
a Unified Text-to-Text Transformer" (2020), section 3.1.4: 15 of 100 tokens, spans of 3 on average.
Windows of one length all have as many spans, so a batch is made at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openwafer.data.cache import cached_folder
from openwafer.data.csv_files import listed_files
from openwafer.data.dataset import Batch, DataInfo, Item, KeyedDataset
from openwafer.data.generated import paired_tokens, pairs_tokenizer
from openwafer.data.keyed_random import keyed_uniforms
from openwafer.data.params import COMMON_KEYS, InputParams
from openwafer.data.sources import token_source
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenized_text import tokenize_text
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import ConfigError, DataError, nearest

__all__ = ["KEYS", "SpanCorruption", "build", "span_counts", "window_length"]

KEYS: dict[str, Any] = {
    **COMMON_KEYS,
    "src_data_dir": None,
    "src_vocab_file": None,
    "src_max_sequence_length": 128,
    "tgt_max_sequence_length": 48,
    "extra_ids": 32,
    "dynamic_loss_weight": False,
    "noise_density": 0.15,
    "mean_noise_span_length": 3.0,
    "vocab_file": None,
    "vocab_size": None,
    "tokenizer": "bpe",
    "do_lower": False,
}
_VOCAB_SIZE = 1024
_PAIRED_ITEMS = {"train": 20_000, "eval": 500, "predict": 500}
_DRAW_NOISE, _DRAW_KEPT = 121, 122

Fill = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], None]
"""`fill(out [batch, window], numbers [batch])` reads windows of tokens."""


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Corrupted tokens and spans of a window: at least one of each, and one token kept before
    each span."""
    num_noise = min(max(round(length * density), 1), length - 1)
    num_spans = min(max(round(num_noise / mean_span), 1), num_noise, length - num_noise)
    return num_noise, num_spans


def window_length(source_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """The longest window whose source fits with its eos token, and its target's length with eos."""
    length = source_length
    while True:
        num_noise, num_spans = span_counts(length + 1, density, mean_span)
        if length + 1 - num_noise + num_spans + 1 > source_length:
            break
        length += 1
    while length > 2:
        num_noise, num_spans = span_counts(length, density, mean_span)
        if length - num_noise + num_spans + 1 <= source_length:
            break
        length -= 1
    num_noise, num_spans = span_counts(length, density, mean_span)
    return length, num_noise + num_spans + 1


class SpanCorruption(KeyedDataset):
    """input_ids, attention_mask [src]; decoder_input_ids, decoder_attention_mask, labels [tgt].

    Sentinel k is the number vocab_size - 1 - k, vocab_size with its `extra_ids`.
    """

    def __init__(
        self,
        fill: Fill,
        num_windows: int,
        tokenizer: Tokenizer,
        info: DataInfo,
        *,
        window: int,
        density: float,
        mean_span: float,
        loss_weight: bool = False,
        with_ids: bool = False,
    ) -> None:
        self._fill, self._window = fill, window
        self._num_noise, self._num_spans = span_counts(window, density, mean_span)
        self._eos = tokenizer.need("eos")
        self._first = decoder_start(tokenizer)
        self._loss_weight = loss_weight
        super().__init__(info, num_windows, with_ids=with_ids)

    def item(self, index: int, seed: int) -> Item:
        return {name: rows[0] for name, rows in self.rows(np.array([index]), seed).items()}

    def rows(self, indices: npt.NDArray[np.int64], seed: int) -> dict[str, npt.NDArray[Any]]:
        tokens = np.empty((len(indices), self._window), dtype=np.int64)
        self._fill(tokens, indices)
        noise = self._noise(indices, seed)
        sentinels = self.info.vocab_size - 1
        return text_to_text(
            _corrupted(tokens, noise, sentinels),
            _corrupted(tokens, ~noise, sentinels),
            (self.info.max_sequence_length, self.info.tgt_max_sequence_length),
            self._first,
            self._eos,
        )

    def _noise(self, indices: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.bool_]:
        """[batch, window]: which tokens are corrupted; kept and corrupted spans take turns,
        a kept one first and a corrupted one last, as in T5's own code."""
        kept = _segments(self._window - self._num_noise, self._num_spans, indices, seed, _DRAW_KEPT)
        corrupted = _segments(self._num_noise, self._num_spans, indices, seed, _DRAW_NOISE)
        lengths = np.stack([kept, corrupted], axis=2).reshape(len(indices), -1)
        begins = np.cumsum(lengths, axis=1)[:, :-1]
        marks = np.zeros((len(indices), self._window), dtype=np.int64)
        marks[np.arange(len(indices))[:, None], begins] = 1
        return np.cumsum(marks, axis=1) % 2 == 1

    def finish(self, batch: Batch) -> None:
        if self._loss_weight:
            add_loss_weight(batch)


def _segments(
    total: int, count: int, items: npt.NDArray[np.int64], seed: int, draw: int
) -> npt.NDArray[np.int64]:
    """[batch, count] positive lengths with the sum `total`, every division equally likely."""
    if count == 1:
        return np.full((len(items), 1), total, dtype=np.int64)
    uniforms = keyed_uniforms(seed, items, total - 1, draw=draw)
    cuts = np.sort(np.argsort(uniforms, axis=1)[:, : count - 1], axis=1) + 1
    ends = np.full((len(items), 1), total)
    return np.diff(np.concatenate([np.zeros_like(ends), cuts, ends], axis=1), axis=1)


def _corrupted(
    tokens: npt.NDArray[np.int64], noise: npt.NDArray[np.bool_], first_sentinel: int
) -> npt.NDArray[np.int64]:
    """Each run of noise as one sentinel; all rows have as many runs, so all get one length."""
    starts = noise.copy()
    starts[:, 1:] &= ~noise[:, :-1]
    number = np.cumsum(starts, axis=1) - 1
    kept = ~noise | starts
    values = np.where(starts, first_sentinel - number, tokens)
    return values[kept].reshape(len(tokens), -1)


def decoder_start(tokenizer: Tokenizer) -> int:
    """What the decoder is given first: the bos token, or the pad token where there is none (T5)."""
    return tokenizer.ids.bos if tokenizer.ids.bos >= 0 else tokenizer.need("pad")


def text_to_text(
    source: npt.NDArray[np.int64],
    target: npt.NDArray[np.int64],
    lengths: tuple[int, int],
    first: int,
    eos: int,
) -> dict[str, npt.NDArray[Any]]:
    """The batch of an encoder and a decoder, from rows of one length each, without eos."""
    batch, used_source, used_target = len(source), source.shape[1] + 1, target.shape[1] + 1
    rows = {
        name: np.zeros((batch, lengths[0]), np.int64) for name in ("input_ids", "attention_mask")
    }
    for name in ("decoder_input_ids", "decoder_attention_mask", "labels"):
        rows[name] = np.zeros((batch, lengths[1]), np.int64)
    rows["input_ids"][:, : used_source - 1] = source
    rows["input_ids"][:, used_source - 1] = eos
    rows["attention_mask"][:, :used_source] = 1
    rows["labels"][:, : used_target - 1] = target
    rows["labels"][:, used_target - 1] = eos
    rows["decoder_input_ids"][:, 0] = first
    rows["decoder_input_ids"][:, 1:used_target] = target
    rows["decoder_attention_mask"][:, :used_target] = 1
    return rows


def add_loss_weight(batch: Batch) -> None:
    """`loss_weight` [batch, 1]: samples for each target token of the batch."""
    mask = batch["decoder_attention_mask"]
    batch["loss_weight"] = torch.full((len(mask), 1), len(mask) / max(1.0, float(mask.sum())))


def build(params: InputParams) -> KeyedDataset:
    """The dataset of a section; see the module's header."""
    density = params.number("noise_density", minimum=0.01, maximum=0.9)
    mean_span = params.number("mean_noise_span_length", minimum=1.0, maximum=100.0)
    source_length = params.integer("src_max_sequence_length", minimum=8)
    target_length = params.integer("tgt_max_sequence_length", minimum=4)
    window, needed = window_length(source_length, density, mean_span)
    if needed > target_length:
        raise ConfigError(
            f"targets of {needed} tokens do not fit into {target_length}",
            where=params.where("tgt_max_sequence_length"),
            allowed=f"at least {needed} with sources of {source_length}",
        )
    fill, num_windows, tokenizer, source, bytes_per_token = _windows(params, window)
    extra_ids = params.integer("extra_ids", minimum=0)
    _, num_spans = span_counts(window, density, mean_span)
    if extra_ids < num_spans:
        raise ConfigError(
            f"{num_spans} spans need as many sentinels",
            where=params.where("extra_ids"),
            allowed=f"at least {num_spans}",
        )
    info = DataInfo(
        source=source,
        vocab_size=tokenizer.vocab_size + extra_ids,
        tgt_vocab_size=tokenizer.vocab_size + extra_ids,
        max_sequence_length=source_length,
        tgt_max_sequence_length=target_length,
        bytes_per_token=bytes_per_token,
        pad_id=max(0, tokenizer.ids.pad),
        tokenizer=tokenizer,
    )
    return SpanCorruption(
        fill,
        num_windows,
        tokenizer,
        info,
        window=window,
        density=density,
        mean_span=mean_span,
        loss_weight=params.flag("dynamic_loss_weight"),
        with_ids=params.split == "predict",
    )


class _ShardWindows:
    """Windows of tokenized text, one behind the other."""

    def __init__(self, shards: TokenShards) -> None:
        self._shards = shards

    def __call__(self, out: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> None:
        for row, number in zip(out, numbers.tolist(), strict=True):
            self._shards.read_into(row, number * len(row))


def _windows(params: InputParams, window: int) -> tuple[Fill, int, Tokenizer, str, float]:
    paths = params.paths("src_data_dir") or params.paths("data_dir")
    embedded = params.get("embedded") or "stdlib"
    if not paths and embedded == "pairs":
        count = _PAIRED_ITEMS[params.split]
        return paired_tokens(params.split), count, pairs_tokenizer(), "numbers in pairs", 0.0
    if not paths and embedded != "stdlib":
        raise params.wrong("embedded", "stdlib, pairs", nearest(str(embedded), ("pairs", "stdlib")))
    if params.text("src_vocab_file") and any((path / "meta.dat").is_file() for path in paths):
        shards, tokenizer, source = _tokenized_words(params, paths)
    else:
        key = "src_vocab_file" if params.text("src_vocab_file") else "vocab_file"
        shards, tokenizer, source = token_source(
            params, paths, vocab_size=_VOCAB_SIZE, vocab_key=key
        )
    if shards.num_tokens < window:
        raise DataError(
            f"{shards.num_tokens} tokens are not one window of {window}", where=str(shards.folder)
        )
    per_token = shards.num_bytes / shards.num_tokens
    return _ShardWindows(shards), shards.num_tokens // window, tokenizer, source, per_token


def _tokenized_words(params: InputParams, paths: list[Path]) -> tuple[TokenShards, Tokenizer, str]:
    """The documented layout: files of words between spaces, listed in meta.dat."""
    files = [path for path, _ in listed_files(paths, (".txt",))]
    vocabulary = params.text("src_vocab_file")
    lower = params.flag("do_lower")
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]

    def make(folder: Path) -> None:
        tokenize_text(
            files, folder, tokenizer=f"words:{vocabulary}", documents="lines", do_lower=lower
        )

    folder = cached_folder("words", (1, states, vocabulary, lower), make)
    shards = TokenShards(folder)
    return shards, load_tokenizer(folder), f"{shards.num_tokens:,} tokens of {len(files)} files"
