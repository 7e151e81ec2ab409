"""Functional graphs: the same as torch's own functionalization gives, and as eager PyTorch runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.export import ExportedProgram

from openwafer.frontends.torch.functional import FunctionalStep, functional_step
from openwafer.graph.program import tensor_specs

X = torch.arange(24.0).reshape(2, 3, 4)


class Calls(nn.Module):
    """A function of a tensor, with a weight, a counter and a normalization at hand."""

    def __init__(self, call: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.call = (call,)
        self.weight = nn.Parameter(torch.ones(4))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        return self.call[0](self, x)


def _detour(model: Calls, x: torch.Tensor) -> torch.Tensor:
    """Composite operations, and those that may return their argument."""
    y = (
        x.transpose(1, 2).reshape(2, 12)
        + x.reshape(2, 12)
        + x.flatten(1).unflatten(1, (4, 3)).sum()
    )
    y = y.contiguous().to(torch.float64).to(torch.float32).float()
    first, second = F.dropout(y, 0.5, model.training).chunk(2, dim=1)
    return (first @ second.T).type_as(x) + torch.tensor([1.0, 2.0])


def _twice_normalized(model: Calls, x: torch.Tensor) -> torch.Tensor:
    return model.norm(F.relu(model.norm(x), inplace=True))


def _changed_in_place(model: Calls, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += x
    y.clamp_(0, 10).mul_(model.weight)
    model.count += 1
    return y * model.count


def _several_results(model: Calls, x: torch.Tensor) -> torch.Tensor:
    values, places = x.topk(2)
    return values.sum() + places.sum() + sum(part.sum() for part in x.split(1))


SAME: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "composite operations": _detour,
    "batch norm twice": _twice_normalized,
    "in place": _changed_in_place,
    "several results": _several_results,
}


def _read_through_the_base(model: Calls, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[0].add_(1)
    return y.sum()


def _read_through_an_older_view(model: Calls, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    view = y.view(6, 4)
    y.add_(1)
    return view.sum()


def _part_of_a_buffer(model: Calls, x: torch.Tensor) -> torch.Tensor:
    model.norm.running_mean[0].add_(1)
    return x.sum() + model.norm.running_mean.sum()


def _copied_in(model: Calls, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, 1] = x[:, 0]
    return y.sum()


RETRACED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "read through the base": _read_through_the_base,
    "read through an older view": _read_through_an_older_view,
    "part of a buffer": _part_of_a_buffer,
    "copied in": _copied_in,
}


def _export(model: nn.Module, *inputs: torch.Tensor) -> ExportedProgram:
    return torch.export.export(model, inputs, strict=False)


def _text(graph: fx.Graph) -> list[str]:
    return [
        f"{node.name} = {node.target}{node.args}{node.kwargs} {tensor_specs(node.meta['val'])}"
        for node in graph.nodes
        if node.op == "call_function" and "_assert" not in node.name
    ]


def _run(step: FunctionalStep, *inputs: torch.Tensor) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What a functional step returns, and the next values of buffers."""
    signature, given = step.signature, iter(inputs)
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    held = {**step.state_dict, **step.constants}
    values = [
        held[names[node.name]] if node.name in names else next(given)
        for node in step.graph.find_nodes(op="placeholder")
    ]
    results = list(fx.Interpreter(fx.GraphModule({}, step.graph)).run(*values))
    changed = [signature.buffers_to_mutate[s.arg.name] for s in signature.output_specs
               if s.arg.name in signature.buffers_to_mutate]  # fmt: skip
    return results[len(changed) :], dict(zip(changed, results, strict=False))


@pytest.fixture
def no_retrace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the whole graph was traced again")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SAME)
def test_the_graph_is_the_one_that_torch_makes(
    name: str, training: bool, request: pytest.FixtureRequest
) -> None:
    exported = _export(Calls(SAME[name]).train(training), X)
    theirs = exported.run_decompositions({})
    request.getfixturevalue("no_retrace")
    ours = functional_step(exported)
    assert _text(ours.graph) == _text(theirs.graph)
    assert ours.signature.buffers_to_mutate == theirs.graph_signature.buffers_to_mutate
    assert ours.signature.user_outputs == theirs.graph_signature.user_outputs


def test_a_constant_beside_tensors_without_memory(request: pytest.FixtureRequest) -> None:
    with torch.device("meta"):
        model = Calls(lambda model, x: (x * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum())
        exported = _export(model, X.to("meta"))
    theirs = exported.run_decompositions({})
    request.getfixturevalue("no_retrace")
    assert _text(functional_step(exported).graph) == _text(theirs.graph)


@pytest.mark.parametrize("name", RETRACED)
def test_what_others_see_too_is_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = _export(Calls(RETRACED[name]), X)
    retraced: list[bool] = []
    original = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram,
        "run_decompositions",
        lambda self, table: retraced.append(True) or original(self, table),
    )
    step = functional_step(exported)
    assert retraced
    expected = Calls(RETRACED[name])(X)
    torch.testing.assert_close(_run(step, X)[0][0], expected)


# A program is a list of (instruction, tensor, tensor); every tensor is 3 × 3. Instructions make
# views, possible views, copies and changes in place.
_INSTRUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda x, y: x + y,
    "transpose": lambda x, y: x.transpose(0, 1),
    "reshape": lambda x, y: x.reshape(9).reshape(3, 3),
    "contiguous": lambda x, y: x.contiguous(),
    "to": lambda x, y: x.to(torch.float32),
    "dropout": lambda x, y: F.dropout(x, 0.5, training=False),
    "double": lambda x, y: x.mul_(2),
    "add to": lambda x, y: x.add_(y),
    "relu": lambda x, y: x.relu_(),
    "fill": lambda x, y: x.fill_(0.5),
    "first row": lambda x, y: x[0].mul_(3) + y,
}


class Random(nn.Module):
    """A random program over two inputs and a buffer; returns every tensor it made."""

    def __init__(self, program: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("held", torch.arange(9.0).reshape(3, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tensors = [x - 1, y * 2, self.held]
        for name, i, j in self.program:
            first, second = tensors[i % len(tensors)], tensors[j % len(tensors)]
            tensors.append(_INSTRUCTIONS[name](first, second))
        return torch.stack(tensors)


_PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(_INSTRUCTIONS)), st.integers(0, 8), st.integers(0, 8)),
    min_size=2,
    max_size=7,
)


def _check_against_eager(program: list[tuple[str, int, int]]) -> None:
    x, y = torch.linspace(-2, 2, 9).reshape(3, 3), torch.linspace(3, -1, 9).reshape(3, 3)
    eager = Random(program)
    try:
        expected = eager(x, y)
        exported = _export(Random(program), x, y)
    except RuntimeError:  # e.g. a change of memory that overlaps itself
        return
    results, changed = _run(functional_step(exported), x, y)
    torch.testing.assert_close(results[0], expected)
    torch.testing.assert_close(changed.get("held", Random(program).held), eager.held)


@settings(max_examples=4)
@given(program=_PROGRAMS)
def test_random_programs_compute_what_eager_computes(program: list[tuple[str, int, int]]) -> None:
    _check_against_eager(program)


@pytest.mark.slow
@settings(max_examples=300)
@given(program=_PROGRAMS)
def test_many_random_programs(program: list[tuple[str, int, int]]) -> None:
    _check_against_eager(program)
