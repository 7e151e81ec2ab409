"""Models that are hard to capture or to cover: an answer for each, never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
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


@dataclasses.dataclass
class Result:
    loss: torch.Tensor


class Own(torch.Tensor):
    pass


@torch.library.custom_op("openwafer_awkward::without_rule", mutates_args=())
def _without_rule(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@torch.library.custom_op("openwafer_awkward::with_rule", mutates_args=())
def _with_rule(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@_with_rule.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


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


def _checked(x: torch.Tensor) -> torch.Tensor:
    assert torch.isfinite(x).all(), "bad input"
    assert not torch.isnan(x).any()
    assert x.abs().max().item() <= 1e9
    if (x > 1e9).any():
        raise ValueError("too large")
    if torch.isnan(x).any().item():
        warnings.warn("not a number", stacklevel=1)
    return x.sum()


def _autocast_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        product = x @ x.T
    return product.float().sum()


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
    "noise": lambda x: (x + torch.randn_like(x)).sum(),
    "checks of values": lambda x: _checked(x),
    "a distribution": lambda x: torch.distributions.Normal(x, x.exp()).rsample().sum(),
    "reentrant checkpointing": lambda x: torch.utils.checkpoint.checkpoint(
        torch.tanh, x, use_reentrant=True).sum(),
    "a data class": lambda x: Result(x.mean()),
    "gradient inside": lambda x: torch.autograd.grad(
        (x**2).sum(), x, create_graph=True)[0].square().sum(),
    "autocast inside": lambda x: _autocast_inside(x),
    "300 calls deep": lambda x: _recurse(x, 300),
    "Python's maximum": lambda x: max(x.sum(), x.mean()),
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
    "slopes drawn inside": lambda x: F.rrelu(x, training=True).sum(),
    "a generator of its own": lambda x: (
        x * torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    ).sum(),
    "a sample of places": lambda x: x[torch.multinomial(torch.ones(4), 2)].sum(),
    "Python's random": lambda x: x.sum() * random.random(),
    "NumPy's random": lambda x: x.sum() * float(numpy.random.rand()),
    "layers left out at random": lambda x: x.sum() if torch.rand([]) < 0.5 else x.mean(),
    "a hook on a gradient": lambda x: (x.register_hook(lambda g: 2 * g), x.sum())[1],
    "torch.func.grad": lambda x: torch.func.grad(lambda y: (y**3).sum())(x).sum(),
    "a deep copy": lambda x: copy.deepcopy(x.detach()).sum() + x.sum(),
    "memory address": lambda x: x.sum() * (x.data_ptr() % 7),
    "formatted": lambda x: (f"{x.sum():.3f}", x.sum())[1],
    "a subclass": lambda x: x.as_subclass(Own).sum(),
    "torch.cond": lambda x: torch.cond(x.sum() > 0, torch.sum, torch.mean, (x,)),
    "endless recursion": lambda x: _recurse(x, -1),
    "without a fake rule": lambda x: _without_rule(x).sum(),
    "with a fake rule": lambda x: _with_rule(x).sum(),
    "another device": lambda x: (x + torch.zeros(6, device="meta")).sum(),
    "a comparison in sorted": lambda x: sorted([x.sum(), x.mean()])[0],
    "repeats by a tensor": lambda x: x.repeat_interleave(IDS[:, 0] + 1, 0).sum(),
    "float8": lambda x: x.to(torch.float8_e4m3fn).float().sum(),
    "a loss that is a float": lambda x: 1.5,
    "a loss that is a vector": lambda x: x.mean(0),
    "a loss that counts": lambda x: (x > 0).sum(),
    "a file that is not there": lambda x: (Path("/no/such/file").read_text(), x.sum())[1],
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


_LONG = ("endless recursion", "torch.func.grad", "torch.cond", "a distribution")
"""Those that take a second or more."""


def _names(models: Mapping[str, Any]) -> list[Any]:
    return [pytest.param(n, marks=[pytest.mark.slow] if n in _LONG else []) for n in models]


@pytest.mark.parametrize("name", _names(VALIDATES))
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


@pytest.mark.parametrize("name", _names(EXPLAINED))
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


class Signatures(nn.Module):
    """Everything optional, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, *tensors: Any, scale: Any = 1.0, tree: Any = None) -> torch.Tensor:
        found = [t for t in (*tensors, *(tree or {}).values()) if isinstance(t, torch.Tensor)]
        return sum(self.linear(t).sum() for t in found) * scale  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch",
    [(X, X, X), (X, None), (X, 3), {"tree": {"a": X, "b": X}}, {"tree": {"a": X}, "scale": 2},
     (X.T.contiguous().T,), (X[:1].expand(4, 6),), (X[:0],)],
)  # fmt: skip
def test_batches_of_every_structure(batch) -> None:
    assert validate(Signatures(), batch).ok


