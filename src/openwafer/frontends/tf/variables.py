"""Variables of a TensorFlow graph, and the same values as the runtime keeps them.

Decides which variable is a weight, a part of the optimizer's state, or something else that a
checkpoint carries along, and the first values of all of them. Does not decide how checkpoints are
written (checkpoint.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import ModelGraph, variables_of
from openwafer.frontends.tf.nodes import Array
from openwafer.frontends.tf.train_op import TrainOp
from openwafer.runtime.executor import ModelState

__all__ = ["initial_values", "model_state", "optimizer_lag", "tensors_of", "variable_values"]


def initial_values(model: ModelGraph) -> dict[str, Array]:
    """What the variables' initializers give, by name."""
    with model.graph.as_default():
        variables = variables_of(model.graph)
        reads = [variable.read_value() for variable in variables]
    on_cpu = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.compat.v1.Session(graph=model.graph, config=on_cpu) as session:
        session.run(model.initializer)
        values = session.run(reads)
    return {v.op.name: np.asarray(a) for v, a in zip(variables, values, strict=True)}


def tensors_of(values: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Torch tensors with copies of the values; types that torch does not have are left out."""
    return {
        name: torch.from_numpy(np.array(a)) for name, a in values.items() if a.dtype.kind != "O"
    }


def model_state(values: Mapping[str, Array], train_op: TrainOp | None, *, step: int) -> ModelState:
    """The state of an executor for these values of all variables."""
    optimizer: dict[str, dict[str, Any]] = {}
    num_updates = float(values[train_op.known.counter]) if _counts(train_op) else float(step)
    for weight, slots in train_op.slots.items() if train_op else ():
        held = {key: torch.from_numpy(np.array(values[name])) for key, name in slots.items()}
        optimizer[weight] = {"step": torch.tensor(num_updates), **held}
    scale: dict[str, float] = {}
    if train_op and train_op.loss_scale:
        # TensorFlow's own rule keeps no count of overflows.
        scale = {"num_overflows": 0.0}
        scale |= {key: float(values[name]) for key, name in train_op.loss_scale.items()}
    return ModelState(model=tensors_of(values), optimizer=optimizer, loss_scale=scale)


def variable_values(
    state: ModelState, before: Mapping[str, Array], train_op: TrainOp, *, step: int, lag: int = 0
) -> dict[str, Array]:
    """The values of all variables for an executor's state; `before` has those that no step changes.

    lag: see `optimizer_lag`.
    """
    values = dict(before)
    values |= {n: t.numpy() for n, t in state.model.items() if n in values}
    for weight, slots in train_op.slots.items():
        values |= {name: state.optimizer[weight][key].numpy() for key, name in slots.items()}
    for name, beta in zip(train_op.powers, train_op.known.powers, strict=True):
        values[name] = np.asarray(beta ** (step - lag + 1), dtype=np.float32)
    if _counts(train_op):
        num_updates = max(float(entries["step"]) for entries in state.optimizer.values())
        values[train_op.known.counter] = np.asarray(num_updates, dtype=np.int64)
    for key, name in train_op.loss_scale.items():
        values[name] = np.asarray(state.loss_scale[key], dtype=before[name].dtype)
    values["global_step"] = np.asarray(step, dtype=before["global_step"].dtype)
    return values


def _counts(train_op: TrainOp | None) -> TypeGuard[TrainOp]:
    return train_op is not None and bool(train_op.known.counter)


def optimizer_lag(values: Mapping[str, Array], train_op: TrainOp, *, step: int) -> int:
    """How many of `step` steps the optimizer has not seen: all, where it begins anew with the
    weights of another run. Adam's bias correction counts its own steps."""
    lags: list[int] = []
    for name, beta in zip(train_op.powers, train_op.known.powers, strict=True):
        power = float(values[name])
        if 0 < beta < 1 and power > 1e-30:
            lags.append(step - (round(math.log(power) / math.log(beta)) - 1))
    # The slower power says it best: the faster one runs out of digits first.
    return lags[-1] if lags else 0
