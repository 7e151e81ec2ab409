"""The kernel library and the matching of a Program against it."""

from openwafer.kernels.kernel import (
    ADAM,
    SGD,
    CostContext,
    ExecutionMode,
    Kernel,
    KernelCost,
    Match,
    OptimizerCost,
    Work,
)
from openwafer.kernels.match import KernelGraph, Refusal, match
from openwafer.kernels.table import KERNELS

__all__ = [
    "ADAM",
    "KERNELS",
    "SGD",
    "CostContext",
    "ExecutionMode",
    "Kernel",
    "KernelCost",
    "KernelGraph",
    "Match",
    "OptimizerCost",
    "Refusal",
    "Work",
    "match",
]
