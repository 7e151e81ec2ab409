"""What a checkpoint holds, and whether it fits a model.

Decides the entries of the file, how they become a state to go on from, and what to say where the
model is another. Does not decide how a file is written (checkpoint_file.py) or which one is used
(checkpoint_dir.py).

Entries (those of release 1.6 first; plain torch programs can read and write the first four):
    model           the state_dict
    optimizer       a torch optimizer's state_dict
    lr_scheduler    {"last_epoch", "_step_count", "_last_lr"}, as torch's schedulers save it
    global_step     optimizer steps done
    amp             state of the loss scaler, where there is one
    rng             {"seed", and the states of the process's generators}
    data_position   {"epoch", "batch"}: the batch to be read next
    openwafer       {"format", "version", "fingerprint", "origin_step", "origin_epoch",
                     "started_from"}
A bare state_dict is taken as "model" alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch

from openwafer.errors import CheckpointError, OpenWaferError, nearest
from openwafer.runtime.executor import ModelState
from openwafer.train.position import Progress

__all__ = [
    "Checkpoint",
    "Mismatch",
    "OptimizerCodec",
    "compare_models",
    "contents_of",
    "from_contents",
    "require_fit",
    "started_from",
]

_log = logging.getLogger("openwafer")

FORMAT = 1
"""Raised when the meaning of an entry changes; a file with a higher number is refused."""

MAX_NAMED = 8
"""Names listed per kind of mismatch before "and N more"."""

OptimizerState = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerCodec:
    """How the optimizer state of an executor (by parameter name) becomes the state_dict of a torch
    optimizer and back, so that checkpoints can be exchanged with plain torch programs."""

    to_torch: Callable[[OptimizerState], dict[str, Any]]
    from_torch: Callable[[dict[str, Any]], OptimizerState]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that is needed to go on bit for bit.

    learning_rate: the one of the next step. random_state: see random_state.py; empty where the file
    has none. started_from: the file given by `--checkpoint_path`, or empty. has_optimizer and
    has_data_position: False where the file lacks that part.
    """

    state: ModelState
    progress: Progress
    learning_rate: float = 0.0
    random_state: Mapping[str, Any] = field(default_factory=dict[str, Any])
    started_from: str = ""
    has_optimizer: bool = True
    has_data_position: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """How the tensors of a checkpoint differ from those of the model."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict[str, str])

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        parts = (
            ("missing from the checkpoint", self.missing),
            ("not in the model", self.unexpected),
            ("of another shape", self.wrong_shape),
        )
        return "; ".join(f"{what}: {self._listed(names)}" for what, names in parts if names)

    def _listed(self, names: tuple[str, ...]) -> str:
        shown = [name + self.hints.get(name, "") for name in names[:MAX_NAMED]]
        more = len(names) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def contents_of(checkpoint: Checkpoint, codec: OptimizerCodec) -> dict[str, Any]:
    """The entries of the file, in the order of the module header."""
    progress, state = checkpoint.progress, checkpoint.state
    contents: dict[str, Any] = {
        "model": state.model,
        "optimizer": codec.to_torch(state.optimizer),
        "lr_scheduler": {
            "last_epoch": progress.global_step,
            "_step_count": progress.global_step + 1,
            "_last_lr": [checkpoint.learning_rate],
        },
        "global_step": progress.global_step,
        "rng": dict(checkpoint.random_state),
        "data_position": {"epoch": progress.epoch, "batch": progress.batch},
        "openwafer": {
            "format": FORMAT,
            "version": _version(),
            "fingerprint": fingerprint(state.model),
            "origin_step": progress.origin_step,
            "origin_epoch": progress.origin_epoch,
            "started_from": checkpoint.started_from,
        },
    }
    if state.loss_scale:
        contents["amp"] = dict(state.loss_scale)
    return contents


def from_contents(
    contents: Mapping[str, Any], codec: OptimizerCodec | None, *, where: str
) -> Checkpoint:
    """The checkpoint in the entries of a file; `where` names the file in errors.

    Without a codec the optimizer state is left out.

    Raises:
        CheckpointError: no weights, a newer format, or an optimizer state of another optimizer.
    """
    if "model" not in contents:
        contents = _bare_state_dict(contents, where)
    own = cast("Mapping[str, Any]", contents.get("openwafer") or {})
    if int(own.get("format", FORMAT)) > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {own['format']}, this release knows {FORMAT}",
            where=where,
            hint=f"it was written by openwafer {own.get('version', '?')}: update",
        )
    model = cast("Mapping[str, Any]", contents["model"])
    return Checkpoint(
        state=ModelState(
            model={name: v for name, v in model.items() if isinstance(v, torch.Tensor)},
            optimizer=_optimizer_state(contents.get("optimizer"), codec, where),
            loss_scale=dict(contents.get("amp") or {}) if own else {},
        ),
        progress=_progress(contents, own),
        random_state=dict(contents.get("rng") or {}),
        started_from=started_from(contents),
        has_optimizer=bool(contents.get("optimizer")),
        has_data_position="data_position" in contents,
    )


def started_from(contents: Mapping[str, Any]) -> str:
    """The `--checkpoint_path` of the run that wrote these entries, or an empty string."""
    return str((contents.get("openwafer") or {}).get("started_from", ""))


def fingerprint(model: Mapping[str, torch.Tensor]) -> str:
    """A hash of the names, shapes and dtypes of a model's tensors (not of their values)."""
    digest = hashlib.sha256()
    for name in sorted(model):
        tensor = model[name]
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\n".encode())
    return digest.hexdigest()


