"""Recurrent networks: whole sequences (`nn.LSTM`, `nn.GRU`, `nn.RNN`) and single cells."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import (
    Candidate,
    CostContext,
    Kernel,
    KernelCost,
    Match,
    Rejection,
    Work,
    specs_of,
)
from openwafer.kernels.pattern import Leaf, Op, target_name

__all__ = ["RECURRENT_KERNELS"]

OPS_PER_GATE = OPS_PER_EXP + 4
"""A sigmoid or tanh, and a product and a sum with the state."""


def _cost(match: Match, context: CostContext) -> KernelCost:
    """Each weight matrix `[gates * hidden, in]` meets every position of every sample once."""
    node = match.nodes[0]
    matrices = [spec for spec in map(_spec, match.inputs) if _is_weight(spec.shape, match)]
    positions = prod(match.spec("input").shape[:-1])
    macs = positions * sum(spec.numel for spec in matrices)
    rows = positions * sum(spec.shape[0] for spec in matrices)
    grads = 2 if match.grad_inputs else 0
    return kernel_cost(
        match,
        context,
        forward=Work(macs=macs, elementwise_ops=rows * OPS_PER_GATE),
        backward=Work(macs=macs * grads, elementwise_ops=rows * OPS_PER_GATE * (grads > 0)),
        # One position after the other: only one position's products can run at once.
        parallelism=per_sample(macs // max(1, _steps(node, match)), context),
        saved=(match.bound["input"],),
        inner_saved_bytes=rows * match.output.torch_dtype.itemsize,
    )


def _spec(node: fx.Node) -> Any:
    return specs_of(node)[0]


def _is_weight(shape: tuple[int, ...], match: Match) -> bool:
    return len(shape) == 2 and shape != match.spec("input").shape


def _steps(node: fx.Node, match: Match) -> int:
    if "cell" in target_name(node):
        return 1
    shape = match.spec("input").shape
    batch_first = bool(node.args[-1])
    return shape[1] if batch_first and len(shape) == 3 else shape[0]


def _check(candidate: Candidate) -> Rejection | None:
    if target_name(candidate.nodes[0]).endswith(".data"):
        return Rejection(
            "a packed sequence has lengths that depend on the data",
            "padded sequences of one length, and a mask in the loss",
        )
    return None


def _recurrent(name: str, summary: str, targets: str) -> Kernel:
    return Kernel(
        name=name,
        family="recurrent",
        summary=summary,
        patterns=(Op(targets, Leaf("input")),),
        cost=_cost,
        check=_check,
        sources=("count of multiply-accumulates; OPS_PER_EXP assumed",),
    )


RECURRENT_KERNELS: tuple[Kernel, ...] = (
    _recurrent("lstm", "long short-term memory", "aten.lstm aten.lstm_cell"),
    _recurrent("gru", "gated recurrent units", "aten.gru aten.gru_cell"),
    _recurrent(
        "rnn",
        "tanh or relu of products with input and state",
        "aten.rnn_tanh aten.rnn_relu aten.rnn_tanh_cell aten.rnn_relu_cell",
    ),
)
