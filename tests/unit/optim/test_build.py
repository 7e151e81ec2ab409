"""The 13 optimizers: numbers, subsets, first state, layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from openwafer.config.hyperparameters import (
    HYPERPARAMETERS,
    AdamOptions,
    AdamWOptions,
    Hyperparameters,
    LambOptions,
    OptimizerType,
    RMSpropOptions,
    SGDOptions,
)
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Linear
from openwafer.errors import ConfigError
from openwafer.optim.build import build_optimizer, set_learning_rate, split_by_decay
from openwafer.optim.schedule import learning_rate_at
from openwafer.optim.state import optimizer_state

NUM_STEPS = 20
SHAPES = {
    "embedding.weight": (11, 6),
    "block.0.weight": (6, 9),
    "block.0.bias": (9,),
    "block.0.LayerNorm.weight": (9,),
    "conv.weight": (4, 3, 3, 3),
    "scale": (),
}
SCHEDULE = Linear(initial_learning_rate=2e-2, end_learning_rate=1e-3, steps=15)


def config_for(name: OptimizerType, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer_type=name,
        hyperparameters=dataclasses.replace(HYPERPARAMETERS[name](), **changes),
        learning_rate=SCHEDULE,
        weight_decay_rate=0.0 if name == "rprop" else 0.1,
    )


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def train(config: OptimizerConfig, subsets: list[list[str]]) -> dict[str, Tensor]:
    """Train with one optimizer per subset of the names."""
    current = weights()
    optimizers = [
        build_optimizer(config, {name: current[name] for name in subset}) for subset in subsets
    ]
    for step in range(NUM_STEPS):
        for name, gradient in gradients(step).items():
            current[name].grad = gradient
        for optimizer in optimizers:
            set_learning_rate(optimizer, learning_rate_at(SCHEDULE, step))
            optimizer.step()
    return current


def torch_class(name: OptimizerType, options: Any) -> tuple[type[optim.Optimizer], dict[str, Any]]:
    """torch's class and settings, written down apart from build.py."""
    betas = {"betas": (getattr(options, "beta1", 0), getattr(options, "beta2", 0))}
    return {
        "adadelta": (optim.Adadelta, {"rho": 0.9, "eps": 1e-6}),
        "adagrad": (optim.Adagrad, {"eps": 1e-6}),
        "adam": (optim.Adam, {**betas, "eps": 1e-6}),
        "adamax": (optim.Adamax, {**betas, "eps": 1e-6}),
        "adamw": (optim.AdamW, {**betas, "eps": 1e-6}),
        "asgd": (optim.ASGD, {"lambd": 1e-4, "alpha": 0.75, "t0": 1e-6}),
        "nadam": (optim.NAdam, {**betas, "eps": 1e-6, "momentum_decay": 4e-3}),
        "radam": (optim.RAdam, {**betas, "eps": 1e-6}),
        "rmsprop": (optim.RMSprop, {"alpha": 0.99, "eps": 1e-6}),
        "rprop": (optim.Rprop, {"etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}),
        "sgd": (optim.SGD, {}),
    }[name]


def train_with_torch(cls: type[optim.Optimizer], settings: dict[str, Any]) -> dict[str, Tensor]:
    """torch's plain loop implementation, in float64, with lazily made state."""
    current = weights(torch.float64)
    decay = [name for name in SHAPES if "bias" not in name and "LayerNorm" not in name]
    groups: list[dict[str, Any]] = [
        {"params": [current[name] for name in decay], "weight_decay": 0.1},
        {"params": [w for name, w in current.items() if name not in decay], "weight_decay": 0.0},
    ]
    if cls is optim.Rprop:
        groups = [{"params": list(current.values())}]
    settings = {"foreach": False, **settings}
    optimizer = cls(groups, lr=learning_rate_at(SCHEDULE, 0), **settings)  # type: ignore[call-arg]
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(SCHEDULE, step)
        for name, gradient in gradients(step).items():
            current[name].grad = gradient.double()
        optimizer.step()
    return current


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in SHAPES:
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=2e-5, atol=2e-6)


TORCH_CASES: list[tuple[OptimizerType, dict[str, Any], dict[str, Any]]] = [
    ("adadelta", {}, {}),
    ("adagrad", {}, {}),
    ("adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
     {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True}),
    ("adam", {}, {}),
    ("adam", {"amsgrad": True}, {"amsgrad": True}),
    ("adamax", {}, {}),
    ("adamw", {"correct_bias": True}, {}),
    ("adamw", {"correct_bias": True, "amsgrad": True}, {"amsgrad": True}),
    ("asgd", {}, {}),
    ("nadam", {}, {}),
    ("radam", {}, {}),
    ("rmsprop", {}, {}),
    ("rmsprop", {"momentum": 0.9, "centered": True}, {"momentum": 0.9, "centered": True}),
    ("rprop", {}, {}),
    ("sgd", {}, {}),
    ("sgd", {"momentum": 0.9}, {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "use_nesterov": True}, {"momentum": 0.9, "nesterov": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ours", "theirs"), TORCH_CASES)
def test_against_torchs_plain_implementation(
    name: OptimizerType, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    config = config_for(name, **ours)
    cls, settings = torch_class(name, config.hyperparameters)
    assert_same(train(config, [list(SHAPES)]), train_with_torch(cls, {**settings, **theirs}))


def slowly(
    config: OptimizerConfig, update: Any, weight_decays: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """Run `update(weight, gradient, state, t, rate, weight_decay)` in float64."""
    decaying, _ = split_by_decay(config, SHAPES)
    current = weights(torch.float64)
    states: dict[str, dict[str, Any]] = {name: {} for name in SHAPES}
    for step in range(NUM_STEPS):
        rate = learning_rate_at(SCHEDULE, step)
        for name, gradient in gradients(step).items():
            decay = config.weight_decay_rate if name in decaying else 0.0
            current[name] = update(
                current[name], gradient.double(), states[name], step + 1, rate, decay
            )
    return current


def moments(state: dict[str, Any], gradient: Tensor) -> tuple[Tensor, Tensor]:
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * gradient
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * gradient**2
    return state["m"], state["v"]


@pytest.mark.parametrize(("momentum", "centered"), [(0.0, False), (0.9, False), (0.9, True)])
def test_rmsprop_as_tensorflow_has_it(momentum: float, centered: bool) -> None:
    """The rate changes in every step, which tells the two forms of momentum apart."""

    def update(w: Tensor, g: Tensor, state: Any, t: int, rate: float, decay: float) -> Tensor:
        g = g + decay * w
        state["s"] = 0.9 * state.get("s", 1.0) + 0.1 * g**2
        state["a"] = 0.9 * state.get("a", 0.0) + 0.1 * g
        variance = state["s"] - state["a"] ** 2 if centered else state["s"]
        state["b"] = momentum * state.get("b", 0.0) + rate * g / (variance + 1e-4).sqrt()
        return w - state["b"]

    config = config_for(
        "rmsprop", alpha=0.9, eps=1e-4, momentum=momentum, centered=centered, as_tensorflow=True
    )
    assert_same(train(config, [list(SHAPES)]), slowly(config, update))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_without_bias_correction(amsgrad: bool) -> None:
    def update(w: Tensor, g: Tensor, state: Any, t: int, rate: float, decay: float) -> Tensor:
        m, v = moments(state, g)
        if amsgrad:
            v = state["largest"] = torch.maximum(v, state.get("largest", torch.zeros_like(v)))
        return w - rate * (m / (v.sqrt() + 1e-6) + decay * w)

    config = config_for("adamw", amsgrad=amsgrad)
    assert isinstance(config.hyperparameters, AdamWOptions)
    assert not config.hyperparameters.correct_bias
    assert_same(train(config, [list(SHAPES)]), slowly(config, update))


@pytest.mark.parametrize("adam", [False, True])
def test_lamb(adam: bool) -> None:
    def update(w: Tensor, g: Tensor, state: Any, t: int, rate: float, decay: float) -> Tensor:
        m, v = moments(state, g)
        direction = m / (v.sqrt() + 1e-6) + decay * w
        weight_norm = min(float((w * w).sum()) ** 0.5, 10.0)
        update_norm = float((direction * direction).sum()) ** 0.5
        plain = adam or weight_norm == 0 or update_norm == 0
        return w - rate * (1.0 if plain else weight_norm / update_norm) * direction

    config = config_for("lamb", adam=adam)
    assert_same(train(config, [list(SHAPES)]), slowly(config, update))


def test_lamb_with_a_norm_of_zero_takes_the_ratio_one() -> None:
    weight = torch.zeros(3)
    config = config_for("lamb")
    optimizer = build_optimizer(config, {"bias": weight})
    weight.grad = torch.tensor([1.0, 0.0, -1.0])
    optimizer.step()
    step = 0.1 / (0.001**0.5 + 1e-6) * learning_rate_at(SCHEDULE, 0)
    torch.testing.assert_close(weight, torch.tensor([-step, 0.0, step]))
    still = torch.ones(3)
    optimizer = build_optimizer(config, {"bias": still})
    still.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3))


@pytest.mark.parametrize("scale_parameter", [True, False])
def test_adafactor(scale_parameter: bool) -> None:
    def rms(x: Tensor) -> float:
        return float((x * x).mean()) ** 0.5

    def update(w: Tensor, g: Tensor, state: Any, t: int, rate: float, decay: float) -> Tensor:
        beta = 1 - t**-0.8
        square = g * g + 1e-30
        if w.dim() >= 2:
            row = state["r"] = beta * state.get("r", 0.0) + (1 - beta) * square.mean(-1)
            column = state["c"] = beta * state.get("c", 0.0) + (1 - beta) * square.mean(-2)
            estimate = (row / row.mean(-1, keepdim=True))[..., :, None] * column[..., None, :]
        else:
            estimate = state["v"] = beta * state.get("v", 0.0) + (1 - beta) * square
        direction = g / estimate.sqrt()
        direction = direction / max(1.0, rms(direction))
        if scale_parameter:
            rate *= max(1e-3, rms(w))
        return w - decay * rate * w - rate * direction

    config = config_for("adafactor", scale_parameter=scale_parameter)
    assert_same(train(config, [list(SHAPES)]), slowly(config, update))


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_any_subset_gives_the_same_bits(name: OptimizerType) -> None:
    names = list(SHAPES)
    whole = train(config_for(name), [names])
    parts = train(config_for(name), [[names[2]], [names[5], names[0]], [*names[3:5], names[1]]])
    for key in names:
        assert torch.equal(whole[key], parts[key]), key
        assert not torch.equal(whole[key], weights()[key])


STATE_CASES: list[tuple[OptimizerType, Hyperparameters]] = [
    *((name, cls()) for name, cls in HYPERPARAMETERS.items()),
    ("adam", AdamOptions(amsgrad=True)),
    ("adamw", AdamWOptions(correct_bias=True)),
    ("lamb", LambOptions(adam=True)),
    ("rmsprop", RMSpropOptions(momentum=0.9, centered=True)),
    ("rmsprop", RMSpropOptions(centered=True, as_tensorflow=True)),
    ("sgd", SGDOptions(momentum=0.9)),
]


@pytest.mark.parametrize(("name", "options"), STATE_CASES)
def test_the_state_exists_before_the_first_step(
    name: OptimizerType, options: Hyperparameters
) -> None:
    """Same keys, shapes, dtypes and tensors before and after a step: nothing is made lazily."""
    config = dataclasses.replace(config_for(name), hyperparameters=options)
    current = weights()
    optimizer = build_optimizer(config, current)
    before = optimizer_state(optimizer)
    for key, gradient in gradients(0).items():
        current[key].grad = gradient
    optimizer.step()
    after = optimizer_state(optimizer)
    assert before.keys() == after.keys() == set(SHAPES)
    for key in SHAPES:
        assert before[key].keys() == after[key].keys()
        for entry, value in after[key].items():
            assert before[key][entry] is value
    assert sum(len(entries) for entries in after.values()) > 0 or options == SGDOptions()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_layouts_do_not_change_the_numbers(name: OptimizerType) -> None:
    """torch's fused CPU kernels give wrong numbers where strides differ; ours must not."""
    config = config_for(name, **({"momentum": 0.9} if name == "sgd" else {}))

    def run(weight: Tensor, *, transposed_gradient: bool) -> Tensor:
        optimizer = build_optimizer(config, {"weight": weight})
        for step in range(5):
            gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
            weight.grad = gradient.t().contiguous().t() if transposed_gradient else gradient
            optimizer.step()
        return weight.clone(memory_format=torch.contiguous_format)

    first = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    expected = run(first.clone(), transposed_gradient=False)
    assert torch.equal(run(first.clone(), transposed_gradient=True), expected)
    transposed = first.t().contiguous().t()
    torch.testing.assert_close(run(transposed, transposed_gradient=False), expected)
    gaps = torch.zeros(6, 10)[:, ::2]
    torch.testing.assert_close(run(gaps.copy_(first), transposed_gradient=True), expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_fused_where_torch_has_it(name: OptimizerType) -> None:
    optimizer = build_optimizer(config_for(name), weights())
    assert all(group["fused"] for group in optimizer.param_groups)


def test_decay_follows_names() -> None:
    optimizer = build_optimizer(config_for("adamw"), weights())
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    without = {"block.0.bias", "block.0.LayerNorm.weight"}
    assert decays == {name: 0.0 if name in without else 0.1 for name in SHAPES}


def test_no_parameter_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_optimizer(config_for("adam"), {})
