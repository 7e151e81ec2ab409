"""Positions and blocks of kernels: what they follow from, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade_program import program_of
from openwafer.graph.program import Program
from openwafer.kernels import ADAM, match
from openwafer.machine import load_machine
from openwafer.plan.fabric.blocks import group_kernels
from openwafer.plan.fabric.demand import Demand, demands_of
from openwafer.plan.fabric.pipelined import plan_pipelined
from openwafer.plan.layers import cut_layers

TINY = load_machine("tiny")
BATCH, CLASSES, HEIGHT, WIDTH = 2, 3, 4, 5

Loss = Callable[[Tensor, Tensor], Tensor]
Activation = Callable[[Tensor], Tensor]


def channels_last(images: Tensor) -> Tensor:
    """[batch, channels, height, width] to [batch * height * width, channels], as Keras has it."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "log_softmax and nll_loss": lambda x, y: F.nll_loss(F.log_softmax(x, 1), y),
    "log_softmax from the end": lambda x, y: F.nll_loss(F.log_softmax(x, -3), y),
    "softmax": lambda x, y: (F.softmax(x, dim=1) * y[:, None]).sum(),
    "channels last": lambda x, y: F.cross_entropy(channels_last(x), y.reshape(-1)),
}


class Segmentation(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.classes = nn.Conv2d(1, CLASSES, 1)
        self.loss = loss

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.loss(self.classes(image), mask)


class FeedForward(nn.Module):
    """The activation is called in this module's scope, or has one of its own."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x))).square().mean()


def segmentation(loss: Loss) -> Program:
    image = torch.zeros(BATCH, 1, HEIGHT, WIDTH)
    return program_of(Segmentation(loss), image, torch.zeros(BATCH, HEIGHT, WIDTH).long())


def demands(program: Program) -> list[Demand]:
    return demands_of(match(program), cut_layers(program), program, TINY, ADAM)


@pytest.mark.parametrize("name", LOSSES)
def test_the_classes_of_a_pixel_are_one_position(name: str) -> None:
    (over_classes,) = (d for d in demands(segmentation(LOSSES[name])) if d.row_cycles)
    assert (over_classes.positions, over_classes.width) == (HEIGHT * WIDTH, CLASSES)


def test_a_softmax_over_another_axis_takes_that_axis() -> None:
    (rows,) = (
        d
        for d in demands(segmentation(lambda x, y: (F.softmax(x, dim=2) * y[:, None]).sum()))
        if d.row_cycles
    )
    assert (rows.positions, rows.width) == (CLASSES * WIDTH, HEIGHT)


def test_the_order_of_dimensions_does_not_change_the_prediction() -> None:
    cycles: list[int] = []
    for program in (segmentation(LOSSES[name]) for name in ("cross_entropy", "channels last")):
        _, predicted = plan_pipelined(
            cut_layers(program), match(program), program, TINY, optimizer=ADAM
        )
        cycles.append(predicted.delta_t_cycles)
    assert cycles[0] == cycles[1]


def test_the_scope_of_an_activation_does_not_change_the_blocks() -> None:
    activations: tuple[Activation, ...] = (F.gelu, nn.GELU())
    found = [demands(program_of(FeedForward(a), torch.zeros(2, 16))) for a in activations]
    scopes = [[d.module for d in one if d.match.kernel.name == "gelu"] for one in found]
    assert scopes == [[""], ["activation"]]
    large = [[1.0] * len(one) for one in found]  # of a floor so small that every kernel is large
    blocks = [group_kernels(one, needs, 100) for one, needs in zip(found, large, strict=True)]
    assert blocks[0] == blocks[1]
