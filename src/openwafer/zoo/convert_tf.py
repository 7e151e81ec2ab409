"""Checkpoints of the zoo between PyTorch and TensorFlow's `model.ckpt-<step>`, both ways.

Decides what is read and written. Does not decide which variable is which weight (tf/names.py), nor
which slot is which entry of an optimizer's state (tf/optimizer_state.py).

Converted are the weights, the batch statistics, the global step, and where the two have the same
optimizer its state and the loss scaler's, so that a run goes on in the other. The place in the data
is in neither: TensorFlow's runs find it by the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from openwafer.errors import CheckpointError
from openwafer.frontends.tf.checkpoint import CheckpointWriter, global_step_of, read_checkpoint
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.nodes import Array
from openwafer.train import checkpoint_shards
from openwafer.train.checkpoint_file import write_file
from openwafer.zoo.conversion import (
    ConversionResult,
    described,
    is_tensorflow,
    params_path,
    require_shape,
    weights_of_contents,
    write_params,
)
from openwafer.zoo.model import AnyModel
from openwafer.zoo.outline import outline
from openwafer.zoo.tf.names import counterparts, to_torch
from openwafer.zoo.tf.optimizer_state import (
    NoCounterpartError,
    loss_scale_variables,
    slot_variables,
    torch_entries,
)

__all__ = ["convert_tf"]


def convert_tf(
    source: Path, target: Path, model: str | None, params: Path | None
) -> ConversionResult:
    """Convert; `source`, `target` or neither may be a `.mdl` file.

    Raises:
        CheckpointError: the source cannot be read or is of another model; nothing is written.
        ConfigError: nothing says which model it is, or TensorFlow is not there.
    """
    family, config = described(source, model, params)
    twin, left_out = outline(family, config), ()
    if is_tensorflow(source):
        left_out, optimizer = _to_torch(source, target, twin)
    else:
        contents = checkpoint_shards.read_checkpoint(source)
        state = weights_of_contents(contents, source, family, config)
        optimizer = _to_tensorflow(contents, state, target, twin)
    written = params_path(target)
    write_params(written, family, config)
    return ConversionResult(
        target=target,
        family=family.name,
        num_tensors=len(counterparts(twin)),
        left_out=left_out,
        params=written,
        optimizer=optimizer or "with the optimizer's state",
        has_optimizer=not optimizer,
    )


def _to_torch(source: Path, target: Path, twin: AnyModel) -> tuple[tuple[str, ...], str]:
    """Write the file; gives the names of what TensorFlow's model has not, and why there is no state
    of an optimizer."""
    if target.is_dir() or target.suffix != ".mdl":
        raise CheckpointError(
            "a checkpoint is a file", where=str(target), allowed="a name that ends in .mdl"
        )
    expected = twin.state_dict(keep_vars=True)
    variables = counterparts(twin)
    # With the names: what is missing is said.
    values = read_checkpoint(str(source), [each.name for each in variables])
    values |= read_checkpoint(str(source))
    state = to_torch(twin, values)
    for name, tensor in state.items():
        require_shape(name, tensor, expected[name], source)
    ordered = {name: state[name] for name in expected if name in state}
    entries, reason = torch_entries(values, variables), ""
    if not entries:
        reason = "without the state of an optimizer: it begins anew"
    target.parent.mkdir(parents=True, exist_ok=True)
    step = global_step_of(values)
    own = {"origin_step": step}  # marks the file as one of ours
    write_file(target, {"model": ordered, "global_step": step, **entries, "openwafer": own})
    return tuple(name for name in expected if name not in state), reason


def _to_tensorflow(
    contents: Mapping[str, Any], state: Mapping[str, Tensor], target: Path, twin: AnyModel
) -> str:
    """Write the checkpoint; gives why there is no state of an optimizer in it."""
    step = int(target.name.rpartition("-")[2])
    values: dict[str, Array] = {
        each.name: each.to_tf(state[each.keys[0]]) for each in counterparts(twin)
    }
    values["global_step"] = np.asarray(step, dtype=np.int64)
    reason = ""
    try:
        values |= _optimizer_variables(contents, step, twin)
    except NoCounterpartError as error:
        reason = f"without the optimizer's state, which begins anew: {error}"
    graph = tf.Graph()
    with graph.as_default():
        for name, value in values.items():
            zeros = tf.compat.v1.zeros_initializer()
            tf.compat.v1.get_variable(name, value.shape, value.dtype, zeros)
    CheckpointWriter(target.parent, graph, keep_max=None).save(step, values)
    return reason


def _optimizer_variables(
    contents: Mapping[str, Any], step: int, twin: AnyModel
) -> dict[str, Array]:
    """Raises: NoCounterpartError: there are none for this step."""
    if not contents.get("optimizer"):
        raise NoCounterpartError("the source has none")
    at = int(contents.get("global_step", 0))
    if at != step:
        raise NoCounterpartError(f"it is of step {at}, and the target's name says {step}")
    slots = slot_variables(contents["optimizer"], counterparts(twin))
    return slots | loss_scale_variables(contents.get("amp") or {})
