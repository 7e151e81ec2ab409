"""What a run can write down for debugging: its first batches, and its modules' tensors.

Decides the two documented files, `streams.<ordinal>.npz` and `summaries/summaries.npz`. Does not
decide when a batch or a step happens (train/).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from openwafer.files import replacing
from openwafer.frontends.torch.capture import flatten_batch
from openwafer.runtime.executor import Batch
from openwafer.train.hooks import Hooks

__all__ = ["ModuleSummaries", "SavedStream"]


class SavedStream(Hooks):
    """Writes the first `num_batches` batches to `<folder>/streams.<ordinal>.npz`.

    Entries are `<batch number>/<path in the batch>`.
    """

    def __init__(self, folder: Path, num_batches: int, *, ordinal: int) -> None:
        self._path = folder / f"streams.{ordinal}.npz"
        self._num_batches = num_batches
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._seen = 0

    def _record(self, data: Batch) -> Batch:
        if self._seen < self._num_batches:
            for path, leaf in flatten_batch(data).items():
                if isinstance(leaf, torch.Tensor):
                    self._arrays[f"{self._seen}/{path}"] = _array(leaf)
            self._seen += 1
            if self._seen == self._num_batches:
                self._write()
        return data

    def on_train_batch_start(self, data: Batch) -> Batch:
        return self._record(data)

    def on_eval_batch_start(self, data: Batch) -> Batch:
        return self._record(data)

    def on_train_end(self, early_exit: bool) -> None:
        self._write_fewer()

    def on_eval_end(self, early_exit: bool) -> None:
        self._write_fewer()

    def _write_fewer(self) -> None:
        """Where the data have fewer batches than were asked for."""
        if 0 < self._seen < self._num_batches:
            self._write()

    def _write(self) -> None:
        _write_npz(self._path, self._arrays)


class ModuleSummaries(Hooks):
    """Writes every module's forward outputs and their gradients of the last step to
    `<model_dir>/summaries/summaries.npz`. Entries are `<module>/forward` and `<module>/backward`.

    Plain PyTorch runs only: in the compiled modes there are layers, not modules.
    """

    def __init__(self, model: nn.Module, model_dir: Path) -> None:
        self._path = model_dir / "summaries" / "summaries.npz"
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self._looking_at(name or "model"))

    def _looking_at(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
            for index, tensor in enumerate(tensors):
                suffix = f"{name}/{index}" if len(tensors) > 1 else name
                self._arrays[f"{suffix}/forward"] = _array(tensor)
                if tensor.requires_grad:
                    tensor.register_hook(self._keeping(f"{suffix}/backward"))

        return hook

    def _keeping(self, entry: str) -> Callable[[torch.Tensor], None]:
        def keep(gradient: torch.Tensor) -> None:
            self._arrays[entry] = _array(gradient)

        return keep

    def on_train_end(self, early_exit: bool) -> None:
        _write_npz(self._path, self._arrays)

    def on_eval_end(self, early_exit: bool) -> None:
        _write_npz(self._path, self._arrays)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A copy on the host; NumPy has no bfloat16, so that becomes float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.float()
    return tensor.numpy().copy()


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
