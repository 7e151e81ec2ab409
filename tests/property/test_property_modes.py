"""Random small models, optimizers and schedules of work: every mode gives the same numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_reference import (
    Setup,
    assert_states_equal,
    batches_like,
    optimizer_config,
    run_steps,
)
from torch import nn

from openwafer.config.hyperparameters import HYPERPARAMETERS
from openwafer.config.optimizer import OptimizerConfig

WIDTH = 6
KINDS = ("linear", "residual", "norm", "dropout", "batch norm", "tied", "transpose", "mean", "skip")


class Random(nn.Module):
    """A chain of elements over [batch, WIDTH, WIDTH]; `skip` adds what the last skip left."""

    def __init__(self, kinds: list[str], frozen: bool) -> None:
        super().__init__()
        self.kinds = kinds
        self.first = nn.Linear(WIDTH, WIDTH)
        self.h = nn.ModuleList(self._element(kind) for kind in kinds)
        self.head = nn.Linear(WIDTH, 3)
        if frozen:
            for weight in self.h.parameters():
                weight.requires_grad_(False)

    def _element(self, kind: str) -> nn.Module:
        if kind in ("linear", "residual", "transpose"):
            return nn.Linear(WIDTH, WIDTH)
        if kind == "norm":
            return nn.LayerNorm(WIDTH)
        if kind == "batch norm":
            return nn.BatchNorm1d(WIDTH)
        if kind == "dropout":
            return nn.Dropout(0.3)
        return nn.Identity()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = left = self.first(x)
        for kind, element in zip(self.kinds, self.h, strict=True):
            if kind == "residual":
                x = x + F.gelu(element(x))
            elif kind == "transpose":
                x = element(x).transpose(1, 2)
            elif kind == "mean":
                x = x - x.mean(1, keepdim=True)
            elif kind == "tied":
                x = F.linear(x.tanh(), self.first.weight)
            elif kind == "skip":
                x, left = x + left, x
            else:
                x = element(x)
        return F.cross_entropy(self.head(x.mean(1)), labels)


models = st.builds(Random, st.lists(st.sampled_from(KINDS), max_size=5), st.booleans())


@st.composite
def optimizers(draw: st.DrawFn) -> OptimizerConfig:
    clipping: dict[str, Any] = draw(
        st.sampled_from(({}, {"max_gradient_norm": 0.1}, {"max_gradient_value": 0.01}))
    )
    scaling: dict[str, Any] = draw(
        st.sampled_from(
            (
                {},
                {"loss_scaling_factor": 128.0},
                {"loss_scaling_factor": "dynamic", "steps_per_increase": 1},
            )
        )
    )
    # Far from zero: near it, adaptive optimizers turn rounding into a full step.
    own = {"eps": 1e-3} if (name := draw(st.sampled_from(list(HYPERPARAMETERS)))) == "adamw" else {}
    return optimizer_config(name, **own, **clipping, **scaling)


BATCH = (
    torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)),
    torch.arange(4) % 3,
)


def assert_layers_sound(setup: Setup) -> None:
    """Every operation once, and each layer reads what is there."""
    program = setup.train.program
    operations = [node.name for node in program.operations]
    assert [name for layer in setup.layers for name in layer.nodes] == operations
    known = {entry.node for entry in program.inputs}
    for layer in setup.layers:
        assert set(layer.inputs) <= known
        known |= set(layer.outputs)
    assert program.loss in known


@settings(
    max_examples=7,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    model=models,
    config=optimizers(),
    microbatches=st.integers(1, 3),
    depth=st.integers(0, 3),
    on_disk=st.booleans(),
)
def test_streamed_equals_resident_bit_for_bit(
    model: nn.Module, config: OptimizerConfig, microbatches: int, depth: int, on_disk: bool
) -> None:
    setup = Setup(model, BATCH)
    assert_layers_sound(setup)
    data = batches_like(BATCH, 3 * microbatches)
    with tempfile.TemporaryDirectory() as folder:
        resident = setup.pipelined(config)
        streamed = setup.streaming(config, Path(folder) if on_disk else None, depth=depth)
        results = [run_steps(e, data, microbatches=microbatches) for e in (resident, streamed)]
        for expected, found in zip(*results, strict=True):
            assert float(found.loss) == float(expected.loss)
            assert (found.applied, found.grad_norm, found.loss_scale) == (
                expected.applied,
                expected.grad_norm,
                expected.loss_scale,
            )
        assert_states_equal(streamed.state(), resident.state())
        streamed.close()


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    model=models,
    microbatches=st.integers(1, 3),
    clipping=st.sampled_from(({}, {"max_gradient_norm": 0.1})),
    scaling=st.sampled_from((None, 128.0, "dynamic")),
)
def test_resident_equals_the_plain_loop(
    model: nn.Module, microbatches: int, clipping: dict[str, Any], scaling: Any
) -> None:
    """With SGD: compared is the gradient, not what an adaptive step makes of its rounding."""
    config = optimizer_config("sgd", momentum=0.9, loss_scaling_factor=scaling, **clipping)
    setup = Setup(model, BATCH)
    data = batches_like(BATCH, 3 * microbatches)
    states = []
    for executor in (setup.plain(config), setup.pipelined(config)):
        run_steps(executor, data, microbatches=microbatches)
        states.append(executor.state())
    assert_states_equal(states[1], states[0], 1e-5)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    model=models,
    config=optimizers(),
    microbatches=st.integers(1, 3),
    depth=st.integers(0, 3),
    dtype=st.sampled_from((None, torch.bfloat16)),
)
def test_streamed_equals_resident_at_length(model, config, microbatches, depth, dtype) -> None:
    setup = Setup(model, BATCH, dtype=dtype)
    data = batches_like(BATCH, 4 * microbatches)
    resident, streamed = setup.pipelined(config), setup.streaming(config, depth=depth)
    for executor in (resident, streamed):
        run_steps(executor, data, microbatches=microbatches)
    assert_states_equal(streamed.state(), resident.state())
    streamed.close()
