"""The same numbers in every mode: plain loop, layer pipelined, weight streaming.

The plain loop is compared with a loop written out here from the documented rules; the modes are
compared with the plain loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fc_mnist_runs import (
    DROP,
    Outcome,
    assert_close_run,
    load_example,
    run_here,
    write_params,
)
from sklearn.datasets import load_digits
from torch import nn

LOG_ALL = {"runconfig.log_steps": 1}


def steps(count: int) -> dict[str, Any]:
    return {**LOG_ALL, "runconfig.max_steps": count, "runconfig.checkpoint_steps": count}


# ------------------------------------------------------------------ written out by hand

Update = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor], float, int], None]


class Sgd:
    """v ← m·v + g;  w ← w − lr·v"""

    def __init__(self, momentum: float) -> None:
        self.momentum, self.velocity = momentum, {}

    def __call__(self, weights: Any, gradients: Any, rate: float, step: int) -> None:
        for name, gradient in gradients.items():
            velocity = self.momentum * self.velocity.get(name, 0.0) + gradient
            self.velocity[name] = velocity
            weights[name] -= rate * velocity


class AdamW:
    """Running averages without bias correction; decay is added to the update of all but biases."""

    def __init__(self, decay: float) -> None:
        self.decay, self.first, self.second = decay, {}, {}

    def __call__(self, weights: Any, gradients: Any, rate: float, step: int) -> None:
        for name, gradient in gradients.items():
            self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * gradient
            self.second[name] = 0.999 * self.second.get(name, 0.0) + 0.001 * gradient**2
            update = self.first[name] / (self.second[name].sqrt() + 1e-6)
            if "bias" not in name:
                update = update + self.decay * weights[name]
            weights[name] -= rate * update


class Adam:
    """Bias correction always; weight decay is part of the gradient of all but biases."""

    def __init__(self, decay: float) -> None:
        self.decay, self.first, self.second = decay, {}, {}

    def __call__(self, weights: Any, gradients: Any, rate: float, step: int) -> None:
        for name, gradient in gradients.items():
            if "bias" not in name:
                gradient = gradient + self.decay * weights[name]
            self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * gradient
            self.second[name] = 0.999 * self.second.get(name, 0.0) + 0.001 * gradient**2
            first = self.first[name] / (1 - 0.9 ** (step + 1))
            second = self.second[name] / (1 - 0.999 ** (step + 1))
            weights[name] -= rate * first / (second.sqrt() + 1e-6)


def clip_by_norm(gradients: dict[str, torch.Tensor], largest: float) -> None:
    norm = math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in gradients.values()))
    for gradient in gradients.values():
        gradient *= min(1.0, largest / (norm + 1e-6))


def clip_by_value(gradients: dict[str, torch.Tensor], largest: float) -> None:
    for gradient in gradients.values():
        gradient.clamp_(-largest, largest)


def batches_in_order(batch_size: int, per_epoch: int) -> Iterator[tuple[torch.Tensor, Any]]:
    """The digits in file order, every fifth held out, the incomplete last batch left out."""
    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    images = torch.tensor(digits.images[~held_out].reshape(-1, 64) / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[~held_out])
    while True:
        for start in range(0, per_epoch * batch_size, batch_size):
            yield images[start : start + batch_size], labels[start : start + batch_size]


def by_hand(
    num_steps: int,
    update: Update,
    rate_at: Callable[[int], float],
    clip: Callable[[dict[str, torch.Tensor]], None] = lambda gradients: None,
    microbatches: int = 1,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of an ordinary loop: batches of 128, so 11 in an epoch."""
    torch.manual_seed(1)
    model = load_example().MNISTModel.__init__.__globals__["MNIST"](64, [50] * 4, 0.0, "relu")
    weights = dict(model.named_parameters())
    batches = batches_in_order(128, 11 - 11 % microbatches)
    losses: list[float] = []
    for step in range(num_steps):
        loss = torch.zeros(())
        for images, labels in [next(batches) for _ in range(microbatches)]:
            loss = loss + nn.functional.nll_loss(model(images), labels) / microbatches
        gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))
        clip(gradients)
        with torch.no_grad():
            update(weights, gradients, rate_at(step), step)
        losses.append(loss.item())
    return losses, {name: weight.detach() for name, weight in weights.items()}


BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": ({}, {"update": Sgd(0.9), "rate_at": lambda step: 0.1}),
    "warm-up, accumulation, clipping by norm, decay": (
        {
            "optimizer.optimizer_type": "AdamW",
            "optimizer.weight_decay_rate": 0.1,
            "optimizer.grad_accum_steps": 2,
            "optimizer.max_gradient_norm": 0.5,
            "optimizer.learning_rate": [
                {
                    "scheduler": "Linear",
                    "initial_learning_rate": 0.0,
                    "end_learning_rate": 0.004,
                    "steps": 20,
                },
                {
                    "scheduler": "CosineDecay",
                    "initial_learning_rate": 0.004,
                    "end_learning_rate": 0.001,
                    "decay_steps": 30,
                },
            ],
        },
        {
            "update": AdamW(0.1),
            "clip": lambda gradients: clip_by_norm(gradients, 0.5),
            "microbatches": 2,
            "rate_at": lambda step: (
                0.004 * step / 20
                if step < 20
                else 0.001 + 0.003 * (1 + math.cos(math.pi * min(step - 20, 30) / 30)) / 2
            ),
        },
    ),
    "clipping by value, loss scale, L2": (
        {
            "optimizer.optimizer_type": "adam",
            "optimizer.weight_decay_rate": 0.01,
            "optimizer.max_gradient_value": 0.003,
            "optimizer.loss_scaling_factor": 1024,
            "optimizer.learning_rate": 0.003,
        },
        {
            "update": Adam(0.01),
            "clip": lambda gradients: clip_by_value(gradients, 0.003),
            "rate_at": lambda step: 0.003,
        },
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_plain_loop_follows_the_documented_rules(
    name: str, train: Callable[..., Outcome], one_thread: None
) -> None:
    changes, rules = BY_HAND[name]
    still = {"model.dropout": 0.0, "train_input.shuffle": False}
    extra = {} if name == "momentum" else {"optimizer.momentum": DROP}
    outcome = train("plain", {**steps(60), **still, **extra, **changes}).succeeded()
    losses, weights = by_hand(60, **rules)
    np.testing.assert_allclose(outcome.losses(), losses, rtol=1e-5)
    for key, weight in outcome.checkpoint()["model"].items():
        torch.testing.assert_close(weight, weights[key], rtol=1e-3, atol=2e-5)
    rates = [row["lr"] for row in outcome.metrics()]
    np.testing.assert_allclose(rates, [rules["rate_at"](step) for step in range(60)], rtol=1e-12)


# ------------------------------------------------------------------ the modes

MODES = ("layer_pipelined", "weight_streaming", "disk")


@pytest.fixture(scope="module")
def plain_200(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """200 steps of the example as it is, with dropout, in the plain loop."""
    folder = tmp_path_factory.mktemp("plain_200")
    params = write_params(folder / "params.yaml", steps(200))
    return run_here("train", params, folder / "plain").succeeded()


def test_plain_run_learns_with_dropout(plain_200: Outcome) -> None:
    losses = plain_200.losses()
    assert len(losses) == 200
    assert losses[0] == pytest.approx(math.log(10), rel=0.05)
    assert losses[-1] < 0.4


@pytest.mark.parametrize("mode", MODES)
def test_200_steps_are_those_of_the_plain_loop(
    mode: str, plain_200: Outcome, train: Callable[..., Outcome]
) -> None:
    outcome = train(mode, steps(200)).succeeded()
    expected = "layer_pipelined" if mode == "layer_pipelined" else "weight_streaming"
    assert outcome.plan()["execution_mode"] == expected
    assert_close_run(outcome, plain_200)


def test_other_seeds_and_dropout_give_other_losses(
    plain_200: Outcome, train: Callable[..., Outcome]
) -> None:
    """What the equalities above would not notice: that nothing depends on seed or dropout."""
    seeded = train("plain", {**steps(12), "runconfig.seed": 2}).succeeded().losses()
    assert not np.allclose(seeded, plain_200.losses()[:12], rtol=1e-3)
    still = train("layer_pipelined", {**steps(12), "model.dropout": 0.0}).succeeded().losses()
    assert not np.allclose(still, plain_200.losses()[:12], rtol=1e-5)


RULES: dict[str, dict[str, Any]] = {
    "accumulation and clipping by norm": {
        "optimizer.grad_accum_steps": 2,
        "optimizer.max_gradient_norm": 0.2,
    },
    "clipping by value and a constant loss scale": {
        "optimizer.grad_accum_steps": 3,
        "optimizer.max_gradient_value": 0.002,
        "optimizer.loss_scaling_factor": 512,
    },
}


@pytest.mark.parametrize("name", RULES)
def test_update_rules_are_the_same_in_every_mode(
    name: str, train: Callable[..., Outcome], plain_200: Outcome
) -> None:
    changes = {**steps(60), **RULES[name]}
    plain = train("plain", changes).succeeded()
    assert not np.allclose(plain.losses(), plain_200.losses()[:60], rtol=1e-4), "no effect"
    if "optimizer.max_gradient_norm" in changes:
        norms = [row["grad_norm"] for row in plain.metrics()]
        assert min(norms) < 0.2 < max(norms), "the bound lies outside of what happens"
    for mode in MODES[:2]:
        assert_close_run(train(mode, changes).succeeded(), plain)


def louder_model(params: Any) -> Any:
    """The example's model with a hundredfold loss, whose gradients leave float32 more easily."""
    base = load_example().MNISTModel

    class Louder(base):
        def __call__(self, data: Any) -> torch.Tensor:
            return 100.0 * super().__call__(data)

    return Louder(params)


def test_dynamic_loss_scale_skips_the_same_steps(
    tmp_path: Path, flags_of: Callable[[str], tuple[str, ...]]
) -> None:
    """Scales near the largest float overflow: those steps change nothing and halve the scale."""
    changes = {
        **steps(40),
        "optimizer.loss_scaling_factor": "dynamic",
        "optimizer.initial_loss_scale": 3e38,
        "optimizer.max_loss_scale": 3e38,
        "optimizer.steps_per_increase": 5,
        "optimizer.overflow_tolerance": 0.0,
        "optimizer.max_gradient_norm": 1.0,
    }
    params = write_params(tmp_path / "params.yaml", changes)

    def train(mode: str) -> Outcome:
        folder, flags = tmp_path / mode, flags_of(mode)
        return run_here("train", params, folder, *flags, model_fn=louder_model).succeeded()

    plain = train("plain")
    scales = [row["loss_scale"] for row in plain.metrics()]
    pairs = list(itertools.pairwise(scales))
    assert sum(after == 2 * before for before, after in pairs) >= 2
    assert sum(after == before / 2 for before, after in pairs) >= 4
    assert plain.losses()[-1] < plain.losses()[0]
    for mode in MODES[:2]:
        outcome = train(mode)
        assert [row["loss_scale"] for row in outcome.metrics()] == scales
        assert outcome.checkpoint()["amp"] == plain.checkpoint()["amp"]
        assert_close_run(outcome, plain)


def test_mixed_precision_is_close_in_every_mode(
    plain_200: Outcome, train: Callable[..., Outcome]
) -> None:
    changes = {**steps(100), "model.mixed_precision": True}
    plain = train("plain", changes).succeeded()
    assert all(weight.dtype is torch.float32 for weight in plain.checkpoint()["model"].values())
    # bf16 rounds to 8 bits, 0.4 %: that it computes in bf16 shows as more than fp32's rounding.
    difference = np.abs(np.array(plain.losses()) / plain_200.losses()[:100] - 1)
    assert difference[:20].max() > 1e-5
    assert difference[:20].max() < 0.02
    # All forms call the same kernels on the same numbers, so 16 bits need no wider tolerance.
    for mode in MODES[:2]:
        assert_close_run(train(mode, changes).succeeded(), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("Adadelta", 1.0),
        ("Adafactor", 0.01),
        ("Adagrad", 0.01),
        ("Adam", 0.003),
        ("Adamax", 0.003),
        ("AdamW", 0.003),
        ("ASGD", 0.1),
        ("Lamb", 0.003),
        ("NAdam", 0.003),
        ("RAdam", 0.003),
        ("RMSprop", 0.001),
        ("Rprop", 0.001),
        ("SGD", 0.1),
    ],
)
def test_every_optimizer_is_the_same_in_every_mode(
    kind: str, rate: float, train: Callable[..., Outcome]
) -> None:
    changes = {
        **steps(60),
        "optimizer.optimizer_type": kind,
        "optimizer.momentum": DROP,
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay_rate": 0.0 if kind == "Rprop" else 0.01,
    }
    plain = train("plain", changes).succeeded()
    for mode in MODES:
        assert_close_run(train(mode, changes).succeeded(), plain)