def compare_models(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]
) -> Mismatch:
    """Compare the shapes that a model expects (by state_dict name) with the tensors of a file."""
    unexpected = tuple(name for name in found if name not in expected)
    missing = tuple(name for name in expected if name not in found)
    hints = {name: hint for name in missing if (hint := _hint(name, unexpected))}
    wrong: list[str] = []
    for name, shape in expected.items():
        if name in found and tuple(found[name].shape) != tuple(shape):
            wrong.append(name)
            hints[name] = f" ({_shape(found[name].shape)} in the checkpoint, not {_shape(shape)})"
    return Mismatch(missing=missing, unexpected=unexpected, wrong_shape=tuple(wrong), hints=hints)


def require_fit(
    expected: Mapping[str, tuple[int, ...]], model: Mapping[str, torch.Tensor], *, where: str
) -> None:
    """Raise CheckpointError naming every kind of difference, unless `model` fits exactly."""
    mismatch = compare_models(expected, model)
    if mismatch:
        raise CheckpointError(
            f"the checkpoint does not fit the model; {mismatch}",
            where=where,
            allowed=f"exactly the {len(expected)} tensors of the model, in their shapes",
            hint="use the parameters it was trained with, another `--model_dir`, or "
            "`--is_pretrained_checkpoint` to take over matching weights only",
        )


def _hint(name: str, candidates: tuple[str, ...]) -> str:
    hint = nearest(name, candidates)
    return f" ({hint})" if hint else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _version() -> str:
    try:
        return version("openwafer")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _bare_state_dict(contents: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    values = list(contents.values())
    if values and all(isinstance(value, torch.Tensor) for value in values):
        return {"model": contents}
    raise CheckpointError(
        "the file holds no weights",
        where=where,
        allowed='an entry "model", or a bare state_dict',
        hint=f"its entries are: {', '.join(map(str, list(contents)[:MAX_NAMED])) or 'none'}",
    )


def _optimizer_state(entry: object, codec: OptimizerCodec | None, where: str) -> OptimizerState:
    if not entry or codec is None:
        return {}
    try:
        return codec.from_torch(cast("dict[str, Any]", entry))
    except OpenWaferError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"its optimizer state is of another optimizer or model ({type(error).__name__}: "
            f"{error})",
            where=where,
            hint="use the optimizer it was trained with, or `--is_pretrained_checkpoint` to take "
            "over the weights only",
        ) from error


def _progress(contents: Mapping[str, Any], own: Mapping[str, Any]) -> Progress:
    step = int(contents.get("global_step", 0))
    position = cast("Mapping[str, Any]", contents.get("data_position") or {})
    return Progress(
        global_step=step,
        epoch=int(position.get("epoch", 0)),
        batch=int(position.get("batch", 0)),
        origin_step=int(own.get("origin_step", step)),
        origin_epoch=int(own.get("origin_epoch", position.get("epoch", 0))),
    )
