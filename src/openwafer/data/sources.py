"""Where a language-model dataset's tokens come from.

Decides between a folder of shards, plain text and the embedded text, and with which tokenizer. Does
not decide what is made of the tokens.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from openwafer.data.cache import cached_folder
from openwafer.data.embedded import TEXTS, embedded_tokens
from openwafer.data.params import InputParams
from openwafer.data.text_files import text_files
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenized_text import tokenize_text
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import DataError, nearest

__all__ = ["token_source"]

_log = logging.getLogger("openwafer")

_SOURCES = {
    "stdlib": "the Python standard library's sources",
    "subjects": "generated texts, each about a subject",
}


def token_source(
    params: InputParams, paths: list[Path], *, vocab_size: int, vocab_key: str = "vocab_file"
) -> tuple[TokenShards, Tokenizer, str]:
    """Tokens, their tokenizer, and one line that says where they are from.

    The section's keys: `tokenizer` and `vocab_size` (of a trained one), or a vocabulary file; they
    are for text, since a folder of shards has its own.

    Raises:
        ConfigError, DataError: see `tokenize_text`.
    """
    size = params.optional_integer("vocab_size", minimum=1) or vocab_size
    lower = params.flag("do_lower")
    name = params.text(vocab_key) or params.text("tokenizer") or "byte"
    if not paths:
        text = params.get("embedded") or "stdlib"
        if text not in TEXTS:
            raise params.wrong("embedded", ", ".join(TEXTS), nearest(str(text), TEXTS))
        folder = embedded_tokens(
            text,
            params.split,
            tokenizer=name,
            vocab_size=size,
            do_lower=lower,
            max_bytes=params.optional_integer("embedded_bytes", minimum=1),
        )
        return _opened(folder, _SOURCES[text])
    if len(paths) == 1 and TokenShards.is_one(paths[0]):
        return _opened(paths[0], str(paths[0]))
    split_folder = "train" if params.split == "train" else "eval"
    if len(paths) == 1 and TokenShards.is_one(paths[0] / split_folder):
        return _opened(paths[0] / split_folder, str(paths[0] / split_folder))
    return _opened(_tokenized(params, paths, name, size, lower), ", ".join(map(str, paths)))


def _opened(folder: Path, source: str) -> tuple[TokenShards, Tokenizer, str]:
    shards = TokenShards(folder)
    tokenizer = load_tokenizer(folder)
    return shards, tokenizer, f"{shards.num_tokens:,} tokens of {source}"


def _tokenized(params: InputParams, paths: list[Path], name: str, size: int, lower: bool) -> Path:
    """Plain text, tokenized once. A trained tokenizer would be another for each split."""
    if name in ("bpe", "wordpiece") and params.split != "train":
        raise DataError(
            f"evaluation text needs the tokenizer that training used, not a new {name}",
            where=params.where("data_dir"),
            allowed="vocab_file or tokenizer with a file, tokenizer: byte, or prepared tokens",
            hint="openwafer prepare text ... --eval_fraction 0.05, then data_dir: its folder",
        )
    files = text_files(paths)
    states: list[Any] = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    vocabulary = Path(name)
    if vocabulary.is_file():
        states.append((name, vocabulary.stat().st_mtime_ns))

    def make(folder: Path) -> None:
        _log.info("tokenizing %d files with %s", len(files), name)
        tokenize_text(files, folder, tokenizer=name, vocab_size=size, do_lower=lower)

    return cached_folder("text", (1, states, name, size, lower), make)
