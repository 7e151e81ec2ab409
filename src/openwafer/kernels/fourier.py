"""The real part of a Fourier transform (token mixing in FNet), as one kernel.

Complex numbers stay inside: a transform whose complex result is used otherwise is refused.
"""

from __future__ import annotations

from math import ceil, log2

from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.kernel import FLOATS, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import ANY, Leaf, Op

__all__ = ["FOURIER_KERNELS"]


def _cost(match: Match, context: CostContext) -> KernelCost:
    """Radix 2: 5 real operations per element for each of log2(n) stages, n the product of extents
    within a sample; the gradient of the real part is the same transform again."""
    extents = match.spec("input").numel // context.num_samples
    stages = ceil(log2(max(2, extents)))
    return elementwise_cost(match, context, ops_per_element=5 * stages, saved=())


FOURIER_KERNELS: tuple[Kernel, ...] = (
    Kernel(
        name="fourier_real",
        family="fourier",
        summary="the real (or imaginary) part of a Fourier transform",
        patterns=tuple(
            Op(
                "aten.select",
                Op("aten.view_as_real", Op("aten.fft_fft aten.fft_fft2 aten.fft_fftn", *source)),
                ANY,
                ANY,
            )
            for source in ((Leaf("input"),), (Op("aten.fft_fft", Leaf("input")),))
        ),
        dtypes=(*FLOATS, "complex64"),
        cost=_cost,
        sources=("operations of a radix-2 transform, counted from the formula",),
    ),
)