@pytest.mark.parametrize(
    "tensor",
    [X.to_sparse(), torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)],
    ids=["sparse", "nested"],
)
def test_tensors_that_are_not_dense_are_explained(tensor) -> None:
    with pytest.raises(OpenWaferError) as caught:
        validate(Signatures(), tensor)
    assert "dense" in caught.value.allowed


def _changed(change: Callable[[nn.Linear], Any]) -> nn.Module:
    model = Signatures()
    change(model.linear)
    return model


@pytest.mark.slow
def test_models_that_other_tools_have_changed() -> None:
    parametrizations = nn.utils.parametrizations
    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: layer.register_forward_hook(lambda m, i, o: 2 * o),
        lambda layer: layer.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    ):
        assert validate(_changed(change), X).ok
    assert validate(torch.compile(Signatures(), backend="eager"), X).ok
    assert validate(nn.DataParallel(Signatures()), X).ok


def test_what_a_static_graph_cannot_hold_is_explained() -> None:
    for model in (
        _changed(lambda layer: layer.register_full_backward_hook(lambda m, i, o: None)),
        _changed(lambda layer: layer.weight.register_hook(lambda g: 2 * g)),
        lambda x: x,
        nn.Linear,
        nn.ModuleList([nn.Linear(6, 6)]),
    ):
        with pytest.raises(OpenWaferError) as caught:
            validate(model, X)
        assert caught.value.allowed or caught.value.hint


def test_factors_of_two_dtypes_are_refused_as_eager_refuses_them() -> None:
    report = validate(Signatures().half(), X)
    assert [r.reason for r in report.refusals] == ["factors of different dtypes: float32, float16"]


def test_a_trace_leaves_nothing_in_the_model() -> None:
    class Keeping(Signatures):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, torch.Tensor] = {}
            self.last: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.seen["x"] = self.linear(x)
            self.new = x
            return self.last.sum()

    model = Keeping()
    assert validate(model, X).ok
    assert (model.seen, model.last, hasattr(model, "new")) == ({}, None, False)


def test_a_refusal_shows_the_line_and_a_way_out_that_fits_it() -> None:
    def error_of(name: str) -> OpenWaferError:
        found = _report_or_error(EXPLAINED[name])
        assert isinstance(found, OpenWaferError)
        assert "test_awkward_models.py:" in found.where
        return found

    assert "LayerDrop" in error_of("layers left out at random").what
    assert "layerdrop" in error_of("layers left out at random").hint
    assert "random.random()" in error_of("Python's random").what
    assert "numpy.random.rand()" in error_of("NumPy's random").what
    assert "`return x.sum() if x.sum() > 0 else -x.sum()`" in error_of("branch on a value").what
    assert "create_graph" in error_of("torch.func.grad").hint


@pytest.mark.slow
def test_masks_of_the_transformer_are_not_asked_for_values() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

        def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.model(source, target, tgt_mask=mask).mean()

    assert validate(Causal(), (torch.zeros(2, 5, 8), torch.zeros(2, 4, 8))).ok


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
            return F.rrelu(self.linear(x), training=True)

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
    assert sum(refusal.op == "aten.rrelu.default" for refusal in report.refusals) == 12
    assert any("linalg" in refusal.op for refusal in report.refusals)
    assert text.count("aten.rrelu.default") == 1
    assert "blocks.{0..11} (Block)" in text
    assert "×12" in text
