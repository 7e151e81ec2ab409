"""Pooling and resizing: windows of an image become single elements, or elements become windows."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from openwafer.kernels.cost import kernel_cost, per_sample
from openwafer.kernels.kernel import FLOATS, CostContext, Kernel, KernelCost, Match, Work
from openwafer.kernels.pattern import Const, Leaf, Op

__all__ = ["POOLING_KERNELS"]


def _window_cost(match: Match, context: CostContext) -> KernelCost:
    """One operation per element of each window; backward one per element of each result."""
    pool = match.nodes[0]
    window: Any = pool.args[1]
    dimensions = len(match.output.shape) - 2
    sizes = [window] * dimensions if isinstance(window, int) else list(window)
    per_result = prod(sizes if len(sizes) > 1 else sizes * dimensions)
    return _cost(match, context, ops=match.output.numel * per_result)


def _adaptive_cost(match: Match, context: CostContext) -> KernelCost:
    """Windows that tile the input: one operation per element of it."""
    return _cost(match, context, ops=match.spec("input").numel)


def _resize_cost(match: Match, context: CostContext, *, ops_per_element: int) -> KernelCost:
    return _cost(match, context, ops=match.output.numel * ops_per_element)


def _cost(match: Match, context: CostContext, *, ops: int) -> KernelCost:
    return kernel_cost(
        match,
        context,
        forward=Work(elementwise_ops=ops),
        backward=Work(elementwise_ops=ops * len(match.grad_inputs)),
        parallelism=per_sample(match.spec("input").numel, context),
        saved=match.inputs,
    )


_X = Leaf("input")
_SOURCE = "one operation per element and step of the formula"
_INDICES = (*FLOATS, "int64")


def _pool(name: str, summary: str, stems: str, **settings: Any) -> Kernel:
    """`stems` without the number of dimensions, which is 1, 2 or 3."""
    targets = " ".join(f"aten.{s.replace('#', str(d))}" for s in stems.split() for d in (1, 2, 3))
    patterns = (Op("getitem", Op(targets, _X), Const(0)), Op(targets, _X))
    return Kernel(
        name=name, family="pool", summary=summary, patterns=patterns, dtypes=_INDICES,
        sources=(_SOURCE,), **settings,
    )  # fmt: skip


POOLING_KERNELS: tuple[Kernel, ...] = (
    _pool("avg_pool", "the mean of each window", "avg_pool#d", cost=_window_cost),
    _pool(
        "max_pool",
        "the largest element of each window",
        "max_pool#d max_pool#d_with_indices",
        cost=_window_cost,
    ),
    _pool(
        "adaptive_pool",
        "mean or maximum of as many windows as asked for",
        "adaptive_avg_pool#d adaptive_max_pool#d _adaptive_avg_pool#d",
        cost=_adaptive_cost,
    ),
    Kernel(
        name="resize_nearest",
        family="resize",
        summary="the nearest element of the input",
        patterns=(
            Op("aten.upsample_nearest1d aten.upsample_nearest2d aten.upsample_nearest3d", _X),
            Op(
                "aten._upsample_nearest_exact1d aten._upsample_nearest_exact2d "
                "aten._upsample_nearest_exact3d",
                _X,
            ),
        ),
        cost=partial(_resize_cost, ops_per_element=1),
        sources=(_SOURCE,),
    ),
    Kernel(
        name="resize_linear",
        family="resize",
        summary="between the nearest elements, weighted by distance",
        patterns=(
            Op("aten.upsample_linear1d aten.upsample_bilinear2d aten.upsample_trilinear3d", _X),
            Op("aten._upsample_bilinear2d_aa aten.grid_sampler aten.grid_sampler_2d", _X),
        ),
        cost=partial(_resize_cost, ops_per_element=8),
        sources=(_SOURCE,),
    ),
    Kernel(
        name="resize_cubic",
        family="resize",
        summary="a cubic through the nearest sixteen elements",
        patterns=(Op("aten.upsample_bicubic2d aten._upsample_bicubic2d_aa", _X),),
        cost=partial(_resize_cost, ops_per_element=32),
        sources=(_SOURCE,),
    ),
)
