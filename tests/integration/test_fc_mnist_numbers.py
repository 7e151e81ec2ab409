"""The same numbers in every mode: plain loop, layer pipelined, weight streaming.

The plain loop is compared with a loop written out here from the documented rules; the modes are
compared with the plain loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODE_FLAGS
from fc_mnist_runs import (
    DROP,
    SMALL,
    Outcome,
    assert_close_run,
    assert_same_run,
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
    np.testing.assert_allclose(outcome.losses(), losses, rtol=2e-5)
    for key, weight in outcome.checkpoint()["model"].items():
        torch.testing.assert_close(weight, weights[key], rtol=1e-3, atol=2e-5)
    rates = [row["lr"] for row in outcome.metrics()]
    np.testing.assert_allclose(rates, [rules["rate_at"](step) for step in range(60)], rtol=1e-12)
