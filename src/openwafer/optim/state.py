"""Optimizer state by parameter name, and in the form of a checkpoint.

Decides how state is named, copied in and turned into the state_dict of one torch optimizer over the
whole model. Does not decide what the state holds (build.py) nor how files are written (train/).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import CheckpointError, nearest
from openwafer.optim.build import build_optimizer, split_by_decay

__all__ = [
    "from_torch_state_dict",
    "load_optimizer_state",
    "optimizer_state",
    "to_torch_state_dict",
]

OptimizerState = dict[str, dict[str, Any]]


def optimizer_state(optimizer: Optimizer, names: Iterable[str] | None = None) -> OptimizerState:
    """Per parameter name, its state; for all parameters if `names` is None.

    The tensors are the optimizer's own, not copies.
    """
    parameters = _named_parameters(optimizer)
    chosen = parameters if names is None else names
    return {name: dict(optimizer.state[parameters[name][0]]) for name in chosen}


def load_optimizer_state(
    optimizer: Optimizer, names: Iterable[str] | None, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Copy a state into the optimizer's own tensors (all parameters if `names` is None).

    Keys that this optimizer does not have are passed over: other settings of the same type keep
    more. The step count of AdamW without bias correction stays infinite.

    Raises:
        CheckpointError: a parameter or one of its entries is missing or has another shape. Then
            nothing has been changed.
    """
    parameters = _named_parameters(optimizer)
    copies: list[tuple[Tensor, Any]] = []
    for name in parameters if names is None else names:
        weight, group = parameters[name]
        if name not in state:
            raise CheckpointError(
                f"the optimizer state lacks the parameter `{name}`", hint=nearest(name, state)
            )
        for key, target in optimizer.state[weight].items():
            if key == "step" and group.get("correct_bias") is False:
                continue
            copies.append((target, _source(name, key, target, state[name])))
    for target, source in copies:
        target.copy_(source)


def _source(name: str, key: str, target: Tensor, entries: Mapping[str, Any]) -> Tensor:
    if key not in entries:
        raise CheckpointError(
            f"the optimizer state of `{name}` lacks `{key}`",
            allowed=", ".join(entries) or "nothing is there",
            hint="the checkpoint may be of another optimizer_type",
        )
    value = entries[key]
    if value is None:  # torch's SGD before its first step
        return torch.zeros_like(target)
    source = value if isinstance(value, Tensor) else torch.tensor(value)
    if source.shape != target.shape:
        raise CheckpointError(
            f"the optimizer state `{key}` of `{name}` has the shape {list(source.shape)}",
            allowed=f"{list(target.shape)}",
        )
    return source


def _named_parameters(optimizer: Optimizer) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    return {
        name: (weight, group)
        for group in optimizer.param_groups
        for name, weight in zip(group["param_names"], group["params"], strict=True)
    }


def to_torch_state_dict(
    config: OptimizerConfig,
    names_in_order: Sequence[str],
    state: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The state_dict of one torch optimizer over the whole model: a checkpoint's `optimizer` entry.

    As in release 1.6 it has two parameter groups, with and without weight decay, each in the
    model's order (one, where all parameters are of one kind); each names its parameters in
    `param_names`. torch's own optimizer of the same type and grouping loads it.

    Raises:
        CheckpointError: a parameter has no state.
    """
    for name in names_in_order:
        if name not in state:
            raise CheckpointError(
                f"the optimizer state lacks the parameter `{name}`", hint=nearest(name, state)
            )
    # Only the settings of the groups are wanted: on meta tensors these cost no memory.
    shapeless = {name: torch.empty(0, device="meta") for name in names_in_order}
    groups = build_optimizer(config, shapeless).state_dict()["param_groups"]
    entries = {
        index: dict(state[name])
        for group in groups
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }
    return {"state": entries, "param_groups": groups}


def from_torch_state_dict(
    config: OptimizerConfig, names_in_order: Sequence[str], state_dict: Mapping[str, Any]
) -> OptimizerState:
    """Per parameter name, the state in a torch optimizer's state_dict.

    Taken are: any groups with `param_names`; the two groups of `to_torch_state_dict` without names;
    one group in the model's order, as of a plain `torch.optim` optimizer.

    Raises:
        CheckpointError: the groups do not fit the model.
    """
    groups: Sequence[Mapping[str, Any]] = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    elif len(groups) == 1:
        names = list(names_in_order)
    else:
        decay, no_decay = split_by_decay(config, names_in_order)
        if [len(group["params"]) for group in groups] != [len(decay), len(no_decay)]:
            raise CheckpointError(
                f"the optimizer state has groups of {[len(g['params']) for g in groups]} "
                "parameters, without names",
                allowed=f"{len(decay)} with and {len(no_decay)} without weight decay",
            )
        names = [*decay, *no_decay]
    if len(names) != len(indices) or not set(names_in_order) <= set(names):
        missing = sorted(set(names_in_order) - set(names))
        raise CheckpointError(
            f"the optimizer state is of {len(indices)} parameters, the model has "
            f"{len(names_in_order)}",
            hint=f"missing: {', '.join(missing[:5])}" if missing else "",
        )
    found: Mapping[Any, Mapping[str, Any]] = state_dict["state"]
    by_name = {name: dict(found.get(index, {})) for name, index in zip(names, indices, strict=True)}
    return {name: by_name[name] for name in names_in_order}
