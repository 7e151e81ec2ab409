"""Matching: every operation once, larger patterns first, all refusals with their places."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from handmade_program import program_of
from openwafer.errors import UnsupportedOpError
from openwafer.graph.program import Program
from openwafer.kernels import KERNELS, Kernel, match
from openwafer.kernels.cost import free_cost
from openwafer.kernels.kernel import BOTH_MODES
from openwafer.kernels.pattern import Const, Leaf, Op, find
from openwafer.kernels.table import table_text

ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.relu,
    F.gelu,
    torch.tanh,
    torch.sigmoid,
    F.silu,
    F.leaky_relu,
    F.elu,
    F.softplus,
    F.mish,
    F.hardswish,
    F.relu6,
)


class Mlp(nn.Module):
    """A random MLP with its accuracy, as fc_mnist has it."""

    def __init__(
        self,
        widths: list[int],
        activation: int = 0,
        dropout: float = 0.0,
        norm: str = "",
        bias: bool = True,
        split_loss: bool = True,
    ) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairs)
        kinds = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "": nn.Identity}
        self.norms = nn.ModuleList(kinds[norm](w) for w in widths[1:-1])
        self.activation = ACTIVATIONS[activation]
        self.dropout = dropout
        self.split_loss = split_loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer, norm in zip(self.layers, [*self.norms, nn.Identity()], strict=True):
            x = norm(layer(x))
            if layer is not self.layers[-1]:
                x = F.dropout(self.activation(x), self.dropout, self.training)
        log_p = F.log_softmax(x, -1)
        loss = F.nll_loss(log_p, y) if self.split_loss else F.cross_entropy(x, y)
        right = (log_p.argmax(-1) == y).to(torch.float32).sum()
        return loss, right / y.numel()


def mlp_program(module: Mlp, batch: int = 8, training: bool = True) -> Program:
    width = module.layers[0].weight.shape[1]
    return program_of(
        module, torch.zeros(batch, width), torch.zeros(batch, dtype=torch.long), training=training
    )


@settings(max_examples=8, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    activation=st.integers(0, len(ACTIVATIONS) - 1),
    dropout=st.sampled_from([0.0, 0.3]),
    norm=st.sampled_from(["", "layer", "batch"]),
    bias=st.booleans(),
    split_loss=st.booleans(),
    training=st.booleans(),
    mode=st.sampled_from(BOTH_MODES),
)
def test_every_operation_is_covered_once(
    widths, activation, dropout, norm, bias, split_loss, training, mode
) -> None:
    module = Mlp(widths, activation, dropout, norm, bias, split_loss)
    program = mlp_program(module, training=training)
    graph = match(program, KERNELS, mode)
    covered = [node.name for m in graph.matches for node in m.nodes]
    assert sorted(covered) == sorted(node.name for node in program.operations)
    order = {node.name: i for i, node in enumerate(program.operations)}
    anchors = [order[m.anchor.name] for m in graph.matches]
    assert anchors == sorted(anchors)
    assert len({m.name for m in graph.matches}) == len(graph.matches)
    owned = [p.name for m in graph.matches for p in m.owned]
    assert sorted(owned) == sorted(p.name for p in program.parameters)


def test_names_and_families() -> None:
    graph = match(mlp_program(Mlp([4, 3, 2], dropout=0.5, split_loss=False)))
    working = [m.name for m in graph.working]
    assert working == ["fc0", "nlin0", "dropout0", "fc1", "loss0", "loss1", "reduce0", "select0",
                       "reduce1", "multiply0"]  # fmt: skip
    by_node = graph.by_node()
    assert by_node["native_dropout"] is by_node["getitem"]


def test_a_larger_pattern_wins_only_if_its_inside_is_private() -> None:
    class Loss(nn.Module):
        def __init__(self, share: bool) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))
            self.share = share

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            log_p = F.log_softmax(x * self.w, -1)
            loss = F.nll_loss(log_p, y)
            return (loss, log_p.argmax(-1)) if self.share else (loss,)

    def kernels(share: bool) -> list[str]:
        program = program_of(Loss(share), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
        return [m.kernel.name for m in match(program).working]

    assert kernels(share=False) == ["mul", "cross_entropy"]
    assert kernels(share=True) == ["mul", "log_softmax", "nll_loss", "argmax"]


def test_the_loss_is_never_hidden_inside_a_pattern() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.nll_loss(F.log_softmax(x, -1), y)

    program = program_of(Log(), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    inner = next(n.name for n in program.operations if "log_softmax" in n.name)
    pinned = Program(
        graph=program.graph, parameters=(), buffers=(), inputs=program.inputs, loss=inner,
        metrics=(), training=False, num_samples=2,
    )  # fmt: skip
    assert [m.kernel.name for m in match(pinned).working] == ["log_softmax", "nll_loss"]


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.rrelu(x, training=True)
        return self.head(torch.fft.fft(x).abs()).sum()


class Head(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x.double()).float()


def test_all_refusals_are_listed_with_their_place() -> None:
    program = program_of(Unsupported(), torch.zeros(4, 3))
    with pytest.raises(UnsupportedOpError) as caught:
        match(program)
    refusals = caught.value.refusals
    ops = [r.op for r in refusals]
    assert "aten.rrelu.default" in ops
    assert "aten.gelu.default" in ops
    text = str(caught.value)
    assert f"{len(refusals)} operations have no kernel in layer_pipelined mode" in text
    lines, start = inspect.getsourcelines(Unsupported.forward)
    noise_line = start + next(i for i, line in enumerate(lines) if "rrelu" in line)
    assert f"test_kernel_match.py:{noise_line}" in text
    lines, start = inspect.getsourcelines(Head.forward)
    gelu_line = start + next(i for i, line in enumerate(lines) if "gelu" in line)
    assert f"head (Head), test_kernel_match.py:{gelu_line}" in text
    assert "(float32[4×3]) -> float32[4×3]" in text
    gelu = next(r for r in refusals if r.op == "aten.gelu.default")
    assert "float64" in gelu.reason
    assert gelu.suggestion == "`.to(torch.float32)`"
    assert (gelu.module, gelu.line) == ("head", gelu_line)
    assert gelu.file.endswith("test_kernel_match.py")
    for refusal in refusals:
        assert refusal.reason in text
        assert refusal.suggestion
        assert refusal.suggestion in text


def test_a_kernel_may_lack_a_mode_and_may_refuse() -> None:
    program = program_of(nn.Sequential(nn.ReLU()), torch.zeros(2, 3))
    only_one = Kernel(
        name="relu", family="nlin", summary="", patterns=(Op("aten.relu.default"),),
        cost=free_cost, modes=("weight_streaming",),
    )  # fmt: skip
    assert len(match(program, [only_one], "weight_streaming").matches) == 1
    with pytest.raises(UnsupportedOpError, match="does not run in layer_pipelined mode"):
        match(program, [only_one], "layer_pipelined")


def test_patterns_bind_and_compare() -> None:
    class Squares(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x * x).sum() + (x * y).sum()

    program = program_of(Squares(), torch.zeros(2, 3), torch.zeros(2, 3))
    same, different = [n for n in program.operations if "mul" in n.name]
    twice = Op("aten.mul.Tensor", Leaf("a"), Leaf("a"))
    assert find(twice, same) is not None
    assert find(twice, different) is None
    assert find(Op("aten.mul.Tensor", Leaf("a"), Const(1)), same) is None
    assert Op("f", Op("g", Leaf("x")), Const(0)).size == 2


def test_the_library_prints_and_has_no_double_entry() -> None:
    text = table_text()
    assert "linear" in text
    places = [pattern for kernel in KERNELS for pattern in kernel.patterns]
    assert len(places) == len(set(places))
    for kernel in KERNELS:
        assert kernel.summary
        assert kernel.sources


def test_matching_takes_bounded_time_for_each_operation() -> None:
    """A chain of sums under a softmax is the worst case of the attention pattern."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(60):
                x = (x + x.T) + (x - 1)
            return (torch.softmax(x, -1) @ self.w).sum()

    program = program_of(Deep(), torch.zeros(4, 4))
    product = next(n for n in program.operations if "matmul" in n.name)
    pattern = next(
        p for k in KERNELS if k.name == "attention_spelled_out" for p in k.patterns
        if "aten.matmul" in p.targets
    )  # fmt: skip
    began = time.perf_counter()
    assert find(pattern, product) is None
    assert time.perf_counter() - began < 60  # trying every path would take 2 ** 60 comparisons
    assert "softmax" in {m.kernel.name for m in match(program).working}


@pytest.mark.slow
def test_some_architectures_of_transformers_validate() -> None:
    transformers = pytest.importorskip("transformers")
    del transformers
    from benchmarks.architectures import try_architecture

    for name in ("BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"):
        row = try_architecture(name)
        assert row.verdict == "validated", row.explanation
