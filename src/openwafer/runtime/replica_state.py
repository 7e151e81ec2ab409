"""The state of several processes, each with a part of it and none with the whole.

Decides what travels between rank 0, which saves and loads, and the others. Saving: rank 0 learns
what each of them has, and asks for one tensor when it writes that one. Loading: each looks for its
part in the checkpoint's file itself; one that does not see the file is sent its part. Does not
decide what a checkpoint's file is like (train/checkpoint_file.py) or who keeps what
(stores/shared_store.py).

A tensor is told as {"tensor": [dtype, shape, stride, what]}, `what` being, for
    a state that is saved     its number, to be asked for; or, if it is small, its bytes
    a state that is loaded    [number of the file, first byte]; or the tensor itself
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openwafer.runtime.elsewhere import stand_in
from openwafer.runtime.executor import ModelState
from openwafer.runtime.mapped_file import FileStamp, MappedFile, place_of
from openwafer.runtime.process_group import ComputeGroup

__all__ = ["LentState", "ask_for_state", "read_state", "sees_files", "send_state"]

_log = logging.getLogger("openwafer")

_SMALL_BYTES = 4096
"""Tensors up to this are told at once: asking for one would take longer."""

Entries = dict[str, dict[str, Any]]
"""By name: a weight's optimizer state, by key."""


class LentState:
    """Of a process other than 0: its part of the state, from when it was asked about to the next
    step."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def told(self, own: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The answer to {"do": "state"}; `own` has "weights" and "optimizer" by name."""
        self.forget()
        optimizer = own["optimizer"].items()
        return {
            "weights": {name: self._told(value) for name, value in own["weights"].items()},
            "optimizer": {n: {k: self._told(v) for k, v in e.items()} for n, e in optimizer},
        }

    def _told(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.detach()
        outline = tensor if _is_alone(tensor) else torch.empty(tensor.shape, device="meta")
        told = [_name_of(tensor.dtype), list(tensor.shape), list(outline.stride())]
        if tensor.nbytes <= _SMALL_BYTES:
            return {"tensor": [*told, _bytes(tensor)]}
        self._tensors.append(tensor)
        return {"tensor": [*told, len(self._tensors) - 1]}

    def tensor(self, number: int) -> torch.Tensor:
        """The answer to {"do": "tensor"}: its bytes, as they are in the store."""
        return _bytes(self._tensors[number])

    def forget(self) -> None:
        self._tensors = []


def _is_alone(tensor: torch.Tensor) -> bool:
    """Whether its elements are all that is in its storage."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """In the order in which they are in memory; of a view, in the order of its elements."""
    if not _is_alone(tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def ask_for_state(group: ComputeGroup, rank: int) -> dict[str, Any]:
    """What `rank` has: "weights" by name and "optimizer" by name and key. Of large tensors only
    stand-ins, which stay good until the next step.

    Raises:
        LaunchError: the process is gone; of a stand-in too, when it is brought.
    """
    group.send_tree({"do": "state"}, rank)
    told = group.receive_tree(rank)
    bring = partial(_bring, group, rank)

    def known(value: Any) -> Any:
        return _stood_in(value["tensor"], bring) if _is_told(value) else value

    return {
        "weights": {name: known(value) for name, value in told["weights"].items()},
        "optimizer": {n: {k: known(v) for k, v in e.items()} for n, e in told["optimizer"].items()},
    }


def _bring(group: ComputeGroup, rank: int, number: int) -> torch.Tensor:
    group.send_tree({"do": "tensor", "number": number}, rank)
    return group.receive_tree(rank)


def _stood_in(told: list[Any], bring: Callable[[int], torch.Tensor]) -> torch.Tensor:
    name, shape, stride, what = told
    dtype = getattr(torch, name)
    if isinstance(what, torch.Tensor):
        return what.view(dtype).as_strided(shape, stride)
    return stand_in(dtype, shape, stride, partial(bring, what))


def send_state(
    group: ComputeGroup, state: ModelState, buffers: Collection[str], *, weights_only: bool
) -> None:
    """From rank 0: every other process takes over its part, from the file where it can.

    Args:
        buffers: names in `state.model` that concern all.

    Raises:
        LaunchError: a process is gone.
    """
    optimizer = {} if weights_only else state.optimizer
    files = _files_of(state.model, optimizer)
    blind: list[int] = []
    for rank in range(1, group.size):
        group.send_tree({"do": "look", "files": [asdict(one) for one in files]}, rank)
        answer = group.receive_tree(rank)
        if not answer["sees"]:
            blind.append(rank)
        seen = files if answer["sees"] else []
        names = {*answer["names"]}
        wanted = names.union(buffers)
        part = {
            "model": {n: _located(v, seen) for n, v in state.model.items() if n in wanted},
            "optimizer": {
                n: {k: _located(v, seen) for k, v in entries.items()}
                for n, entries in optimizer.items()
                if n in names
            },
            "loss_scale": state.loss_scale,
        }
        message = {"do": "load", "state": part, "weights_only": weights_only}
        group.send_tree({**message, "files": [one.path for one in seen]}, rank)
    if blind:
        _log.warning(
            "processes %s do not see %s: their parts are sent to them, and are there twice while "
            "they load; a file system that all nodes share needs no more memory",
            ", ".join(map(str, blind)),
            ", ".join(one.path for one in files),
        )


def _files_of(model: Mapping[str, torch.Tensor], optimizer: Entries) -> list[FileStamp]:
    values = [*model.values(), *(v for entries in optimizer.values() for v in entries.values())]
    places = [place_of(value) for value in values if isinstance(value, torch.Tensor)]
    return list(dict.fromkeys(place[0] for place in places if place is not None))


def _located(value: Any, files: list[FileStamp]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    place = place_of(value)
    what: Any = value
    if place is not None and place[0] in files:
        what = [files.index(place[0]), place[1]]
    return {"tensor": [_name_of(value.dtype), list(value.shape), list(value.stride()), what]}


def sees_files(files: list[dict[str, Any]]) -> bool:
    """Whether this process can read the files that {"do": "look"} names."""
    return all(FileStamp(**one).is_seen() for one in files)


def read_state(message: Mapping[str, Any]) -> ModelState:
    """What {"do": "load"} says, as views of the files or as what was sent.

    Raises:
        OSError: a file is gone since it was seen.
    """
    files = [MappedFile(Path(path)) for path in message["files"]]

    def found(value: Any) -> Any:
        return _found(value["tensor"], files) if _is_told(value) else value

    state = message["state"]
    return ModelState(
        model={name: found(value) for name, value in state["model"].items()},
        optimizer={n: {k: found(v) for k, v in e.items()} for n, e in state["optimizer"].items()},
        loss_scale=state["loss_scale"],
    )


def _found(told: list[Any], files: list[MappedFile]) -> torch.Tensor:
    name, shape, stride, what = told
    if isinstance(what, torch.Tensor):
        return what
    number, start = what
    dtype = getattr(torch, name)
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    flat = files[number].view(start, extent * dtype.itemsize).view(dtype)
    return flat.as_strided(shape, stride)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_told(value: Any) -> bool:
    return isinstance(value, dict)
