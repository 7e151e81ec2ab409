"""From plain text to shards of tokens.

Decides how the work is cut into shards, which documents are held out, what is trained and when, and
what a second run finds done already. How a shard is stored is in token_shards.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np

from openwafer.data.keyed_random import derive_seed
from openwafer.data.text_files import (
    Cut,
    documents_of,
    documents_of_range,
    sentences_of,
    text_files,
)
from openwafer.data.token_shards import (
    ShardRecord,
    finished_shard,
    write_meta,
    write_shard,
)
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import ByteTokenizer, Tokenizer
from openwafer.errors import ConfigError
from openwafer.files import write_bytes

__all__ = ["PrepareResult", "tokenize_text"]

_log = logging.getLogger("openwafer")

# Training a subword tokenizer on more text changes it little and takes long.
_TRAINING_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareResult:
    """What was prepared, held-out documents included. num_bytes: of the text. folders: those of
    the shards, in or equal to out_dir."""

    out_dir: Path
    folders: tuple[Path, ...]
    num_documents: int
    num_tokens: int
    num_bytes: int
    vocab_size: int
    num_shards: int
    num_skipped_shards: int

    def __str__(self) -> str:
        per_token = self.num_bytes / max(1, self.num_tokens)
        kept = f", {self.num_skipped_shards} there already" if self.num_skipped_shards else ""
        return (
            f"{self.num_documents:,} documents, {self.num_bytes:,} bytes,"
            f" {self.num_tokens:,} tokens ({per_token:.2f} bytes each),"
            f" vocabulary {self.vocab_size:,}\n{self.num_shards} shards{kept}: {self.out_dir}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One shard's work; values that another process can be given."""

    number: int
    pieces: tuple[tuple[Path, int, int], ...]
    cut: Cut
    tokenizer_dir: Path
    folders: tuple[Path, ...]
    eval_fraction: float
    sentences: bool
    seed: int

    @property
    def name(self) -> str:
        return f"tokens-{self.number:05d}"


def tokenize_text(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    vocab_file: str | Path | None = None,
    do_lower: bool = False,
    documents: Cut = "files",
    eval_fraction: float = 0.0,
    shard_bytes: int = 64 << 20,
    num_workers: int = 1,
    seed: int = 1,
) -> PrepareResult:
    """Tokenize text files. What an earlier, equal call has finished is kept.

    Args:
        inputs: files, or folders of text files (.txt, .md, .py, .jsonl with "text", ...).
        out_dir: where to; with `eval_fraction` its folders `train` and `eval`.
        tokenizer: `bpe` or `wordpiece` (trained on this text), `byte`, or a tokenizer's path.
        vocab_size: of a trained tokenizer.
        vocab_file: a WordPiece or BPE vocabulary to use in place of training.
        documents: what a document is: a file, a block between empty lines, or a line.
        eval_fraction: share of the documents that is held out.
        shard_bytes: text in a shard; a longer file is cut at a line's end.
        num_workers: processes.

    Raises:
        ConfigError: an argument is wrong, or a library is missing.
        DataError: there is no text, or it cannot be read; with file and line.
    """
    _check(documents, eval_fraction, shard_bytes)
    files = text_files([Path(name).expanduser() for name in inputs])
    target = Path(out_dir).expanduser()
    name = str(vocab_file or tokenizer)
    key = _key(files, name, vocab_size, do_lower, documents, eval_fraction, shard_bytes, seed)
    folders = (target / "train", target / "eval") if eval_fraction else (target,)
    _start_over_unless(target, folders, key)
    chosen = _tokenizer(target, files, name, vocab_size, do_lower, documents)
    jobs = [
        _Job(
            number=number,
            pieces=pieces,
            cut=documents,
            tokenizer_dir=target,
            folders=folders,
            eval_fraction=eval_fraction,
            sentences=chosen.kind == "wordpiece",
            seed=seed,
        )
        for number, pieces in enumerate(_pieces(files, shard_bytes, documents))
    ]
    skipped = sum(_finished(job) is not None for job in jobs) * len(folders)
    records = _run(jobs, num_workers)
    for index, folder in enumerate(folders):
        _finish(folder, chosen, [job[index] for job in records], len(files))
    return _result(target, folders, [record for job in records for record in job], chosen, skipped)


def _finish(
    folder: Path, tokenizer: Tokenizer, records: Sequence[ShardRecord], num_files: int
) -> None:
    """Declare a folder whole, with its tokenizer in it."""
    if not (folder / "tokenizer.json").is_file():
        _save(tokenizer, folder)
    write_meta(
        folder,
        records,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.kind,
        more={"sentences": tokenizer.kind == "wordpiece", "files": num_files},
    )


def _result(
    target: Path,
    folders: tuple[Path, ...],
    records: Sequence[ShardRecord],
    tokenizer: Tokenizer,
    num_skipped: int,
) -> PrepareResult:
    return PrepareResult(
        out_dir=target,
        folders=folders,
        num_documents=sum(record.num_documents for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_bytes=sum(record.num_bytes for record in records),
        vocab_size=tokenizer.vocab_size,
        num_shards=len(records),
        num_skipped_shards=num_skipped,
    )


def _check(documents: str, eval_fraction: float, shard_bytes: int) -> None:
    if documents not in get_args(Cut):
        raise ConfigError(f"`documents` is {documents!r}", allowed=", ".join(get_args(Cut)))
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"`eval_fraction` is {eval_fraction}", allowed="from 0 to below 1")
    if shard_bytes < 1:
        raise ConfigError(f"`shard_bytes` is {shard_bytes}", allowed="at least 1")


