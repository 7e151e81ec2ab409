"""A checkpoint in one file, or in several of bounded size.

Decides which tensors go to which file, how the files find each other, and when a checkpoint of
several is whole. Does not decide how one file is written and read (checkpoint_file.py).

`checkpoint_8.mdl` then holds everything but the large tensors, and where these are:
`checkpoint_8.mdl.<id>.1-of-3` and so on. The id is new with every save. The shards are written
first and `checkpoint_8.mdl` last, so that at every moment the name stands for a whole checkpoint,
also where one of the same step was there before.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from openwafer.train.checkpoint_archive import num_bytes_of, storage_key
from openwafer.train.checkpoint_file import (
    DamagedCheckpointError,
    read_file,
    verify_file,
    write_file,
)

__all__ = [
    "is_orphan",
    "read_checkpoint",
    "remove_checkpoint",
    "verify_checkpoint",
    "write_checkpoint",
]

_SHARDS = "shards"
"""Entry of the first file: the names of the others."""

_PLACE = "in shard"
"""Key of what stands in the first file for a tensor: {_PLACE: [number of the file, entry]}."""

_SHARD_NAME = re.compile(r"(?P<first>.+\.mdl)\.[0-9a-f]{8}\.\d+-of-\d+")

_SMALL_BYTES = 64 * 1024
"""Tensors below this stay in the first file."""


def write_checkpoint(
    path: Path, contents: Mapping[str, Any], *, shard_bytes: int | None = None
) -> None:
    """Write `contents`, atomically and durably; no file is larger than `shard_bytes` by more than
    one tensor and the small entries (None: one file).

    Raises:
        CheckpointError: too little room, or the file system refused. What was at `path` is
            untouched and whole.
    """
    names: list[str] = []
    if shard_bytes is None or num_bytes_of(contents) <= shard_bytes:
        write_file(path, contents)
    else:
        names = _write_sharded(path, contents, shard_bytes)
    for stale in _shards_beside(path):
        if stale.name not in names:
            stale.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents; large tensors are read-only views of the files.

    Raises:
        DamagedCheckpointError: one of its files is damaged or missing.
        CheckpointError: there is none, or it could run code when read.
    """
    contents = read_file(path)
    names = cast("list[str] | None", contents.pop(_SHARDS, None))
    if names is None:
        return contents
    files = [_read_shard(path, str(name)) for name in names]

    def tensor_of(value: object) -> object:
        if not _is_place(value):
            return value
        number, entry = cast("dict[str, tuple[int, str]]", value)[_PLACE]
        return files[number][entry]

    return cast("dict[str, Any]", pytree.tree_map(tensor_of, contents, is_leaf=_is_place))


def verify_checkpoint(path: Path) -> None:
    """Check every byte of all its files, loading no tensor.

    Raises:
        DamagedCheckpointError: one of its files is damaged or missing.
    """
    verify_file(path)
    if _shards_beside(path):
        read_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """The first file first: without it the others are no checkpoint.

    Raises:
        OSError: the file system refused.
    """
    path.unlink()
    for shard in _shards_beside(path):
        shard.unlink(missing_ok=True)


def is_orphan(path: Path) -> bool:
    """Whether it is a shard, or the unfinished file of one, whose first file was never written or
    is gone."""
    name = path.name.removeprefix(".").removesuffix(".tmp")
    match = _SHARD_NAME.fullmatch(name)
    return match is not None and not path.with_name(match["first"]).exists()


class _Shards:
    """Groups tensors, in their order, into files of a size."""

    def __init__(self, shard_bytes: int) -> None:
        self._limit = shard_bytes
        self._group_of: dict[int, int] = {}
        self.groups: list[dict[str, torch.Tensor]] = []
        self._bytes = 0

    def place(self, value: object) -> object:
        """What stands in the first file for a value. Tensors that share memory go together."""
        if not isinstance(value, torch.Tensor) or num_bytes_of(value) < _SMALL_BYTES:
            return value
        storage = storage_key(value)
        if storage not in self._group_of:
            num_bytes = num_bytes_of(value)
            if not self.groups or self._bytes + num_bytes > self._limit:
                self.groups.append({})
                self._bytes = 0
            self._bytes += num_bytes
            self._group_of[storage] = len(self.groups) - 1
        number = self._group_of[storage]
        entry = str(len(self.groups[number]))
        self.groups[number][entry] = value
        return {_PLACE: [number, entry]}


def _write_sharded(path: Path, contents: Mapping[str, Any], shard_bytes: int) -> list[str]:
    """The names of the shards."""
    shards = _Shards(shard_bytes)
    outline = cast("dict[str, Any]", pytree.tree_map(shards.place, dict(contents)))
    identity, count = secrets.token_hex(4), len(shards.groups)
    names = [f"{path.name}.{identity}.{n}-of-{count}" for n in range(1, count + 1)]
    try:
        for name, group in zip(names, shards.groups, strict=True):
            write_file(path.with_name(name), group)
        write_file(path, {**outline, _SHARDS: names})
    except BaseException:
        for name in names:
            path.with_name(name).unlink(missing_ok=True)
        raise
    return names


def _read_shard(first: Path, name: str) -> dict[str, torch.Tensor]:
    if "/" in name or _SHARD_NAME.fullmatch(name) is None:  # no way out of the folder
        raise _damaged(first, f"`{name}` is no name of a shard")
    path = first.with_name(name)
    if not path.is_file():
        raise _damaged(first, f"its shard {name} is missing")
    return read_file(path)


def _shards_beside(path: Path) -> list[Path]:
    return [
        other
        for other in path.parent.iterdir()
        if (match := _SHARD_NAME.fullmatch(other.name)) is not None and match["first"] == path.name
    ]


def _is_place(value: object) -> bool:
    return isinstance(value, dict) and set(cast("dict[object, object]", value)) == {_PLACE}


def _damaged(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"the checkpoint is damaged: {why}",
        where=str(path),
        hint="a checkpoint of several files is copied with all of them; use an earlier one "
        "(`--checkpoint_path`), or delete this one",
    )
