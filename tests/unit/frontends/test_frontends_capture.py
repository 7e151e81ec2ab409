"""Capture: the Program says what the model is and where each operation is from, and a model that
cannot be captured faithfully is refused with the user's line."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openwafer.errors import CaptureError, ConfigError
from openwafer.frontends.torch.capture import (
    capture_module,
    capture_step,
    extract_loss,
    flatten_batch,
)
from openwafer.graph.program import Program, site_of
from openwafer.graph.text import program_text

USER_CODE = """
import torch
import torch.nn.functional as F
from torch import nn


def scaled(x, factor):
    y = x * factor  # helper
    return torch.tanh(y)  # helper end


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        h = self.linear(x)  # linear
        with torch.no_grad():
            level = h.mean()  # no grad
        with torch.autocast("cpu", dtype=torch.bfloat16):
            g = self.linear(h)  # autocast
        return scaled(h, 2.0) + x - level + g.float()  # sum


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return loss_of(x, y)


def loss_of(x, y):
    return F.mse_loss(x, y)  # loss


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)


class Branch(Base):
    def forward(self, x):
        if x.sum() > 0:  # culprit
            return self.a(x).mean()
        return x.mean()


class Item(Base):
    def forward(self, x):
        return self.a(x).mean() * x.sum().item()  # culprit


class Float(Base):
    def forward(self, x):
        return self.a(x).mean() * float(x.sum())  # culprit


class ToList(Base):
    def forward(self, x):
        return self.a(x).mean() * sum(x[0].tolist())  # culprit


class Numpy(Base):
    def forward(self, x):
        return self.a(x).mean() + x.numpy().sum()  # culprit


class Masked(Base):
    def forward(self, x):
        h = self.a(x)
        return h[x > 0].mean()  # culprit


class Nonzero(Base):
    def forward(self, x):
        return self.a(x).mean() + torch.nonzero(x).float().mean()  # culprit


class InPlace(Base):
    def forward(self, x):
        x.relu_()  # culprit
        return self.a(x).mean()


class Clamped(Base):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.clamp_(-1, 1)  # culprit
        return self.a(x).mean()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0]


class Custom(Base):
    def forward(self, x):
        return Square.apply(self.a(x)).mean()  # culprit


class NoRule(Base):
    def forward(self, x):
        return torch.ops.openwafer_tests.without_rule(self.a(x)).mean()  # culprit


class Shapes(Base):
    def forward(self, x):
        return (self.a(x) @ x).mean()  # culprit


class Raises(Base):
    def forward(self, x):
        return self.missing(x)  # culprit


class NoLoss(Base):
    def forward(self, x):  # culprit
        return {"logits": self.a(x)}


class Vector(Base):
    def forward(self, x):  # culprit
        return self.a(x).mean(0)


class Integer(Base):
    def forward(self, x):  # culprit
        return self.a(x).argmax()


class Echo(Base):
    def forward(self, x):  # culprit
        return self.a.bias[0] * 0 + x.mean() if False else self.anchor


