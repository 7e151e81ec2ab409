"""A weight store on disk: one preallocated file per shard, weights first, then optimizer state.

Decides the layout of a record and that a shard passes through one staging buffer on its way to the
optimizer and back, so that host memory holds one shard's state at a time. Does not decide when
shards move (weight_streaming.py). A run's checkpoints are elsewhere: these files have no names once
they are open, and end with the process.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import PlanError
from openwafer.graph.program import TensorSpec
from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state
from openwafer.runtime.store import Shard, WeightStore

__all__ = ["DiskStore"]

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor of a record: of the weight at `position` in its shard, or of its optimizer state.

    `key` is empty for the weight itself. Positions, not names, so that copies share a layout.
    """

    position: int
    key: str
    spec: TensorSpec
    offset: int
    weight_decay: float


class _Staging:
    """A host buffer in the shape of one shard's record, with an optimizer over its weights.

    Shards of the same layout share one, so memory holds one record of each layout.
    """

    def __init__(
        self, shard: Shard, weights: Mapping[str, torch.Tensor], config: OptimizerConfig | None
    ) -> None:
        self.names = shard.names
        template = {name: weights[name].detach().clone() for name in shard.names}
        optimizer = self._optimizer_over(shard, template, config)
        self.entries, self.num_bytes = _lay_out(list(template.values()), optimizer)
        self.buffer = torch.zeros(self.num_bytes, dtype=torch.uint8)
        self.views = {(e.position, e.key): _view(self.buffer, e) for e in self.entries}
        for (position, key), view in self.views.items():
            weight = template[shard.names[position]]
            view.copy_(optimizer.state[weight][key] if key and optimizer else weight)
        held = {name: self.views[i, ""] for i, name in enumerate(shard.names)}
        self.optimizer = self._optimizer_over(shard, held, config)
        self._point_state_at_views()

    @staticmethod
    def _optimizer_over(
        shard: Shard, weights: Mapping[str, torch.Tensor], config: OptimizerConfig | None
    ) -> torch.optim.Optimizer | None:
        if config is None or not shard.trained:
            return None
        return build_optimizer(config, {name: weights[name] for name in shard.trained})

    def _point_state_at_views(self) -> None:
        """Make the optimizer work on the buffer; copy whatever it put elsewhere back into it."""
        for (position, key), view in self.views.items():
            if key:
                assert self.optimizer is not None
                state = self.optimizer.state[self.views[position, ""]]
                if state[key] is not view:
                    view.copy_(state[key])
                    state[key] = view

    def step(self, gradients: Mapping[int, torch.Tensor], learning_rate: float) -> None:
        """One optimizer step on the record in the buffer; `gradients` by position."""
        assert self.optimizer is not None
        for position, gradient in gradients.items():
            self.views[position, ""].grad = gradient
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        for position in gradients:
            self.views[position, ""].grad = None
        self._point_state_at_views()


