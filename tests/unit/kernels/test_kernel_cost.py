"""Costs against numbers worked out by hand and against torch's own FLOP counter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from handmade_program import program_of
from openwafer.kernels import ADAM, SGD, CostContext, KernelCost, OptimizerCost, match


def costs_of(
    module: nn.Module,
    *batch: torch.Tensor,
    training: bool = True,
    optimizer: OptimizerCost = ADAM,
) -> dict[str, KernelCost]:
    program = program_of(module, *batch, training=training)
    context = CostContext(num_samples=program.num_samples, training=training, optimizer=optimizer)
    return {m.name: m.cost(context) for m in match(program).working}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 30), nn.Linear(30, 10, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.b(F.relu(self.a(x))), y)


BATCH = (torch.zeros(8, 20), torch.zeros(8, dtype=torch.long))


def test_an_mlp_by_hand() -> None:
    costs = costs_of(TwoLayers(), *BATCH)
    first, second, relu = costs["fc0"], costs["fc1"], costs["nlin0"]
    assert first.forward.macs == 8 * 20 * 30
    assert first.backward.macs == 8 * 20 * 30  # the batch needs no gradient
    assert second.forward.macs == 8 * 30 * 10
    assert second.backward.macs == 2 * 8 * 30 * 10
    assert first.weight_bytes == (20 * 30 + 30) * 4
    assert first.gradient_bytes == (20 * 30 + 30) * 4
    assert first.owned_bytes == (20 * 30 + 30) * 8  # two fp32 moments
    assert first.update.elementwise_ops == (20 * 30 + 30) * ADAM.ops_per_parameter
    assert first.parallelism == 20 * 30
    assert (first.forward.bytes_in, first.forward.bytes_out) == (8 * 20 * 4, 8 * 30 * 4)
    assert (first.backward.bytes_in, first.backward.bytes_out) == (8 * 30 * 4, 0)
    assert second.backward.bytes_out == 8 * 30 * 4
    assert first.saved_bytes == 8 * 20 * 4
    assert relu.forward.elementwise_ops == relu.backward.elementwise_ops == 8 * 30
    assert relu.parallelism == 30
    assert relu.weight_bytes == 0


def test_macs_agree_with_torchs_flop_counter() -> None:
    module = TwoLayers()
    x = torch.randn(8, 20)
    with FlopCounterMode(display=False) as counter:
        module(x, BATCH[1]).backward()
    costs = costs_of(TwoLayers(), *BATCH)
    macs = sum(cost.forward.macs + cost.backward.macs for cost in costs.values())
    assert 2 * macs == counter.get_total_flops()


def test_evaluation_and_sgd() -> None:
    trained = costs_of(TwoLayers(), *BATCH, optimizer=SGD)["fc0"]
    assert trained.owned_bytes == 0
    assert trained.update.elementwise_ops == 2 * (20 * 30 + 30)
    evaluated = costs_of(TwoLayers(), *BATCH, training=False)["fc0"]
    assert evaluated.forward == trained.forward
    assert evaluated.backward.macs == evaluated.update.elementwise_ops == 0
    assert evaluated.gradient_bytes == evaluated.saved_bytes == evaluated.owned_bytes == 0


def test_frozen_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.frozen = nn.Linear(16, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight
            self.frozen.requires_grad_(False)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.frozen(self.embedding(x))), y)

    costs = costs_of(Tied(), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long))
    assert costs["fc0"].backward.macs == costs["fc0"].forward.macs  # of its input alone
    assert costs["fc0"].gradient_bytes == 0
    assert costs["embedding0"].update.elementwise_ops == 50 * 16 * ADAM.ops_per_parameter
    assert costs["fc1"].update.elementwise_ops == 0  # updated once, at its first reader
    assert costs["fc1"].weight_bytes == costs["embedding0"].weight_bytes == 50 * 16 * 4
    assert costs["fc1"].parallelism == 50 * 16


def test_sixteen_bit_compute_keeps_an_fp32_copy() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(10, 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x.bfloat16(), self.w.bfloat16()).float().sum()

    cost = costs_of(Half(), torch.zeros(8, 20))["fc0"]
    assert cost.dtype == "bfloat16"
    assert cost.weight_bytes == cost.gradient_bytes == 200 * 2
    assert cost.owned_bytes == 200 * (8 + 4)


def test_gradients_stop_at_detach_and_at_metrics() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            h = self.a(x)
            return self.b(h.detach()).sum(), torch.tanh(h).sum()

    costs = costs_of(Stops(), torch.zeros(2, 4))
    assert costs["fc0"].backward.macs == 0
    assert costs["fc1"].backward.macs == 2 * 4 * 4
    assert costs["nlin0"].backward.elementwise_ops == 0


def test_products_between_activations() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(5))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a = a * self.w
            one = torch.bmm(a, b)
            two = torch.einsum("bij,bjk->bik", a, b)
            return (one + two + a @ b).sum()

    costs = costs_of(Products(), torch.zeros(2, 3, 5), torch.zeros(2, 5, 7))
    for name in ("matmul0", "matmul1", "matmul2"):
        assert costs[name].forward.macs == 2 * 3 * 5 * 7
        assert costs[name].backward.macs == 2 * 3 * 5 * 7  # b is data
        assert costs[name].parallelism == 3 * 5 * 7
        assert costs[name].saved_bytes == 2 * 5 * 7 * 4  # the gradient of a reads b