class Cond(Base):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda t: self.a(t), lambda t: t * 1, (x,)).mean()  # culprit
"""

library = torch.library.Library("openwafer_tests", "DEF")
library.define("without_rule(Tensor x) -> Tensor")
library.impl("without_rule", lambda x: x * 2, "CPU")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    path = tmp_path_factory.mktemp("user") / "user_model.py"
    path.write_text(USER_CODE)
    spec = importlib.util.spec_from_file_location("user_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_model"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["user_model"]


def line_of(mark: str, after: str = "") -> int:
    start = USER_CODE.index(after)
    return USER_CODE[: USER_CODE.index(f"# {mark}", start)].count("\n") + 1


# ---------------------------------------------------------------- places


@pytest.fixture(scope="module")
def placed(user: ModuleType) -> Program:
    return capture_module(user.Model(), (torch.randn(2, 6), torch.randn(2, 6))).program


@pytest.mark.parametrize(
    ("operation", "module", "kind", "mark"),
    [
        ("aten.linear.default", "blocks.0.linear", "Linear", "linear"),
        ("aten.mul.Tensor", "blocks.0", "Block", "helper"),
        ("aten.tanh.default", "blocks.0", "Block", "helper end"),
        ("aten.mean.default", "blocks.0", "Block", "no grad"),
        ("aten.sub.Tensor", "blocks.0", "Block", "sum"),
        ("aten.mse_loss.default", "", "Model", "loss"),
    ],
)
def test_each_operation_has_its_module_and_line(
    placed: Program, user, operation: str, module: str, kind: str, mark: str
) -> None:
    node = next(n for n in placed.operations if str(n.target) == operation)
    site = site_of(node)
    assert (site.module, site.module_type, site.file) == (module, kind, user.__file__)
    assert site.line == line_of(mark)


def test_no_operation_is_without_a_place(placed: Program, user: ModuleType) -> None:
    for node in placed.operations:
        assert site_of(node).file == user.__file__, node


def test_operations_in_an_autocast_region_keep_their_place(placed: Program) -> None:
    casted = [n for n in placed.operations if getattr(n.meta["val"], "dtype", 0) == torch.bfloat16]
    assert {site_of(n).module for n in casted} == {"blocks.0.linear", "blocks.1.linear"}
    assert {site_of(n).line for n in casted} == {line_of("autocast")}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Branch", "value of a tensor"),
        ("Item", "value of a tensor"),
        ("Float", "value of a tensor"),
        ("ToList", "value of a tensor"),
        ("Numpy", "value of a tensor"),
        ("Masked", "value of a tensor"),
        ("Nonzero", "value of a tensor"),
        ("InPlace", "changes its input"),
        ("Clamped", "changes its weight model.a.weight"),
        ("Custom", "Square is a custom torch.autograd.Function"),
        ("NoRule", "no rule for shapes"),
        ("Shapes", "own code failed while it was traced: RuntimeError"),
        ("Raises", "AttributeError"),
        ("NoLoss", "returned dict"),
        ("Vector", "shape (6,)"),
        ("Integer", "type int64"),
        ("Cond", "control-flow operator"),
    ],
)
def test_a_model_that_cannot_be_captured(name: str, part: str, user: ModuleType, capsys) -> None:
    model = getattr(user, name)()
    with pytest.raises(CaptureError) as caught:
        capture_module(model, (torch.randn(2, 6),))
    assert part in caught.value.what
    line = line_of("culprit", f"class {name}(")
    assert caught.value.where == f"{user.__file__}:{line}"
    assert caught.value.hint


def test_a_custom_function_may_run_in_evaluation(user: ModuleType) -> None:
    """Its forward is all there is then."""
    captured = capture_module(user.Custom(), (torch.randn(2, 6),), training=False)
    assert captured.program.loss
    assert (
        torch.autograd.Function.__dict__["apply"].__func__.__module__ == "torch.autograd.function"
    )


def test_a_custom_function_is_refused_again_after_a_refusal(user: ModuleType) -> None:
    for _ in range(2):
        with pytest.raises(CaptureError, match="Square"):
            capture_module(user.Custom(), (torch.randn(2, 6),))
    result = user.Square.apply(torch.ones(2, requires_grad=True))  # and works as ever elsewhere
    assert result.grad_fn is not None


@pytest.mark.parametrize("batch", [object(), {"x": object()}, torch.zeros(2, 6).numpy()])
def test_a_batch_of_other_objects(batch: Any) -> None:
    with pytest.raises(CaptureError, match="batch holds an object"):
        capture_module(nn.Linear(6, 6), batch)


def test_a_lazy_layer_and_a_buffer_with_two_names() -> None:
    with pytest.raises(CaptureError, match="lazy layer"):
        capture_module(nn.Sequential(nn.LazyLinear(3)), (torch.randn(2, 6),))
    norm = nn.BatchNorm1d(6)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x)).mean()

    with pytest.raises(CaptureError, match="known under two names"):
        capture_module(Twice(), (torch.randn(2, 6),))


class Loss(nn.Module):
    """A linear layer and what `finish` makes of its result."""

    def __init__(self, finish: Callable[..., Any] = torch.mean) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.finish = (finish,)

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        return self.finish[0](self.a(x), *rest)


def test_a_loss_that_is_not_computed() -> None:
    class Echo(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(CaptureError, match="not computed") as caught:
        capture_module(Echo(), (torch.tensor(1.0),))
    assert "test_frontends_capture.py:" in caught.value.where


def test_an_error_of_ours_in_user_code_passes_through() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ConfigError("not so")

    with pytest.raises(ConfigError, match="not so"):
        capture_module(Loss(fail), (torch.randn(2, 6),))


# ---------------------------------------------------------------- the loss


class Output:
    def __init__(self, loss: torch.Tensor | None) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, "more"),
        lambda t: [t],
        lambda t: {"logits": None, "loss": t},
        Output,
        lambda t: t.reshape(1),
    ],
)
def test_where_the_loss_is(wrap: Callable[[torch.Tensor], Any]) -> None:
    assert float(extract_loss(wrap(torch.tensor(2.5)))) == 2.5


@pytest.mark.parametrize("outputs", [None, (), {}, {"loss": None}, Output(None), "x", 1.0])
def test_no_loss(outputs: Any) -> None:
    with pytest.raises(CaptureError, match="no loss"):
        extract_loss(outputs)


# ---------------------------------------------------------------- what is left as it was


def test_capture_leaves_the_model_and_the_generators_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model[1].eval()
    model[0].weight.grad = torch.ones(6, 6)
    torch.manual_seed(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    for training in (True, False):
        capture_step(
            {"model": model}, lambda b: model(b).mean(), torch.randn(4, 6).requires_grad_(),
            training=training, name="m",
        )  # fmt: skip
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(CaptureError):
        capture_step({"model": model}, lambda b: model(b), torch.ones(4, 6), training=True, name="")
    assert [module.training for module in model.modules()] == modes
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert type(tensor) is torch.Tensor
    assert torch.equal(model[0].weight.grad, torch.ones(6, 6))
    assert not logging.root.manager.disable


def test_the_generator_is_where_it_was() -> None:
    model = Loss(lambda h: (F.dropout(h, 0.5) + torch.randn_like(h)).mean())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    capture_module(model, (torch.ones(2, 6),))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_user_prints_is_printed(capsys) -> None:
    def finish(h: torch.Tensor) -> torch.Tensor:
        print("shape", tuple(h.shape))
        print("to stderr", file=sys.stderr)
        return h.mean()

    capture_module(Loss(finish), (torch.randn(2, 6),))
    printed = capsys.readouterr()
    assert "shape (2, 6)" in printed.out
    assert printed.err == "to stderr\n"


# ---------------------------------------------------------------- what is in the Program


def test_weights_buffers_inputs_and_shapes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight
            self.norm = nn.BatchNorm1d(6)
            self.norm.weight.requires_grad_(False)
            self.register_buffer("mask", torch.ones(6), persistent=False)

        def forward(self, ids: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
            hidden = self.norm(self.embed(ids) * self.mask) + torch.tensor([0.5] * 6)
            return F.cross_entropy(self.head(hidden), more["labels"][0])

    batch = {"ids": torch.arange(4), "more": {"labels": [torch.arange(4)], "absent": None}}
    program = capture_module(Model(), batch).program
    weights = {p.name: p for p in program.parameters}
    assert weights["embed.weight"].aliases == ("head.weight",)
    assert [p.name for p in program.parameters if p.trainable] == ["embed.weight", "norm.bias"]
    assert str(weights["embed.weight"].spec) == "float32[7×6]"
    buffers = {b.name: b for b in program.buffers}
    assert not buffers["mask"].persistent
    assert buffers["norm.running_mean"].update
    assert buffers["norm.running_mean"].persistent
    assert buffers["mask"].update is None
    assert buffers[""].value.tolist() == [0.5] * 6
    assert [i.path for i in program.inputs] == ["['ids']", "['more']['labels'][0]"]
    assert program.num_samples == 4
    assert program.num_parameters == 7 * 6 + 12
    assert program.model_name == "Model"
    assert [i.path for i in program.inputs] == [
        path for path, leaf in flatten_batch(batch).items() if leaf is not None
    ]


def test_numbers_in_a_batch_are_said_once(caplog) -> None:
    capture_module(Loss(lambda h, factor: h.mean() * factor), (torch.randn(2, 6), 2.5))
    assert "[1]" in caplog.text
    assert "not tensors" in caplog.text


def test_a_random_result_that_nothing_reads_is_said(caplog) -> None:
    def finish(h: torch.Tensor) -> torch.Tensor:
        F.dropout(h, 0.5)
        F.dropout(h, 0.5, training=False)
        return F.dropout(h, 0.5).mean()

    capture_module(Loss(finish), (torch.randn(2, 6),))
    (record,) = [record for record in caplog.records if record.name == "openwafer"]
    assert "test_frontends_capture.py:" in record.getMessage()


def test_modules_beside_the_model_are_read_but_not_trained(caplog) -> None:
    model, criterion = nn.Linear(6, 6), nn.BatchNorm1d(6)
    criterion.shared = model
    program = capture_step(
        {"model": model, "criterion": criterion},
        lambda x: criterion(model(x)).mean(),
        torch.randn(4, 6),
        training=True,
        name="m",
    ).program
    assert [(p.name, p.aliases) for p in program.parameters] == [("weight", ()), ("bias", ())]
    buffers = {b.name: b for b in program.buffers}
    assert {"criterion.weight", "criterion.bias", "criterion.running_mean"} <= buffers.keys()
    assert not any(buffer.persistent for buffer in buffers.values())
    assert "criterion.weight is not in the model itself" in caplog.text


def test_a_model_on_the_meta_device_is_captured_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50_000, 8_192), nn.Linear(8_192, 50_000))

    def call(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])
        return (model(ids) + positions[:, None]).mean()

    ids = torch.zeros(2, 1024, dtype=torch.int64)
    program = capture_step({"model": model}, call, ids, training=True, name="m").program
    assert program.num_parameters == 2 * 50_000 * 8_192 + 50_000


def test_the_graph_under_autocast_has_its_casts() -> None:
    batch = (torch.randn(2, 6),)
    wide = capture_module(Loss(), batch).program
    narrow = capture_module(Loss(), batch, autocast_dtype=torch.bfloat16).program
    assert {n.meta["val"].dtype for n in wide.operations} == {torch.float32}
    assert [str(n.target) for n in narrow.operations].count("aten._to_copy.default") == 3
    assert not torch.is_autocast_enabled("cpu")
    casts = [n for n in narrow.operations if "_to_copy" in str(n.target)]
    assert {site_of(n).module for n in casts} == {"a"}


class _Language(nn.Module):
    """A tied head, a buffer, a constant in an attribute and one made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(8))
        self.offset = torch.ones(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(ids) * self.scale + self.offset)
        x = x + torch.arange(ids.shape[1]).to(x.dtype)[:, None]
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("training", [True, False])
def test_autocast_on_the_meta_device_gives_the_casts_of_the_cpu(training: bool) -> None:
    model = _Language()
    with torch.device("meta"):
        outline = _Language()
    weights = dict(outline.named_parameters())
    ids = torch.zeros(2, 5, dtype=torch.int64)
    texts = [
        program_text(
            capture_module(m, ids, training=training, autocast_dtype=torch.bfloat16).program
        )
        for m in (model, outline)
    ]
    assert "bfloat16" in texts[0]
    assert texts[0] == texts[1]
    assert all(weight is weights[name] for name, weight in outline.named_parameters())
    assert outline.offset.is_meta
    assert outline.scale.is_meta
