"""Which tokenizer a name or a file means.

Does not decide what a tokenizer does: tokenizers.py and, for those of the tokenizers library, which
is only loaded for them, subwords.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from openwafer.data.tokenizers import ByteTokenizer, Tokenizer, WordTokenizer, read_vocab
from openwafer.errors import ConfigError, DataError

__all__ = ["load_tokenizer"]


def load_tokenizer(name_or_path: str | Path, *, do_lower: bool = False) -> Tokenizer:
    """`byte`; `words:FILE` for text that is tokenized already; a folder or file that `save` or the
    tokenizers library wrote (tokenizer.json); a WordPiece vocabulary (one token a line, with
    [UNK]); or a byte-level BPE vocabulary (.json with its merges beside it).

    Raises:
        ConfigError: there is no such file, or the tokenizers library is needed and missing.
        DataError: the file is not what its name says.
    """
    if str(name_or_path) == "byte":
        return ByteTokenizer(do_lower=do_lower)
    if str(name_or_path).startswith("words:"):
        words = read_vocab(Path(str(name_or_path).removeprefix("words:")).expanduser())
        return WordTokenizer(words, do_lower=do_lower)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"there is no tokenizer {name_or_path}",
            where=str(path),
            allowed="byte, a tokenizer.json, a vocabulary file, or a folder with one",
        )
    if path.suffix != ".json":
        from openwafer.data.subwords import wordpiece_from_vocab

        return wordpiece_from_vocab(read_vocab(path), do_lower=do_lower)
    return _from_json(path, do_lower=do_lower)


def _from_json(path: Path, *, do_lower: bool) -> Tokenizer:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"not a tokenizer file: {error}", where=str(path)) from error
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "byte":
        return ByteTokenizer(do_lower=bool(content.get("do_lower")) or do_lower)
    if kind == "words":
        return WordTokenizer(content["words"], do_lower=bool(content.get("do_lower")) or do_lower)
    from openwafer.data.subwords import bpe_from_files, from_tokenizer_json

    if isinstance(content, dict) and "model" in content:
        return from_tokenizer_json(path)
    return bpe_from_files(path)
