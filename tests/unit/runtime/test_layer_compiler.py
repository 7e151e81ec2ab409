"""Layers compiled by TorchInductor: when, with which forms, and with which numbers."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import runtime_reference as reference
import torch
import torch.nn.functional as F
from runtime_reference import Setup, batches_like, optimizer_config, run_steps
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import openwafer.runtime.compiled as compiled_module
import openwafer.runtime.forms.inductor as inductor
from openwafer.errors import PlanError
from openwafer.frontends.torch.capture import capture_module
from openwafer.graph.program import Program
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import CompiledModel, compile_layers
from openwafer.runtime.forms.replacements import Forms
from openwafer.zoo import build

BLOCK = 16


@functools.cache
def gpt2(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "hidden_size": 32, "filter_size": 64, "vocab_size": 97}
    return build("gpt2/tiny", **{**sizes, "max_position_embeddings": 24, **changes})


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a compiled layer is made of but the compiling: the graph runs as it is."""

    def as_it_is(graph, *, name, required):
        return graph

    monkeypatch.setattr(inductor, "_InductorGraph", as_it_is)
    monkeypatch.setattr(compiled_module, "measured_block", lambda use: BLOCK)


_programs: dict[Any, Program] = {}


def program_of(model: nn.Module, batch, dtype=None) -> Program:
    """Captured once for each model of this file and precision; batches of one shape."""
    key = (model, dtype)
    if key not in _programs:
        captured = capture_module(model, batch, training=True, autocast_dtype=dtype)
        _programs[key] = captured.program
    return _programs[key]


def compiled(model: nn.Module, batch, compiler: str, dtype=None) -> CompiledModel:
    program = program_of(model, batch, dtype)
    return compile_layers(program, cut_layers(program), layer_compiler=compiler)


def assert_equals_eager(model, batch, compiler, *, dtype=None, tolerance: float) -> None:
    expected = reference.eager_outcome(model, batch, dtype=dtype)
    found = reference.compiled_outcome(
        model, batch, dtype=dtype, compiled=compiled(model, batch, compiler, dtype)
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0.0)
    largest = max(g.abs().max() for g in expected.gradients.values() if g is not None)
    for name, gradient in expected.gradients.items():
        other = found.gradients[name]
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            assert (gradient - other).abs().max() <= 10 * tolerance * largest, name


# ---------------------------------------------------------------- forms


def replaced(model: nn.Module, batch, dtype=None) -> list[str]:
    """`causal`, `biased`, `attention` or `head`, for each operation that takes another form."""
    program = program_of(model, batch, dtype)
    forms = Forms(program, lambda use: BLOCK)
    found: list[str] = []
    for layer in cut_layers(program):
        for replacement in forms.of(layer).values():
            shape = getattr(replacement.function, "shape", None)
            biased = replacement.arguments[-1] is not None
            kind = "causal" if shape and shape.causal else "biased" if biased else "attention"
            found.append(kind if shape else "head")
    return found


def test_a_mask_that_hides_the_future_is_known_to_before_the_run() -> None:
    model = gpt2(dropout_rate=0.0, attention_dropout_rate=0.0)
    assert replaced(model, model.example_batch(2)) == ["causal", "causal", "head"]


class Attends(nn.Module):
    """One attention under a mask made by `mask(x)`; the loss is its mean square."""

    def __init__(self, mask, **options) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24)
        self.mask, self.options = mask, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.linear(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        mask = self.mask(x) if self.mask else None
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options).square().mean()


def upper(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[1], x.shape[1]).triu(1)


