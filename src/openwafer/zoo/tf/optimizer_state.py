"""How the state of a PyTorch optimizer and the slot variables of TensorFlow's correspond.

Decides which optimizers have the same state in both, and what it is called there: those that
tf/optimizer.py trains with. Does not decide which variable is which weight (tf/names.py), nor how
files are read and written (convert_tf.py).

    PyTorch                        TensorFlow
    Adam, AdamW                    AdamWOptimizer
      exp_avg, exp_avg_sq            <variable>/AdamW, <variable>/AdamW_1
      step                           num_updates; none (infinite) without bias correction
    SGD                            MomentumOptimizer
      momentum_buffer                <variable>/Momentum
    RMSprop as_tensorflow          RMSPropOptimizer
      square_avg, momentum_buffer    <variable>/RMSProp, <variable>/RMSProp_1
    loss scaler                    CSDynamicLossScale
      scale, num_steps,              current_loss_scale, good_steps, overflow_steps
      num_overflows
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from openwafer.zoo.tf.names import Array, Counterpart

__all__ = ["NoCounterpartError", "loss_scale_variables", "slot_variables", "torch_entries"]

_COUNTER = "num_updates"


class NoCounterpartError(Exception):
    """TensorFlow's optimizers have no such state; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """name: in the names of TensorFlow's slots. entries: PyTorch's names, in their order.
    group: settings that a group of the kind has; not_group: and those that it has not."""

    name: str
    entries: tuple[str, ...]
    group: frozenset[str]
    not_group: frozenset[str] = frozenset()

    def slot(self, variable: str, entry: str) -> str:
        number = self.entries.index(entry)
        return f"{variable}/{self.name}" + (f"_{number}" if number else "")

    def has(self, group: Mapping[str, Any], entries: Iterable[str]) -> bool:
        return (
            set(entries) - {"step"} == set(self.entries)
            and self.group <= group.keys()
            and not self.not_group & group.keys()
        )


_KINDS = (
    # Lamb and RAdam keep entries of the same names, for other rules.
    _Kind(name="AdamW", entries=("exp_avg", "exp_avg_sq"), group=frozenset({"amsgrad"})),
    _Kind(name="Momentum", entries=("momentum_buffer",), group=frozenset({"nesterov"})),
    # PyTorch's own RMSprop has its epsilon, and its rate, elsewhere.
    _Kind(
        name="RMSProp",
        entries=("square_avg", "momentum_buffer"),
        group=frozenset({"alpha"}),
        not_group=frozenset({"foreach"}),
    ),
    _Kind(name="", entries=(), group=frozenset({"nesterov"})),
)


def slot_variables(
    optimizer: Mapping[str, Any], variables: Iterable[Counterpart]
) -> dict[str, Array]:
    """TensorFlow's slot variables for a checkpoint's `optimizer` entry.

    Args:
        optimizer: a torch optimizer's state_dict whose groups have `param_names`.
        variables: of the model.

    Raises:
        NoCounterpartError: the state is of another optimizer or of other parameters.
    """
    groups: list[Mapping[str, Any]] = optimizer["param_groups"]
    if not all("param_names" in group for group in groups):
        raise NoCounterpartError("the optimizer's state does not name its parameters")
    found: dict[str, Array] = {}
    of = {each.keys[0]: each for each in variables if each.trained}
    for group in groups:
        for name, index in zip(group["param_names"], group["params"], strict=True):
            entries = _without_none(optimizer["state"].get(index, {}))
            kind = next((kind for kind in _KINDS if kind.has(group, entries)), None)
            if kind is None or name not in of:
                raise NoCounterpartError(
                    f"the state of `{name}` ({', '.join(entries)}) has no counterpart in "
                    "TensorFlow's AdamW, momentum and RMSProp"
                )
            for entry in kind.entries:
                found[kind.slot(of[name].name, entry)] = of[name].to_tf(entries[entry])
            if kind.name == "AdamW" and math.isfinite(float(entries["step"])):
                found[_COUNTER] = np.asarray(int(entries["step"]), dtype=np.int64)
    return found


def _without_none(entries: Mapping[str, Any]) -> dict[str, Any]:
    """torch's SGD before its first step has a momentum of None."""
    return {key: value for key, value in entries.items() if value is not None}


def torch_entries(values: Mapping[str, Array], variables: Iterable[Counterpart]) -> dict[str, Any]:
    """What a checkpoint of PyTorch has besides weights and step: `optimizer` and, with a loss
    scale, `amp`. {} where there are no slots of a kind.

    The parameter groups have names alone: the settings are those of the run that goes on.

    Args:
        values: all variables of a checkpoint, by name.
        variables: of the model.
    """
    trained = [each for each in variables if each.trained]
    for kind in _KINDS:
        slots = [kind.slot(each.name, entry) for each in trained for entry in kind.entries]
        if not slots or not all(slot in values for slot in slots):
            continue
        group = {
            "params": list(range(len(trained))),
            "param_names": [each.keys[0] for each in trained],
        }
        state = {index: _entries(kind, each, values) for index, each in enumerate(trained)}
        found: dict[str, Any] = {"optimizer": {"state": state, "param_groups": [group]}}
        scale = {k: float(values[name]) for k, (name, _) in _SCALE.items() if name in values}
        return found | ({"amp": scale} if scale else {})
    return {}


def _entries(kind: _Kind, of: Counterpart, values: Mapping[str, Array]) -> dict[str, Any]:
    found: dict[str, Any] = {
        entry: of.to_torch(values[kind.slot(of.name, entry)]) for entry in kind.entries
    }
    if kind.name == "AdamW":
        found["step"] = torch.tensor(float(values.get(_COUNTER, math.inf)))
    return found


_SCALE = {
    "scale": ("current_loss_scale", np.float32),
    "num_steps": ("good_steps", np.int64),
    "num_overflows": ("overflow_steps", np.int64),
}


def loss_scale_variables(state: Mapping[str, float]) -> dict[str, Array]:
    """The variables of CSDynamicLossScale for the loss scaler's state; {} for none."""
    return {
        name: np.asarray(state[key], dtype=dtype)
        for key, (name, dtype) in _SCALE.items()
        if key in state
    }