def _key(files: Sequence[Path], *arguments: object) -> str:
    """What decides the shards' content: the files as they are now, and the arguments."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    vocabularies = [
        hashlib.sha256(Path(str(value)).read_bytes()).hexdigest()
        for value in arguments
        if isinstance(value, (str, Path)) and Path(value).is_file()
    ]
    text = json.dumps([states, [str(value) for value in arguments], vocabularies])
    return hashlib.sha256(text.encode()).hexdigest()


def _start_over_unless(target: Path, folders: Sequence[Path], key: str) -> None:
    """Keep what is there only if it was made from the same files in the same way."""
    note = target / "prepare.json"
    same = note.is_file() and key in note.read_text(encoding="utf-8")
    for folder in (target, *folders):
        folder.mkdir(parents=True, exist_ok=True)
        if not same:
            written = ("tokens-*", "examples-*", "pairs-*", "meta.json", "tokenizer.json")
            for old in [path for pattern in written for path in folder.glob(pattern)]:
                old.unlink(missing_ok=True)
    if not same:
        write_bytes(note, json.dumps({"key": key}).encode())


def _tokenizer(
    target: Path, files: Sequence[Path], name: str, vocab_size: int, do_lower: bool, cut: Cut
) -> Tokenizer:
    """The tokenizer of an earlier run, or the one asked for, saved at its whole."""
    if (target / "tokenizer.json").is_file():
        return load_tokenizer(target)
    if name == "byte":
        chosen: Tokenizer = ByteTokenizer(do_lower=do_lower)
    elif name in ("bpe", "wordpiece"):
        from openwafer.data import subwords

        texts = _training_texts(files, cut)
        if name == "bpe":
            chosen = subwords.train_bpe(texts, vocab_size)
        else:
            chosen = subwords.train_wordpiece(texts, vocab_size, do_lower=do_lower)
    else:
        chosen = load_tokenizer(name, do_lower=do_lower)
    _save(chosen, target)
    return chosen


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """The whole file or none of it: a later run trusts what it finds."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as temporary:
        tokenizer.save(Path(temporary))
        write_bytes(folder / "tokenizer.json", (Path(temporary) / "tokenizer.json").read_bytes())


def _training_texts(files: Sequence[Path], cut: Cut) -> Iterator[str]:
    """Documents from evenly spaced files, as many as fit."""
    total = sum(path.stat().st_size for path in files)
    step = max(1, round(total / _TRAINING_BYTES))
    size = 0
    for path in islice(files, 0, None, step):
        for document in documents_of(path, cut):
            yield document
            size += len(document)
            if size > _TRAINING_BYTES:
                return


def _pieces(
    files: Sequence[Path], shard_bytes: int, cut: Cut
) -> Iterator[tuple[tuple[Path, int, int], ...]]:
    """Byte ranges of files in groups of about `shard_bytes`; a whole file is (path, 0, -1)."""
    group: list[tuple[Path, int, int]] = []
    size = 0
    for path in files:
        num_bytes = path.stat().st_size
        if num_bytes > shard_bytes and path.suffix != ".jsonl":
            for start in range(0, num_bytes, shard_bytes):
                yield ((path, start, min(start + shard_bytes, num_bytes)),)
            continue
        if group and size + num_bytes > shard_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append((path, 0, -1))
        size += num_bytes
    if group:
        yield tuple(group)


def _run(jobs: Sequence[_Job], num_workers: int) -> list[tuple[ShardRecord, ...]]:
    if num_workers <= 1 or len(jobs) == 1:
        return [_run_job(job) for job in jobs]
    # The tokenizers library has threads, which a forked process would be without.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context) as pool:
        return list(pool.map(_run_job, jobs))


def _finished(job: _Job) -> tuple[ShardRecord, ...] | None:
    """The records of a job that an earlier run finished, whole in each of its folders."""
    records = [finished_shard(folder, job.name) for folder in job.folders]
    return tuple(record for record in records if record) if all(records) else None


def _run_job(job: _Job) -> tuple[ShardRecord, ...]:
    finished = _finished(job)
    if finished is not None:
        return finished
    tokenizer = load_tokenizer(job.tokenizer_dir)
    kept: list[list[list[np.ndarray[tuple[int], np.dtype[np.int32]]]]] = [[] for _ in job.folders]
    num_bytes = [0] * len(job.folders)
    for path, start, end in job.pieces:
        whole = end < 0
        found = (
            documents_of(path, job.cut) if whole else documents_of_range(path, start, end, job.cut)
        )
        for number, document in enumerate(found):
            share = derive_seed(job.seed, path.name, start, number) / 2**64
            split = int(share < job.eval_fraction)
            kept[split].append(_encode(tokenizer, document, sentences=job.sentences))
            num_bytes[split] += len(document.encode("utf-8", "replace"))
    return tuple(
        write_shard(
            folder,
            job.name,
            documents=kept[index],
            vocab_size=tokenizer.vocab_size,
            num_bytes=num_bytes[index],
        )
        for index, folder in enumerate(job.folders)
    )


def _encode(
    tokenizer: Tokenizer, document: str, *, sentences: bool
) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """A document's sentences; or the whole document and the sign of its end, for packing."""
    if sentences:
        return [ids for ids in tokenizer.encode_many(sentences_of(document)) if len(ids)]
    end = np.array([tokenizer.need("eos")], dtype=np.int32)
    return [np.concatenate([tokenizer.encode(document), end])]
