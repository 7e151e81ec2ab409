"""What validation answers: does the model run, on which kernels, and if not, why not.

Decides the report's content and its text. Does not decide what is supported (kernels/).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from openwafer.errors import UnsupportedOpError
from openwafer.graph.program import Program, site_of
from openwafer.kernels.kernel import ExecutionMode
from openwafer.kernels.match import KernelGraph, Refusal, match

__all__ = ["KernelUse", "ValidationReport", "validation_report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUse:
    """How often a kernel is used in one module."""

    kernel: str
    module: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The answer. `kernel_graph` is None where anything was refused.

    coverage: share of the model's operations that a kernel takes, 0 to 1.
    """

    model_name: str
    execution_mode: ExecutionMode
    num_parameters: int
    num_operations: int
    kernels: tuple[KernelUse, ...]
    refusals: tuple[Refusal, ...]
    kernel_graph: KernelGraph | None

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def coverage(self) -> float:
        if not self.num_operations:
            return 1.0
        return 1.0 - len(self.refusals) / self.num_operations

    def raise_if_refused(self) -> KernelGraph:
        """The matched kernels.

        Raises:
            UnsupportedOpError: something was refused; it lists all of it.
        """
        if self.kernel_graph is None:
            raise UnsupportedOpError(str(self), refusals=self.refusals)
        return self.kernel_graph

    def __str__(self) -> str:
        lines = [
            f"{self.model_name}: {self.num_parameters:,} parameters, "
            f"{self.num_operations} operations, {self.execution_mode}"
        ]
        counts = Counter({use.kernel: 0 for use in self.kernels})
        for use in self.kernels:
            counts[use.kernel] += use.count
        if counts:
            lines.append("kernels: " + ", ".join(f"{n} ×{c}" for n, c in counts.items()))
        if self.ok:
            return "\n".join([*lines, "every operation has a kernel"])
        noun = "operation has" if len(self.refusals) == 1 else "operations have"
        lines.append(f"{len(self.refusals)} {noun} no kernel ({self.coverage:.0%} covered):")
        return "\n".join([*lines, *(str(refusal) for refusal in self.refusals)])


def validation_report(program: Program, execution_mode: ExecutionMode) -> ValidationReport:
    """Match the kernels and report, without raising where something is refused."""
    kernel_graph, refusals = None, ()
    try:
        kernel_graph = match(program, execution_mode=execution_mode)
    except UnsupportedOpError as error:
        refusals = cast("tuple[Refusal, ...]", error.refusals)
    return ValidationReport(
        model_name=program.model_name,
        execution_mode=execution_mode,
        num_parameters=program.num_parameters,
        num_operations=len(program.operations),
        kernels=_uses(kernel_graph),
        refusals=tuple(refusals),
        kernel_graph=kernel_graph,
    )


def _uses(kernel_graph: KernelGraph | None) -> tuple[KernelUse, ...]:
    matches: Sequence[tuple[str, str]] = (
        [(m.kernel.name, site_of(m.anchor).module) for m in kernel_graph.matches]
        if kernel_graph
        else []
    )
    return tuple(
        KernelUse(kernel=kernel, module=module, count=count)
        for (kernel, module), count in Counter(matches).items()
    )