MASKS = {
    "none": (None, {}, ["attention"]),
    "is_causal": (None, {"is_causal": True}, ["causal"]),
    "minus infinity": (lambda x: upper(x).masked_fill(upper(x) > 0, -torch.inf), {}, ["causal"]),
    "boolean": (lambda x: upper(x) == 0, {}, ["causal"]),
    "too little": (lambda x: upper(x) * -50.0, {}, ["biased"]),
    "a bias in what is seen": (lambda x: upper(x) * -1e4 + 0.5, {}, ["biased"]),
    "shifted": (lambda x: torch.ones(5, 5).triu(2) * -1e4, {}, ["biased"]),
    "of the batch": (lambda x: (x[:, None, None, :, 0] > 0).float(), {}, None),
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", MASKS)
def test_attention_under_each_mask_equals_eager(case: str) -> None:
    mask, options, kinds = MASKS[case]
    torch.manual_seed(0)
    model, batch = Attends(mask, **options), {"x": torch.randn(3, 5, 8)}
    if kinds is not None:
        assert replaced(model, batch) == kinds
    assert_equals_eager(model, batch, "inductor", tolerance=2e-6)


class Head(nn.Module):
    """Hidden values, a linear layer and its cross entropy, written in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 8), nn.Linear(8, 11, bias="bias" in way)
        self.way = way

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.first(x))
        if "shifted" in self.way:
            logits, labels = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
        if "cast" in self.way:
            logits = logits.float()
        smoothing = 0.1 if "smooth" in self.way else 0.0
        loss = F.cross_entropy(
            logits.reshape(-1, 11),
            labels.reshape(-1),
            ignore_index=3,
            label_smoothing=smoothing,
        )
        return loss + logits.mean() if "used twice" in self.way else loss


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("way", "fused"),
    [
        ("plain", True),
        ("bias", True),
        ("shifted, cast", True),
        ("smooth", False),
        ("used twice", False),
    ],
)
def test_a_loss_head_is_found_where_its_logits_are_read_by_the_loss_alone(way, fused) -> None:
    torch.manual_seed(0)
    model = Head(way)
    batch = {"x": torch.randn(2, 5, 6), "labels": torch.randint(0, 11, (2, 5))}
    assert replaced(model, batch) == (["head"] if fused else [])
    assert_equals_eager(model, batch, "inductor", tolerance=2e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_forms_of_gpt2_equal_eager_with_the_same_draws(dropout: float) -> None:
    model = gpt2(dropout_rate=dropout, attention_dropout_rate=dropout)
    assert_equals_eager(model, model.example_batch(2), "inductor", tolerance=2e-6)


@pytest.mark.usefixtures("uncompiled")
def test_forms_of_gpt2_equal_autocast_within_its_rounding() -> None:
    """bf16 keeps 8 bits: a loss near log(97) = 4.6 over 48 tokens is off by far less."""
    model = gpt2(dropout_rate=0.0, attention_dropout_rate=0.0)
    batch = model.example_batch(2)
    expected = reference.eager_outcome(model, batch, dtype=torch.bfloat16)
    found = reference.compiled_outcome(
        model,
        batch,
        dtype=torch.bfloat16,
        compiled=compiled(model, batch, "inductor", torch.bfloat16),
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=2**-10, atol=0.0)


@pytest.mark.usefixtures("uncompiled")
def test_no_fp32_logits_are_kept() -> None:
    class Wide(nn.Linear):
        def forward(self, x, labels):
            return F.cross_entropy(super().forward(x).float(), labels)

    model = Wide(8, 4096)
    batch = {"x": torch.randn(48, 8), "labels": torch.randint(0, 4096, (48,))}
    head = compiled(model, batch, "inductor", torch.bfloat16).layers[-1].functions
    plain = compiled(model, batch, "eager", torch.bfloat16).layers[-1].functions
    logits = 48 * 4096
    assert plain.saved_bytes > 4 * logits
    assert head.saved_bytes < 2.5 * logits


# ---------------------------------------------------------------- when layers are compiled


CPU = torch.device("cpu")


def test_auto_compiles_what_repays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.shutil, "which", lambda name: "/usr/bin/g++")
    sizes = {1 << 20: "eager", 1 << 33: "auto"}
    for size, expected in sizes.items():
        assert inductor.chosen_compiler("auto", device=CPU, activation_bytes=size) == expected
    assert inductor.chosen_compiler("eager", device=CPU, activation_bytes=1 << 40) == "eager"


@pytest.mark.parametrize(("given", "alone"), [("gelu", False), ("tanh", True), ("both", True)])
def test_only_a_tanh_that_is_a_result_keeps_the_slow_form(given, alone, monkeypatch) -> None:
    """Around 0 the fast form is off by 1e-7, which gelu's 1 + tanh does not show."""
    patches: list[dict[str, Any]] = []

    def noted(graph, tensors, *, dynamic_shapes, options):
        patches.append(options["config_patches"])
        return graph

    monkeypatch.setattr("torch._inductor.standalone_compile", noted)

    class Layer(nn.Module):
        def forward(self, x):
            first = F.gelu(x, approximate="tanh") if given != "tanh" else x
            return first if given == "gelu" else torch.ops.aten.tanh(first)

    inductor.compile_graph(make_fx(Layer())(torch.rand(3)), [torch.rand(3)])
    assert patches[0]["cpp.use_decompose_tanh"] == (not alone)


def test_without_a_compiler_auto_does_without_and_inductor_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inductor.shutil, "which", lambda name: None)
    assert inductor.chosen_compiler("auto", device=CPU, activation_bytes=1 << 40) == "eager"
    with pytest.raises(PlanError) as raised:
        inductor.chosen_compiler("inductor", device=CPU, activation_bytes=0)
    assert "C++ compiler" in str(raised.value)
    assert "eager" in str(raised.value)