class DiskStore(WeightStore):
    """Weights and optimizer state in files below `directory`, which must exist.

    Raises:
        PlanError: the folder does not exist, cannot be written or has too little room; later, a
            read or write that failed.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shards: Sequence[Shard],
        config: OptimizerConfig | None,
        directory: Path,
    ) -> None:
        if not directory.is_dir():
            raise PlanError(
                f"the weight store's folder {directory} does not exist",
                allowed="disk:DIR with an existing, writable folder",
                hint=f"mkdir -p {directory}, or --weight_store ram",
            )
        self._shards = tuple(shards)
        self._place_of = {
            name: (shard.index, position)
            for shard in shards
            for position, name in enumerate(shard.names)
        }
        self._directory = directory
        self._files: dict[int, int] = {}
        self._stagings: dict[int, _Staging] = {}
        try:
            self._create(weights, config)
        except OSError as error:
            self.close()
            raise _store_failed(error, directory) from error
        except BaseException:
            self.close()
            raise

    def _create(self, weights: Mapping[str, torch.Tensor], config: OptimizerConfig | None) -> None:
        by_layout: dict[tuple[_Entry, ...], _Staging] = {}
        for shard in self._shards:
            staging = _Staging(shard, weights, config)
            file, name = tempfile.mkstemp(prefix="openwafer-store-", dir=self._directory)
            self._files[shard.index] = file
            # Without a name it goes with the process, also with one that is killed.
            os.unlink(name)
            _preallocate(file, staging.num_bytes, self._directory)
            _write(file, staging.buffer, 0)
            self._stagings[shard.index] = by_layout.setdefault(staging.entries, staging)

    def fetch(self, names: Sequence[str]) -> list[torch.Tensor]:
        fetched: list[torch.Tensor] = []
        for name in names:
            index, position = self._place_of[name]
            entry = self._stagings[index].entries[position]
            tensor = torch.empty(entry.spec.shape, dtype=entry.spec.torch_dtype)
            self._read(index, _bytes_of(tensor), entry.offset)
            fetched.append(tensor)
        return fetched

    def update(
        self, shard: Shard, gradients: Mapping[str, torch.Tensor], learning_rate: float
    ) -> None:
        staging = self._load_record(shard)
        by_position = {self._place_of[name][1]: grad for name, grad in gradients.items()}
        staging.step(by_position, learning_rate)
        self._write_record(shard, staging)

    def _load_record(self, shard: Shard) -> _Staging:
        staging = self._stagings[shard.index]
        self._read(shard.index, staging.buffer, 0)
        return staging

    def _write_record(self, shard: Shard, staging: _Staging) -> None:
        try:
            _write(self._files[shard.index], staging.buffer, 0)
        except OSError as error:
            raise _store_failed(error, self._directory) from error

    def _read(self, index: int, target: torch.Tensor, offset: int) -> None:
        try:
            _read(self._files[index], target, offset)
        except OSError as error:
            raise _store_failed(error, self._directory) from error

    def weights(self) -> dict[str, torch.Tensor]:
        names = [name for shard in self._shards for name in shard.names]
        return dict(zip(names, self.fetch(names), strict=True))

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = {}
        for shard in self._shards:
            staging = self._load_record(shard)
            state.update((name, {}) for name in shard.trained)
            for (position, key), view in staging.views.items():
                if key:
                    state[shard.names[position]][key] = view.clone()
        return state

    def load(
        self, weights: Mapping[str, torch.Tensor], state: Mapping[str, Mapping[str, Any]]
    ) -> None:
        for shard in self._shards:
            staging = self._load_record(shard)
            for position, name in enumerate(shard.names):
                if name in weights:
                    staging.views[position, ""].copy_(weights[name])
            if state and staging.optimizer is not None:
                # The optimizer knows the weights by the names of the layout's first shard.
                known_as = dict(zip(shard.names, staging.names, strict=True))
                own = {known_as[name]: state.get(name, {}) for name in shard.trained}
                load_optimizer_state(staging.optimizer, list(own), own)
            self._write_record(shard, staging)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _lay_out(
    weights: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer | None
) -> tuple[tuple[_Entry, ...], int]:
    """Weights first and in order, so that a fetch reads one stretch; then the state of each."""
    decay = {
        weight: float(group.get("weight_decay", 0.0))
        for group in (optimizer.param_groups if optimizer else ())
        for weight in group["params"]
    }
    tensors = [(position, "", weight) for position, weight in enumerate(weights)]
    for position, weight in enumerate(weights):
        state = optimizer.state.get(weight, {}) if optimizer else {}
        for key, value in state.items():
            assert isinstance(value, torch.Tensor), f"optimizer state {key} is not a tensor"
            tensors.append((position, key, value))
    entries: list[_Entry] = []
    offset = 0
    for position, key, tensor in tensors:
        spec = TensorSpec.of(tensor)
        entries.append(
            _Entry(
                position=position,
                key=key,
                spec=spec,
                offset=offset,
                weight_decay=decay.get(weights[position], -1.0),
            )
        )
        offset += -(-spec.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return tuple(entries), offset


def _view(buffer: torch.Tensor, entry: _Entry) -> torch.Tensor:
    end = entry.offset + entry.spec.num_bytes
    return buffer[entry.offset : end].view(entry.spec.torch_dtype).view(entry.spec.shape)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _preallocate(file: int, num_bytes: int, directory: Path) -> None:
    """Take the space now, so that a full disk is an error before training and not during it."""
    try:
        if num_bytes:
            os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free_bytes = shutil.disk_usage(directory).free
        raise PlanError(
            f"no room for the weight store: {num_bytes:,} bytes more are needed",
            where=str(directory),
            allowed=f"{free_bytes:,} bytes are free there",
            hint="give --weight_store disk:DIR on a larger disk, or ram",
        ) from error


def _store_failed(error: OSError, directory: Path) -> PlanError:
    return PlanError(
        f"the weight store cannot be used: {error.strerror or error}",
        where=str(directory),
        hint="give --weight_store disk:DIR on another disk, or ram; go on from the last checkpoint",
    )


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor, without a copy."""
    array: Any = tensor.numpy()
    return memoryview(array) if tensor.numel() else memoryview(b"")


def _read(file: int, target: torch.Tensor, offset: int) -> None:
    view = _memory_of(target)
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the weight store's file is shorter than its record")
        done += count


def _write(file: int, source: torch.Tensor, offset: int) -> None:
    view = _memory_of(source)
    done = 0
    while done < len(view):
        done += os.pwritev(file, [view[done:]], offset + done)
