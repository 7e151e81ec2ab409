"""Models that are hard to capture or to cover: an answer for each, never a traceback."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openwafer import OpenWaferError, validate
from openwafer.plan.validation import ValidationReport

X = torch.zeros(4, 6)
IDS = torch.zeros(4, 6, dtype=torch.long)


class Model(nn.Module):
    """A weight in front of a function, so that there is something to train."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x * self.weight)


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Plain(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Shared(nn.Module):
    """One layer used five times, a weight in two places, and a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = self.layer(x)
        return self.head(x).sum()


class Counting(nn.Module):
    """Keeps state of its own: a buffer and a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(6, 1), 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.total += x.sum().detach()
        return self.linear(x).mean() + 0 * self.total


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum()


def _loop_until_small(x: torch.Tensor) -> torch.Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x.sum()


def _branch(x: torch.Tensor) -> torch.Tensor:
    return x.sum() if x.sum() > 0 else -x.sum()


def _recurse(x: torch.Tensor, depth: int) -> torch.Tensor:
    return _recurse(torch.tanh(x), depth - 1) if depth else x.sum()


def _python_math(x: torch.Tensor) -> torch.Tensor:
    return x.sum() * math.sqrt(float(x.abs().sum()))


VALIDATES = {
    "no operation but the product": lambda x: x.sum(),
    "dictionary": lambda x: {"loss": x.mean(), "logits": x},
    "named tuple": lambda x: Plain(x.mean(), x),
    "loss of one element": lambda x: x.sum().reshape(1),
    "in place": lambda x: x.clone().mul_(2).add_(1).relu_().sum(),
    "long loop in Python": lambda x: sum((x + i).mean() for i in range(50)),
    "recursion": lambda x: _recurse(x, 5),
    "slices with steps": lambda x: x[::2, 1::3].sum() + x[..., -1].sum() + x[:, None].sum(),
    "empty tensor": lambda x: x[:, :0].sum() + x.sum(),
    "scalar tensors": lambda x: (x.mean() * torch.tensor(2.0) + torch.tensor(3)).sum(),
    "constants of NumPy": lambda x: (x * torch.from_numpy(numpy.ones(6)).float()).sum(),
    "detached": lambda x: (x * x.detach()).sum(),
    "no gradient at all": lambda x: x.detach().sum(),
    "no_grad inside": lambda x: (x * torch.no_grad()(torch.softmax)(x, -1)).sum(),
    "infinities": lambda x: torch.where(x > 0, x, torch.full_like(x, -math.inf)).exp().sum(),
    "boolean masks": lambda x: (x.masked_fill(x > 0, 0.0) * ((x > 1) | (x < 0))).sum(),
    "einsum of three": lambda x: torch.einsum("ij,ik,il->", x, x, x),
    "half precision inside": lambda x: F.softmax(x.half(), -1).float().sum(),
    "checkpointing": lambda x: torch.utils.checkpoint.checkpoint(
        torch.tanh, x, use_reentrant=False).sum(),
    "vmap": lambda x: torch.vmap(torch.dot)(x, x).sum(),
    "scatter": lambda x: torch.zeros_like(x).scatter_add_(0, IDS, x).sum(),
}  # fmt: skip

EXPLAINED = {
    "branch on a value": _branch,
    "loop on a value": _loop_until_small,
    "item": _python_math,
    "tolist": lambda x: x.sum() * x.tolist()[0][0],
    "numpy": lambda x: x.sum() + float(x.detach().numpy().sum()),
    "boolean index": lambda x: x[x > 0].sum(),
    "nonzero": lambda x: x.nonzero().float().sum() + x.sum(),
    "unique": lambda x: torch.unique(x).sum(),
    "masked_select": lambda x: x.masked_select(x > 0).sum(),
    "custom function": lambda x: Clip.apply(x).sum(),
    "noise": lambda x: (x + torch.randn_like(x)).sum(),
    "complex": lambda x: torch.fft.rfft(x).abs().sum(),
    "float64": lambda x: x.double().exp().sum(),
    "factorization": lambda x: torch.linalg.svdvals(x).sum(),
    "inverse": lambda x: torch.linalg.inv(x.T @ x).sum(),
    "sparse": lambda x: torch.sparse.mm(x.to_sparse(), x.T).sum(),
    "quantized": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255).sum(),
    "no loss": lambda x: x,
    "a list of strings": lambda x: ["loss"],
    "None": lambda x: None,
    "an error of its own": lambda x: x @ x,
    "a name that is not there": lambda x: x.no_such_method(),
}


@pytest.mark.parametrize("name", VALIDATES)
def test_awkward_models_that_run(name) -> None:
    report = validate(Model(VALIDATES[name]), X)
    assert report.ok, str(report)
    assert report.coverage == 1.0
    assert str(report)


def _report_or_error(function: Callable[[torch.Tensor], Any]) -> ValidationReport | OpenWaferError:
    try:
        return validate(Model(function), X)
    except OpenWaferError as error:
        return error


@pytest.mark.parametrize("name", EXPLAINED)
def test_awkward_models_that_are_explained(name) -> None:
    report = _report_or_error(EXPLAINED[name])
    if isinstance(report, OpenWaferError):
        assert report.what
        assert report.hint or report.allowed
        return
    assert not report.ok
    assert 0 <= report.coverage < 1
    text = str(report)
    for refusal in report.refusals:
        assert refusal.file.endswith("test_awkward_models.py")
        assert refusal.line > 0
        assert refusal.reason
        assert refusal.suggestion
        assert refusal.suggestion in text


def test_a_complex_number_is_not_told_to_become_a_real_one() -> None:
    refusals = {r.op: r for r in validate(Model(EXPLAINED["complex"]), X).refusals}
    assert "cosine and sine" in refusals["aten.fft_rfft.default"].suggestion
    assert "imaginary" in refusals["aten.abs.default"].suggestion


def test_models_with_state_and_sharing() -> None:
    assert validate(Shared(), X).ok
    assert validate(Counting(), X).ok


def test_a_lazy_module_is_explained() -> None:
    with pytest.raises(OpenWaferError):
        validate(Lazy(), X)


def test_batches_that_do_not_fit_are_explained() -> None:
    for batch in ({"y": X}, (X, X), "text", [], torch.zeros(4, 7)):
        with pytest.raises(OpenWaferError) as caught:
            validate(Model(lambda x: x.sum()), batch)
        assert caught.value.what


def test_all_refusals_come_at_once_and_repeated_layers_are_folded() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + torch.randn_like(x)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return torch.linalg.matrix_norm(x, "nuc")

    report = validate(Deep(), X)
    text = str(report)
    assert sum(refusal.op == "aten.randn_like.default" for refusal in report.refusals) == 12
    assert any("linalg" in refusal.op for refusal in report.refusals)
    assert text.count("aten.randn_like.default") == 1
    assert "blocks.{0..11} (Block)" in text
    assert "×12" in text