def test_a_layer_that_cannot_be_compiled_runs_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor

    def broken(*arguments, **options):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch._inductor, "standalone_compile", broken)
    graph = torch.fx.symbolic_trace(lambda x: (x + 1,))
    with caplog.at_level(logging.WARNING, "openwafer"):
        run = inductor._InductorGraph(graph, name="h.0", required=False)
        assert torch.equal(run(torch.ones(2))[0], torch.full((2,), 2.0))
        run(torch.ones(2))
    assert [record.getMessage().count("h.0") for record in caplog.records] == [1]
    with pytest.raises(PlanError, match=r"layer h\.0"):
        inductor._InductorGraph(graph, name="h.0", required=True)(torch.ones(2))


# ---------------------------------------------------------------- 16-bit weights


def test_layers_take_the_weights_that_autocast_casts_in_16_bits() -> None:
    model = gpt2(dropout_rate=0.0, attention_dropout_rate=0.0)
    layers = compiled(model, model.example_batch(2), "eager", torch.bfloat16).layers
    taken = {(w.name.rsplit(".", 2)[-2], w.dtype) for layer in layers for w in layer.streamed}
    assert ("word_embeddings", torch.float32) in taken  # looked up in fp32
    assert ("word_embeddings", torch.bfloat16) in taken  # the tied output layer
    assert ("proj_q_dense_layer", torch.bfloat16) in taken
    assert ("norm1", torch.float32) in taken
    assert ("proj_q_dense_layer", torch.float32) not in taken


def test_copies_of_weights_are_as_fresh_as_autocasts() -> None:
    """Equal losses bit for bit, step after step: each step casts the updated weights."""
    model = gpt2(dropout_rate=0.0, attention_dropout_rate=0.0)
    setup = Setup(model, model.example_batch(2), dtype=torch.bfloat16)
    batches = batches_like(setup.batch, 6)
    found = run_steps(setup.pipelined(optimizer_config()), batches, microbatches=2)
    expected = run_steps(setup.plain(optimizer_config()), batches, microbatches=2)
    assert [r.loss for r in found] == [r.loss for r in expected]


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_losses_of_compiled_layers_equal_the_plain_loops(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: within 2e-6. bf16: fused operations keep fp32 between them where eager ones round to
    8 bits, and Adam moves a weight by the rate, 0.05 here, however small its gradient: a rounding
    that turns a sign grows to half a percent of the loss within these four steps."""
    monkeypatch.setattr(compiled_module, "measured_block", lambda use: BLOCK)
    model = gpt2(dropout_rate=0.1, attention_dropout_rate=0.1)
    setup = Setup(model, model.example_batch(2), dtype=dtype)
    setup.train = compiled(model, setup.batch, "inductor", dtype)
    config = optimizer_config(max_gradient_norm=1.0)
    batches = batches_like(setup.batch, 8)
    expected = [r.loss for r in run_steps(setup.plain(config), batches, microbatches=2)]
    resident = [r.loss for r in run_steps(setup.pipelined(config), batches, microbatches=2)]
    streamed = [r.loss for r in run_steps(setup.streaming(config), batches, microbatches=2)]
    assert resident == streamed
    tolerance = 2e-6 if dtype is None else 2**-6
    torch.testing.assert_close(
        torch.stack(resident), torch.stack(expected), rtol=tolerance, atol=0.0
    )


@pytest.mark.slow
def test_the_form_of_an_attention_is_measured_once_and_kept(tmp_path, monkeypatch) -> None:
    from openwafer.runtime.forms import tuning
    from openwafer.runtime.forms.replacements import AttentionUse

    monkeypatch.setattr(tuning, "_file", lambda: tmp_path / "choices.json")
    use = AttentionUse((1, 2, 130, 130, 8), torch.float32, True, False, 0.0)
    first = tuning.measured_block(use)

    def never(use):
        raise AssertionError("measured twice")

    monkeypatch.setattr(tuning, "_measure", never)
    assert tuning.measured_block(copy.deepcopy(use)) == first
    (tmp_path / "choices.json").write_text("{broken")
    with pytest.raises(AssertionError, match="twice"):
        tuning.measured_block(use)
