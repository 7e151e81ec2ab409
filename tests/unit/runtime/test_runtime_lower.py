"""Layers as pure functions: their gradients are those of eager PyTorch, whatever the model does."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import CASES, SLOW, Net, model_of
from runtime_reference import (
    CPU,
    KEY,
    Outcome,
    buffers_of,
    compiled_model,
    compiled_outcome,
    eager_outcome,
)
from torch import nn

from openwafer.errors import DataError
from openwafer.frontends.torch.capture import flatten_batch
from openwafer.runtime.compiled import CompiledModel
from openwafer.runtime.trace import TensorFact


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found.loss, expected.loss, atol=tolerance, rtol=tolerance)
    for name, gradient in expected.gradients.items():
        given = found.gradients[name]
        assert (given is None) == (gradient is None), f"{name}: {given} instead of {gradient}"
        if gradient is not None and given is not None:
            scale = float(gradient.abs().max()) if gradient.numel() else 0.0
            torch.testing.assert_close(
                given, gradient, atol=tolerance * (1 + scale), rtol=0.0, msg=lambda m, n=name: n + m
            )
    for name, buffer in found.buffers.items():
        torch.testing.assert_close(buffer, expected.buffers[name], msg=lambda m, n=name: n + m)


@cache
def compiled_case(name: str) -> CompiledModel:
    return compiled_model(*model_of(name))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_training_equals_eager_autograd(name: str) -> None:
    model, batch = model_of(name)
    found = compiled_outcome(model, batch, compiled=compiled_case(name))
    assert_same(found, eager_outcome(model, batch))


@pytest.mark.parametrize("name", ["conv with batch norm", "gpt, softmax dropout", "lstm"])
def test_evaluation_equals_eager(name: str) -> None:
    model, batch = model_of(name)
    found = compiled_outcome(model, batch, training=False)
    assert_same(found, eager_outcome(model, batch, training=False))


# Under autocast the same kernels run on the same 16-bit operands, so results are equal to the last
# bit but for two things: a weight that two layers read has its gradients added in fp32 here and in
# 16 bits by autograd's shared cast, and sums over layers are added in another order.
@pytest.mark.parametrize(
    ("name", "exact", "dtype"),
    [
        ("mlp", True, torch.float16),
        ("conv with batch norm", True, torch.bfloat16),
        ("gpt, softmax dropout", False, torch.bfloat16),
        ("a module used twice", False, torch.bfloat16),
        ("a module used twice", False, torch.float16),
        ("mean over tokens, then the head", True, torch.bfloat16),
    ],
)
def test_mixed_precision_equals_eager_autocast(name: str, exact: bool, dtype: torch.dtype) -> None:
    model, batch = model_of(name)
    found = compiled_outcome(model, batch, dtype=dtype)
    unit = torch.finfo(dtype).eps
    assert_same(found, eager_outcome(model, batch, dtype=dtype), 1e-7 if exact else 2 * unit)


def _norm_in_float(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    hidden = m.a(x)  # pyright: ignore
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.b(scaled.to(hidden.dtype)).square().mean()  # pyright: ignore


def _masked(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    scores = m.a(x)  # pyright: ignore
    scores = scores.masked_fill(x > 0.5, torch.finfo(scores.dtype).min)
    return m.b(scores.softmax(-1)).square().mean()  # pyright: ignore


@pytest.mark.parametrize("forward", [_norm_in_float, _masked])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_code_that_asks_for_the_dtype_is_captured_as_it_runs(forward, dtype) -> None:
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    batch = (torch.randn(8, 16) * 3,)
    found = compiled_outcome(model, batch, dtype=dtype)
    assert_same(found, eager_outcome(model, batch, dtype=dtype), 1e-6)


# ---------------------------------------------------------------- the cut


def test_copies_are_lowered_once_and_their_gradients_are_their_own() -> None:
    compiled = compiled_case("gpt, four blocks")
    blocks = [layer.functions for layer in compiled.layers if layer.layer.name.startswith("h.")]
    assert len(blocks) == 4
    assert all(functions is blocks[0] for functions in blocks)


def test_saved_bytes_are_what_is_kept() -> None:
    model, batch = model_of("gpt, softmax dropout")
    compiled = compiled_case("gpt, softmax dropout")
    weights = {n: w.detach() for n, w in model.named_parameters()}
    values = compiled.feed(flatten_batch(batch), CPU)
    for layer in compiled.layers:
        held = [weights[n] for n in layer.layer.parameters]
        saved = layer.forward(KEY, held, buffers_of(model, compiled.program), values)
        size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
        assert layer.functions.saved_bytes == size


def test_evaluation_keeps_nothing() -> None:
    model, batch = model_of("mlp")
    compiled = compiled_model(model, batch, training=False)
    assert all(layer.functions.saved_bytes == 0 for layer in compiled.layers)
    assert all(layer.functions.backward_graph is None for layer in compiled.layers)
    assert not compiled.trained


def test_values_go_when_their_last_reader_has_run() -> None:
    model, batch = model_of("unet")
    compiled = compiled_case("unet")
    weights = {n: w.detach() for n, w in model.named_parameters()}
    values = compiled.feed(flatten_batch(batch), CPU)
    for layer in compiled.layers:
        layer.forward(KEY, [weights[n] for n in layer.layer.parameters], {}, values)
    assert set(values) == {compiled.program.loss}


def test_a_batch_in_another_memory_layout_gives_the_same() -> None:
    model, batch = model_of("unet")
    compiled = compiled_case("unet")
    turned = tuple(t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in batch)
    expected = compiled_outcome(model, batch, compiled=compiled)
    assert_same(compiled_outcome(model, turned, compiled=compiled), expected, 1e-7)


def test_weights_in_another_memory_layout_give_the_same() -> None:
    model, batch = model_of("a transposed weight")
    compiled = compiled_case("a transposed weight")
    expected = compiled_outcome(model, batch, compiled=compiled)
    row_by_row = copy.deepcopy(model)
    row_by_row.w = nn.Parameter(model.w.detach().contiguous())  # pyright: ignore
    assert_same(compiled_outcome(row_by_row, batch, compiled=compiled), expected, 1e-7)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.randn(5, 8),), "no tensor at [1]"),
        ((torch.randn(4, 8), torch.zeros(5, dtype=torch.int64)), "shape (4, 8)"),
        ((torch.randn(5, 8).double(), torch.zeros(5, dtype=torch.int64)), "type float64"),
        ((torch.randn(5, 8), torch.zeros(5)), "type float32"),
        ((torch.randn(5, 8), [0] * 5), "no tensor at [1]"),
    ],
)
def test_a_batch_unlike_the_first_is_refused(batch, expected: str) -> None:
    compiled = compiled_case("mlp")
    with pytest.raises(DataError) as caught:
        compiled.feed(flatten_batch(batch), CPU)
    assert expected in caught.value.what
    assert caught.value.allowed


def test_dense_facts() -> None:
    expanded = TensorFact.of(torch.zeros(1, 3).expand(4, 3), requires_grad=False)
    assert not expanded.is_dense
    assert expanded.dense().strides == (3, 1)
    turned = TensorFact.of(torch.zeros(4, 3).t(), requires_grad=True)
    assert turned.is_dense
    assert turned.dense() == turned


def test_late_buffers_are_those_that_a_later_layer_updates() -> None:
    assert compiled_case("conv with batch norm").late_buffers == []
    late = compiled_case("batch norm used twice").late_buffers
    assert late == ["bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]


def test_draws_are_numbered_through_all_layers() -> None:
    compiled = compiled_case("gpt, fused attention dropout")
    # Embedding: 1. A block: attention, after attention, after the feed-forward.
    assert [layer.first_draw for layer in compiled.layers] == [0, 1, 4, 7]


def test_a_lowered_model_can_be_made_for_every_microbatch_key() -> None:
    """Another key draws other masks; the same key the same."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.a(F.dropout(x, 0.5)).sum(), a=nn.Linear(64, 1))
    compiled = compiled_model(model, (torch.randn(4, 64),))
    weights = [w.detach() for w in model.parameters()]

    def loss(microbatch: int) -> float:
        values = compiled.feed({"[0]": torch.ones(4, 64)}, CPU)
        key = KEY.__class__(1, 1, microbatch, 0)
        compiled.layers[0].forward(key, weights, {}, values)
        return float(values[compiled.program.loss])

    assert loss(0) == loss(0) != loss(1)
