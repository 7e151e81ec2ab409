"""What validation answers: does the model run, on which kernels, and if not, why not.

Decides the report's content, its text and its `validate.json`. Does not decide what is supported
or why something is not (kernels/).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openwafer.errors import PlanError, UnsupportedOpError
from openwafer.files import write_text
from openwafer.graph.program import Program, site_of
from openwafer.kernels.folding import fold_names, folding_key
from openwafer.kernels.kernel import ExecutionMode
from openwafer.kernels.match import Cover, KernelGraph, Refusal, cover
from openwafer.kernels.refusal import refusals_text

__all__ = [
    "KernelUse",
    "ModuleCoverage",
    "ValidationReport",
    "validation_report",
    "write_validation",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUse:
    """How often a kernel is used in one module. `is_free` as in `Kernel.is_free`."""

    kernel: str
    module: str
    count: int
    is_free: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCoverage:
    """How many of a module's own operations (not those of its submodules) have a kernel."""

    module: str
    num_operations: int
    num_covered: int

    @property
    def coverage(self) -> float:
        return self.num_covered / self.num_operations


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The answer.

    kernels: every kernel that lies, by module, in execution order.
    modules: coverage of each module that has operations, in execution order.
    refusals: every operation without a kernel.
    kernel_graph: None where anything was refused.
    """

    model_name: str
    execution_mode: ExecutionMode
    num_parameters: int
    num_operations: int
    kernels: tuple[KernelUse, ...]
    modules: tuple[ModuleCoverage, ...]
    refusals: tuple[Refusal, ...]
    kernel_graph: KernelGraph | None

    @property
    def ok(self) -> bool:
        return not self.refusals

    @property
    def coverage(self) -> float:
        """Share of the model's operations that a kernel takes, 0 to 1."""
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

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; what `validate.json` holds."""
        return {
            "model": self.model_name,
            "execution_mode": self.execution_mode,
            "ok": self.ok,
            "coverage": self.coverage,
            "num_parameters": self.num_parameters,
            "num_operations": self.num_operations,
            "kernels": [
                {"kernel": use.kernel, "module": use.module, "count": use.count}
                for use in self.kernels
            ],
            "modules": [
                {
                    "module": entry.module,
                    "num_operations": entry.num_operations,
                    "num_covered": entry.num_covered,
                }
                for entry in self.modules
            ],
            "refusals": [_refusal_json(refusal) for refusal in self.refusals],
        }

    def __str__(self) -> str:
        head = (
            f"{self.model_name}: {self.num_parameters:,} parameters, "
            f"{self.num_operations} operations, {self.execution_mode}"
        )
        return "\n".join([head, *_table(self.modules, self.kernels), *self.verdict_lines()])

    def verdict_lines(self) -> list[str]:
        """The last part of the text: all is well, or every refusal."""
        if self.ok:
            return ["every operation has a kernel"]
        noun = "operation has" if len(self.refusals) == 1 else "operations have"
        share = min(self.coverage, 0.999) if self.refusals else 1.0
        return [
            f"{len(self.refusals)} {noun} no kernel ({share:.1%} covered):",
            refusals_text(self.refusals),
        ]


def validation_report(program: Program, execution_mode: ExecutionMode) -> ValidationReport:
    """Match the kernels and report, without raising where something is refused."""
    found = cover(program, execution_mode=execution_mode)
    return ValidationReport(
        model_name=program.model_name,
        execution_mode=execution_mode,
        num_parameters=program.num_parameters,
        num_operations=len(program.operations),
        kernels=_uses(found.kernel_graph),
        modules=_modules(program, found),
        refusals=found.refusals,
        kernel_graph=None if found.refusals else found.kernel_graph,
    )


def write_validation(report: ValidationReport, path: Path) -> None:
    """Write `report` as JSON, whole or not at all.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        write_text(path, json.dumps(report.to_json(), indent=1))
    except OSError as error:
        raise PlanError(
            f"the validation report cannot be written: {error.strerror}",
            where=str(path),
            hint="choose another --model_dir, or free some space",
        ) from error


def _refusal_json(refusal: Refusal) -> dict[str, Any]:
    return {
        "op": refusal.op,
        "tensors": refusal.tensors,
        "module": refusal.module,
        "module_type": refusal.site.module_type,
        "file": refusal.file,
        "line": refusal.line,
        "reason": refusal.reason,
        "nearest": refusal.nearest,
        "suggestion": refusal.suggestion,
    }


def _uses(kernel_graph: KernelGraph) -> tuple[KernelUse, ...]:
    counts = Counter(
        (m.kernel.name, site_of(m.anchor).module, m.kernel.is_free) for m in kernel_graph.matches
    )
    return tuple(
        KernelUse(kernel=kernel, module=module, count=count, is_free=is_free)
        for (kernel, module, is_free), count in counts.items()
    )


def _modules(program: Program, found: Cover) -> tuple[ModuleCoverage, ...]:
    totals = Counter(site_of(node).module for node in program.operations)
    refused = Counter(refusal.module for refusal in found.refusals)
    return tuple(
        ModuleCoverage(module=module, num_operations=count, num_covered=count - refused[module])
        for module, count in totals.items()
    )


_Content = tuple[tuple[tuple[str, int], ...], int, int, int]
"""Working kernels with their counts, views and constants, operations, covered operations."""


def _table(modules: Sequence[ModuleCoverage], kernels: Sequence[KernelUse]) -> list[str]:
    """One line for each module; modules of repeated layers that hold the same share one."""
    uses: defaultdict[str, list[KernelUse]] = defaultdict(list)
    for use in kernels:
        uses[use.module].append(use)
    rows: dict[tuple[str, _Content], list[str]] = {}
    for entry in modules:
        content = _content(entry, uses[entry.module])
        rows.setdefault((folding_key(entry.module), content), []).append(entry.module)
    names = [fold_names(group) or "(top)" for group in rows.values()]
    width = min(60, max(map(len, names), default=0))
    return [
        f"  {name:<{width}}  {f'×{len(group)}' if len(group) > 1 else '':<5} {_described(content)}"
        for name, ((_, content), group) in zip(names, rows.items(), strict=True)
    ]


def _content(entry: ModuleCoverage, uses: Sequence[KernelUse]) -> _Content:
    working: Mapping[str, int] = {use.kernel: use.count for use in uses if not use.is_free}
    free = sum(use.count for use in uses if use.is_free)
    return tuple(working.items()), free, entry.num_operations, entry.num_covered


def _described(content: _Content) -> str:
    working, free, operations, covered = content
    parts = [f"{name} ×{count}" if count > 1 else name for name, count in working]
    if free:
        parts.append(f"{free} views and constants" if free > 1 else "1 view or constant")
    text = ", ".join(parts) or "no kernel"
    if covered == operations:
        return text
    return f"{text}  [{operations - covered} of {operations} operations refused]"
