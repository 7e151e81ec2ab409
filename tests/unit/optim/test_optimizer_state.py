"""Optimizer state by name and as a torch state_dict."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from openwafer.config.hyperparameters import (
    HYPERPARAMETERS,
    AdamOptions,
    AdamWOptions,
    OptimizerType,
    SGDOptions,
)
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.errors import CheckpointError
from openwafer.optim.build import build_optimizer
from openwafer.optim.state import (
    from_torch_state_dict,
    load_optimizer_state,
    optimizer_state,
    to_torch_state_dict,
)

NAMES = ["first.weight", "first.bias", "second.weight", "second.bias"]


def config_for(name: OptimizerType, options: Any = None) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer_type=name,
        hyperparameters=options or HYPERPARAMETERS[name](),
        learning_rate=Constant(learning_rate=0.01),
        weight_decay_rate=0.0 if name == "rprop" else 0.1,
    )


def model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (4,), (2, 4), (2,)]
    return {n: torch.randn(s, generator=generator) for n, s in zip(NAMES, shapes, strict=True)}


def step(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


def trained(config: OptimizerConfig) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    weights = model()
    optimizer = build_optimizer(config, weights)
    for seed in range(3):
        step(optimizer, weights, seed)
    return weights, optimizer


def clones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_checkpoint_goes_on_bit_for_bit_in_per_layer_optimizers(name: OptimizerType) -> None:
    config = config_for(name)
    weights, optimizer = trained(config)
    file = io.BytesIO()
    torch.save(to_torch_state_dict(config, NAMES, optimizer_state(optimizer)), file)
    file.seek(0)
    state = from_torch_state_dict(config, NAMES, torch.load(file, weights_only=True))
    resumed = clones(weights)
    for part in (NAMES[:2], NAMES[2:]):
        layer = {n: resumed[n] for n in part}
        layer_optimizer = build_optimizer(config, layer)
        load_optimizer_state(layer_optimizer, part, state)
        for n in part:
            resumed[n].grad = None
        generator = torch.Generator().manual_seed(77)
        drawn = {n: torch.randn(w.shape, generator=generator) for n, w in resumed.items()}
        for n in part:
            resumed[n].grad = drawn[n]
        layer_optimizer.step()
    step(optimizer, weights, 77)
    assert all(torch.equal(weights[n], resumed[n]) for n in NAMES)


TORCH_USERS: list[tuple[OptimizerType, Any, Any]] = [
    ("adam", AdamOptions(), torch.optim.Adam),
    ("adamw", AdamWOptions(), torch.optim.AdamW),
    ("adamw", AdamWOptions(correct_bias=True), torch.optim.AdamW),
    ("sgd", SGDOptions(momentum=0.9), torch.optim.SGD),
    ("rprop", None, torch.optim.Rprop),
]


@pytest.mark.parametrize(("name", "options", "cls"), TORCH_USERS)
def test_a_torch_user_loads_it_and_goes_on_with_the_same_numbers(
    name: OptimizerType, options: Any, cls: Any
) -> None:
    config = config_for(name, options)
    weights, optimizer = trained(config)
    saved = to_torch_state_dict(config, NAMES, optimizer_state(optimizer))
    theirs = clones(weights)
    groups = [{"params": [theirs[n] for n in NAMES if ("bias" in n) == no]} for no in (False, True)]
    user = cls(groups, lr=0.5)
    user.load_state_dict(copy.deepcopy(saved))
    assert {group["lr"] for group in user.param_groups} == {0.01}
    step(user, theirs, 5)
    step(optimizer, weights, 5)
    for n in NAMES:
        torch.testing.assert_close(theirs[n], weights[n], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grouping", ["one group", "two groups"])
def test_a_torch_users_checkpoint_is_taken(grouping: str) -> None:
    config = config_for("adamw", AdamWOptions(correct_bias=True))
    theirs = model()
    if grouping == "one group":
        groups: list[dict[str, Any]] = [{"params": list(theirs.values()), "weight_decay": 0.1}]
    else:
        groups = [
            {"params": [theirs[n] for n in NAMES if ("bias" in n) == no]} for no in (False, True)
        ]
    user = torch.optim.AdamW(groups, lr=0.01)
    step(user, theirs, 1)
    state = from_torch_state_dict(config, NAMES, user.state_dict())
    for n in NAMES:
        assert torch.equal(state[n]["exp_avg"], user.state[theirs[n]]["exp_avg"])
    ours = build_optimizer(config, clones(theirs))
    load_optimizer_state(ours, None, state)
    assert float(optimizer_state(ours)["first.bias"]["step"]) == 1.0


def test_uncorrected_adamw_keeps_its_infinite_step() -> None:
    corrected = config_for("adamw", AdamWOptions(correct_bias=True))
    _, optimizer = trained(corrected)
    state = optimizer_state(optimizer)
    plain = build_optimizer(config_for("adamw"), model())
    load_optimizer_state(plain, NAMES, state)
    assert torch.isinf(optimizer_state(plain, ["first.bias"])["first.bias"]["step"])
    assert torch.equal(
        optimizer_state(plain)["first.weight"]["exp_avg"], state["first.weight"]["exp_avg"]
    )


def test_loading_copies_into_the_tensors_that_are_there() -> None:
    config = config_for("adam")
    _, source = trained(config)
    target = build_optimizer(config, model())
    kept = optimizer_state(target)["first.weight"]["exp_avg"]
    load_optimizer_state(target, None, optimizer_state(source))
    assert optimizer_state(target)["first.weight"]["exp_avg"] is kept
    assert torch.equal(kept, optimizer_state(source)["first.weight"]["exp_avg"])


def test_a_momentum_that_torch_has_not_made_yet_is_zero() -> None:
    target = build_optimizer(config_for("sgd", SGDOptions(momentum=0.9)), model())
    load_optimizer_state(target, None, {n: {"momentum_buffer": None} for n in NAMES})
    assert not optimizer_state(target)["first.weight"]["momentum_buffer"].any()


def test_states_that_do_not_fit() -> None:
    config = config_for("adam")
    _, source = trained(config)
    good = optimizer_state(source)
    target = build_optimizer(config, model())
    before = copy.deepcopy(optimizer_state(target))
    renamed = {n.replace("first.", "frist."): entries for n, entries in good.items()}
    with pytest.raises(CheckpointError, match=r"lacks the parameter `first\.weight`") as caught:
        load_optimizer_state(target, NAMES, renamed)
    assert caught.value.hint == "did you mean `frist.weight`?"
    with pytest.raises(CheckpointError, match="lacks the parameter"):
        to_torch_state_dict(config, NAMES, renamed)
    with pytest.raises(CheckpointError, match="lacks `step`"):
        load_optimizer_state(target, NAMES, {n: {} for n in NAMES})
    wrong = {**good, "second.bias": {**good["second.bias"], "exp_avg": torch.zeros(9)}}
    with pytest.raises(CheckpointError, match=r"`exp_avg` of `second.bias` has the shape \[9\]"):
        load_optimizer_state(target, NAMES, wrong)
    after = optimizer_state(target)
    assert all(torch.equal(after[n][k], v) for n in NAMES for k, v in before[n].items())


def test_groups_that_do_not_fit() -> None:
    config = config_for("adam")
    weights = model()
    user = torch.optim.Adam([{"params": [weights[n]]} for n in NAMES])
    with pytest.raises(CheckpointError, match=r"groups of \[1, 1, 1, 1\]"):
        from_torch_state_dict(config, NAMES, user.state_dict())
    fewer = torch.optim.Adam([weights[n] for n in NAMES[:3]])
    with pytest.raises(CheckpointError, match="of 3 parameters, the model has 4"):
        from_torch_state_dict(config, NAMES, fewer.state_dict())
    _, source = trained(config)
    saved = to_torch_state_dict(config, NAMES, optimizer_state(source))
    with pytest.raises(CheckpointError, match="the optimizer state is of 4"):
        from_torch_state_dict(config, [*NAMES, "third.weight"], saved)
