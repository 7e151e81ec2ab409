"""Layer functions compiled by TorchInductor.

Decides when a layer's graphs are compiled rather than run operation by operation, and what happens
where they cannot be: with `auto` the layer runs as it is and the log says so once, with `inductor`
that is an error. Does not decide what a graph computes (lower.py).

A graph is compiled when it is first run, for the layout of the tensors it is given then, which is
the same at every step. Inductor keeps what it makes on disk (TORCHINDUCTOR_CACHE_DIR), and copies
of a layer share their functions, so that a structure is compiled once.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from openwafer.errors import PlanError
from openwafer.runtime.lower import LayerFunctions
from openwafer.runtime.randomness import (
    DrawKey,
    apply_dropout,
    draw_kept,
    keyed_draw,
    keyed_dropout,
)

__all__ = ["LayerCompiler", "chosen_compiler", "compile_graph", "compiled_functions"]

_log = logging.getLogger("openwafer")

LayerCompiler = Literal["auto", "eager", "inductor"]

REPAID_BYTES = 1 << 30
"""Results of operations in one pass from which `auto` compiles: fusing saves passes over them,
0.1 s a step at 10 GB/s, which repays a minute of compiling within a thousand steps."""


FUSED_BYTES = 256 << 10
"""What two loops must read or write in common to become one. Blocks of attention and of the loss
head share a number per row: as one loop they would wait for all matrix products first, and lose
what is in the cache."""


def chosen_compiler(
    requested: LayerCompiler, *, device: torch.device, activation_bytes: int
) -> LayerCompiler:
    """What is used: `eager`, `inductor`, or `auto` for Inductor where it succeeds.

    Args:
        activation_bytes: results of all operations in one forward pass.

    Raises:
        PlanError: `inductor` was requested and there is nothing to compile with.
    """
    if requested == "eager":
        return "eager"
    missing = _missing_tool(device)
    if requested == "inductor" and missing:
        raise PlanError(
            f"TorchInductor needs {missing}, and there is none",
            where="runconfig.layer_compiler",
            allowed="auto, eager",
            hint="install one (apt install g++), or let layers run as they are: eager",
        )
    if requested == "auto" and (missing or activation_bytes < REPAID_BYTES):
        return "eager"
    return requested


def compile_graph(
    graph: fx.GraphModule, tensors: Sequence[torch.Tensor]
) -> Callable[..., Sequence[Any]]:
    """The graph compiled for tensors like these, with Inductor's own errors."""
    given: list[Any] = list(tensors)
    patches = {
        "score_fusion_memory_threshold": FUSED_BYTES,
        "cpp.use_decompose_tanh": not _gives_tanh(graph),
    }
    with warnings.catch_warnings():
        # Inductor's own modules use what torch has deprecated; nobody here can act on it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch._inductor import standalone_compile

        return standalone_compile(
            graph, given, dynamic_shapes="from_example_inputs", options={"config_patches": patches}
        )


def _gives_tanh(graph: fx.GraphModule) -> bool:
    """Whether tanh is a result by itself, and not inside gelu.

    On a CPU 2 / (1 + exp(-2x)) - 1 takes half the time of the vector library's tanh, and is as near
    but around 0, where it is off by 1e-7 and not by 1e-7 of itself. gelu adds 1 to it.
    """
    return any("tanh" in str(node.target) for node in graph.graph.nodes)


