"""Random numbers of a given distribution, element by element.

Each draw comes from (seed, step, layer, microbatch), so that every way of running a model draws the
same numbers (runtime/randomness.py). Operations without such a draw have no kernel (refusal.py).
No gradient passes through any of them: what is differentiated is what the model does with the
numbers, as in `mean + std * noise`.
"""

from __future__ import annotations

from functools import partial

from openwafer.kernels.activation import OPS_PER_EXP
from openwafer.kernels.cost import elementwise_cost
from openwafer.kernels.dropout import OPS_PER_RANDOM
from openwafer.kernels.kernel import FLOATS, INTEGERS, CostContext, Kernel, KernelCost, Match
from openwafer.kernels.pattern import Op

__all__ = ["RANDOM_KERNELS"]

OPS_PER_POISSON = 4 * OPS_PER_RANDOM + OPS_PER_EXP
"""Assumed: products of uniform numbers until they fall below exp(-rate), four for a rate of 3."""


def _cost(match: Match, context: CostContext, *, ops: int) -> KernelCost:
    return elementwise_cost(
        match, context, ops_per_element=ops, backward_ops_per_element=0, saved=()
    )


def _kernel(name: str, summary: str, targets: str, ops: int) -> Kernel:
    return Kernel(
        name=name,
        family="random",
        summary=summary,
        patterns=(Op(" ".join(f"aten.{target}" for target in targets.split())),),
        dtypes=(*FLOATS, *INTEGERS),
        cost=partial(_cost, ops=ops),
        sources=("OPS_PER_RANDOM and OPS_PER_EXP assumed; operations counted from the formula",),
    )


_R, _E = OPS_PER_RANDOM, OPS_PER_EXP

RANDOM_KERNELS: tuple[Kernel, ...] = (
    _kernel("rand", "uniform between bounds", "rand.default rand_like.default uniform", _R + 2),
    # Box-Muller: the root of a logarithm times a cosine, from two uniform numbers.
    _kernel(
        "randn",
        "normally distributed",
        "randn.default randn_like.default normal normal_functional",
        2 * _R + 3 * _E + 4,
    ),
    _kernel(
        "randint",
        "whole numbers between two bounds",
        "randint.default randint.low randint_like.default randint_like.low_dtype random",
        _R + 2,
    ),
    # A sort of random keys, counted for lists of up to 2^10.
    _kernel("randperm", "a random order", "randperm.default", _R + 10),
    _kernel("exponential", "exponentially distributed", "exponential", _R + _E + 1),
    _kernel("log_normal", "the exponential of a normal number", "log_normal", 2 * _R + 4 * _E + 4),
    _kernel("cauchy", "Cauchy distributed", "cauchy", _R + _E + 3),
    _kernel("geometric", "trials until the first success", "geometric", _R + 2 * _E + 2),
    _kernel("poisson", "Poisson distributed counts", "poisson.default", OPS_PER_POISSON),
)
