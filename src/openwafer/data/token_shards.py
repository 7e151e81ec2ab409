"""Tokenized text on disk: memory-mapped shards with a description beside them.

Decides the format, what makes it whole, and how a range of tokens is read. A folder holds

    meta.json                 format, version, dtype, vocab_size, tokenizer, the list of shards
    tokenizer.json            what `load_tokenizer(folder)` reads
    tokens-00000.bin          token numbers, little-endian uint16 or uint32, nothing else
    tokens-00000.documents    where each document begins, int64, and the number of tokens
    tokens-00000.sentences    the same for sentences (lines)

All shards read as one sequence. `meta.json` is written last: with it the folder is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.errors import DataError
from openwafer.files import write_bytes

__all__ = [
    "FORMAT",
    "ShardRecord",
    "TokenShards",
    "finished_shard",
    "write_meta",
    "write_shard",
]

FORMAT = "openwafer-tokens"
_VERSION = 1
_ENDINGS = ("bin", "documents", "sentences")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One shard: file is `tokens-00000`, without its endings."""

    file: str
    num_tokens: int
    num_documents: int
    num_sentences: int
    num_bytes: int


def token_dtype(vocab_size: int) -> str:
    """The NumPy name of the smallest type that holds all numbers below `vocab_size`."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def write_shard(
    folder: Path,
    name: str,
    *,
    documents: Sequence[Sequence[npt.NDArray[np.int32]]],
    vocab_size: int,
    num_bytes: int,
) -> ShardRecord:
    """Write the shard `name` from documents, each a list of sentences of token numbers.

    Its record goes to `<name>.json`, last: with it the shard is whole.
    """
    lengths = [[len(sentence) for sentence in document] for document in documents]
    sentence_lengths = np.array([n for document in lengths for n in document], dtype=np.int64)
    document_lengths = np.array([sum(document) for document in lengths], dtype=np.int64)
    flat = [sentence for document in documents for sentence in document]
    tokens = np.concatenate(flat) if flat else np.zeros(0, np.int32)
    write_bytes(folder / f"{name}.bin", tokens.astype(token_dtype(vocab_size)).tobytes())
    write_bytes(folder / f"{name}.documents", _starts(document_lengths).tobytes())
    write_bytes(folder / f"{name}.sentences", _starts(sentence_lengths).tobytes())
    record = ShardRecord(
        file=name,
        num_tokens=len(tokens),
        num_documents=len(documents),
        num_sentences=len(sentence_lengths),
        num_bytes=num_bytes,
    )
    write_bytes(folder / f"{name}.json", json.dumps(asdict(record)).encode())
    return record


def finished_shard(folder: Path, name: str) -> ShardRecord | None:
    """The record of a shard that is there with all its bytes; None for any other."""
    try:
        record = ShardRecord(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        sizes = [(folder / f"{name}.{of}").stat().st_size for of in _ENDINGS]
    except (OSError, ValueError, TypeError):
        return None
    whole = (8 * (record.num_documents + 1), 8 * (record.num_sentences + 1))
    right = sizes[0] in (2 * record.num_tokens, 4 * record.num_tokens)
    return record if right and (sizes[1], sizes[2]) == whole else None


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype("<i8")


def write_meta(
    folder: Path,
    records: Sequence[ShardRecord],
    *,
    vocab_size: int,
    tokenizer: str,
    more: Mapping[str, Any],
) -> None:
    """Declare the folder whole. `more` is written as it is, for people."""
    content = {
        "format": FORMAT,
        "version": _VERSION,
        "dtype": token_dtype(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "num_tokens": sum(record.num_tokens for record in records),
        "num_documents": sum(record.num_documents for record in records),
        "num_bytes": sum(record.num_bytes for record in records),
        "shards": [asdict(record) for record in records],
        **more,
    }
    write_bytes(folder / "meta.json", json.dumps(content, indent=1).encode())


class TokenShards:
    """The tokens of a folder as one sequence. Cheap to send to another process: it maps anew.

    Raises:
        DataError: the folder is not of this format, of another version, or a file is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = _read_meta(folder)
        self.vocab_size = int(meta["vocab_size"])
        self.num_bytes = int(meta["num_bytes"])
        self._dtype = np.dtype(str(meta["dtype"]))
        self._records = [ShardRecord(**record) for record in meta["shards"]]
        lengths = np.array([record.num_tokens for record in self._records], dtype=np.int64)
        self._ends = np.cumsum(lengths)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self._maps = [self._map(record) for record in self._records]

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether the folder claims to be one; nothing is checked."""
        meta = folder / "meta.json"
        return meta.is_file() and FORMAT in meta.read_text(encoding="utf-8", errors="replace")

    def _map(self, record: ShardRecord) -> npt.NDArray[Any]:
        path = self.folder / f"{record.file}.bin"
        size = path.stat().st_size if path.is_file() else -1
        if size != record.num_tokens * self._dtype.itemsize:
            raise DataError(
                f"the shard has {size} bytes" if size >= 0 else "the shard is missing",
                where=str(path),
                allowed=f"{record.num_tokens * self._dtype.itemsize} bytes",
                hint="run `openwafer prepare text` again: whole shards are kept",
            )
        if not record.num_tokens:
            return np.zeros(0, self._dtype)
        return np.memmap(path, dtype=self._dtype, mode="r")

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The tokens `start` to `start + count`, across shards."""
        out = np.empty(count, dtype=np.int64)
        self.read_into(out, start)
        return out

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Fill `out` with the tokens from `start` on."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(out):
            begin = int(self._ends[shard]) - len(self._maps[shard])
            part = self._maps[shard][start + filled - begin :][: len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def starts(self, of: str) -> npt.NDArray[np.int64]:
        """Where each of the `documents` or `sentences` begins, and the number of tokens.

        Raises:
            DataError: such a file is missing or cut short.
        """
        assert of in ("documents", "sentences")
        parts: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        offset = 0
        for record in self._records:
            path = self.folder / f"{record.file}.{of}"
            expected = record.num_documents if of == "documents" else record.num_sentences
            found = np.fromfile(path, dtype="<i8") if path.is_file() else np.zeros(0, np.int64)
            if len(found) != expected + 1:
                raise DataError(
                    f"{len(found)} starts of {of}", where=str(path), allowed=str(expected + 1)
                )
            parts.append(found[1:] + offset)
            offset += record.num_tokens
        return np.concatenate(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TokenShards.__init__(self, state["folder"])


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"not a folder of tokens: {error}",
            where=str(path),
            hint="`openwafer prepare text` writes one",
        ) from error
    if meta.get("format") != FORMAT or meta.get("version") != _VERSION:
        raise DataError(
            f"the tokens are of format {meta.get('format')}, version {meta.get('version')}",
            where=str(path),
            allowed=f"{FORMAT}, version {_VERSION}",
        )
    return meta