def _missing_tool(device: torch.device) -> str:
    """What Inductor needs on a device and this machine lacks; empty where nothing is missing."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton"
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    return "" if any(name and shutil.which(name) for name in compilers) else "a C++ compiler"


def compiled_functions(functions: LayerFunctions, *, name: str, required: bool) -> LayerFunctions:
    """The same functions, compiled when they are first run.

    Args:
        name: of the layer, for messages.
        required: a graph that cannot be compiled is an error; else it runs as it is.
    """
    split = _draws_first(functions.forward_graph)
    if split is None:
        why = "it draws random numbers whose distribution is computed in the layer"
        if required:
            raise PlanError(
                f"TorchInductor cannot compile layer {name}: {why}",
                where="runconfig.layer_compiler",
                allowed="auto, eager",
                hint="auto compiles the other layers",
            )
        _log.warning("layer %s runs uncompiled: %s", name, why)
        return functions
    graph, draws = split
    backward = functions.backward_graph
    return replace(
        functions,
        run_forward=_Forward(_InductorGraph(graph, name=name, required=required), draws),
        run_backward=backward and _InductorGraph(backward, name=name, required=required),
    )


@dataclass(frozen=True, slots=True)
class _Draw:
    """A random draw of a layer: the `offset`th, `shape` booleans that are true with `chance`."""

    offset: int
    shape: tuple[int, ...]
    chance: float


class _Forward:
    """A compiled forward pass: the draws, then everything else as one compiled graph."""

    def __init__(self, graph: _InductorGraph, draws: Sequence[_Draw]) -> None:
        self._graph, self._draws = graph, tuple(draws)

    def __call__(self, key: DrawKey, *tensors: torch.Tensor) -> Sequence[Any]:
        device = tensors[0].device if tensors else torch.device("cpu")
        kept = [draw_kept(key, d.offset, d.shape, d.chance, device) for d in self._draws]
        return self._graph(*kept, *tensors)


def _draws_first(module: fx.GraphModule) -> tuple[fx.GraphModule, list[_Draw]] | None:
    """The graph with what it draws as arguments in place of the key; None for a draw whose
    probability or size is known only in the graph."""
    graph = fx.Graph()
    draws: list[_Draw] = []
    copies: dict[fx.Node, fx.Node] = {}
    key = next(iter(module.graph.nodes))
    for node in module.graph.nodes:
        if node.target is keyed_dropout or node.target is keyed_draw:
            draw = _known_draw(node)
            if draw is None:
                return None
            draws.append(draw)
    masks = iter([graph.placeholder(f"kept_{i}") for i in range(len(draws))])
    for node in module.graph.nodes:
        if node is key:
            continue
        if node.target is keyed_dropout:
            value, probability = node.args[2:4]
            given = (copies[value], next(masks), probability)
            copies[node] = graph.call_function(apply_dropout, given)
        elif node.target is keyed_draw:
            dtype = node.meta["val"].dtype
            copies[node] = graph.call_function(torch.Tensor.to, (next(masks), dtype))
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return fx.GraphModule({}, graph), draws


def _known_draw(node: fx.Node) -> _Draw | None:
    given: Any = node.args
    if node.target is keyed_dropout:
        _, offset, value, probability = given
        return _Draw(offset, tuple(value.meta["val"].shape), 1.0 - probability)
    if given[2] is not torch.ops.aten.bernoulli.p:
        return None
    _, offset, _, value, chance = given
    return _Draw(offset, tuple(value.meta["val"].shape), chance)


class _InductorGraph:
    """A graph of tensors, compiled when it is first called.

    Args:
        name: of the layer, for messages.
        required: a graph that cannot be compiled is an error; else it runs as it is.
    """

    def __init__(self, graph: fx.GraphModule, *, name: str, required: bool) -> None:
        self._graph, self._name, self._required = graph, name, required
        self._run: Callable[..., Sequence[Any]] | None = None

    def __call__(self, *tensors: torch.Tensor) -> Sequence[Any]:
        if self._run is None:
            self._run = self._compile(tensors)
        return self._run(*tensors)

    def _compile(self, tensors: Sequence[torch.Tensor]) -> Callable[..., Sequence[Any]]:
        try:
            with torch.no_grad():
                return compile_graph(self._graph, tensors)
        # Inductor raises whatever went wrong inside it; all of it means the same here.
        except Exception as error:
            if self._required:
                raise PlanError(
                    f"TorchInductor could not compile layer {self._name}: {error}",
                    where="runconfig.layer_compiler: inductor",
                    hint="eager runs the layers as they are; auto does so where it must",
                ) from error
            _log.warning(
                "layer %s runs uncompiled: TorchInductor failed with %s", self._name, error
            )
            return self._graph
