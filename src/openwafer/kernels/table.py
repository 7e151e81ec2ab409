"""The kernel library, as a list, and how it prints.

Decides which kernels there are; of patterns of equal size the earlier kernel is tried first.
"""

from __future__ import annotations

import json

from openwafer.errors import ConfigError, nearest
from openwafer.kernels.activation import ACTIVATION_KERNELS
from openwafer.kernels.attention import ATTENTION_KERNELS
from openwafer.kernels.convolution import CONVOLUTION_KERNELS
from openwafer.kernels.dropout import DROPOUT_KERNELS
from openwafer.kernels.elementwise import ELEMENTWISE_KERNELS
from openwafer.kernels.embedding import EMBEDDING_KERNELS
from openwafer.kernels.fourier import FOURIER_KERNELS
from openwafer.kernels.gather import GATHER_KERNELS
from openwafer.kernels.grouped import GROUPED_KERNELS
from openwafer.kernels.kernel import BOTH_MODES, Kernel
from openwafer.kernels.loss import LOSS_KERNELS
from openwafer.kernels.matmul import MATMUL_KERNELS
from openwafer.kernels.normalization import NORMALIZATION_KERNELS
from openwafer.kernels.pattern import op_stem
from openwafer.kernels.pooling import POOLING_KERNELS
from openwafer.kernels.position import POSITION_KERNELS
from openwafer.kernels.random import RANDOM_KERNELS
from openwafer.kernels.recurrent import RECURRENT_KERNELS
from openwafer.kernels.reduce import REDUCE_KERNELS
from openwafer.kernels.shape import SHAPE_KERNELS

__all__ = ["KERNELS", "kernel_operations", "select_kernels", "table_json", "table_text"]

KERNELS: tuple[Kernel, ...] = (
    *MATMUL_KERNELS,
    *GROUPED_KERNELS,
    *ATTENTION_KERNELS,
    *POSITION_KERNELS,
    *CONVOLUTION_KERNELS,
    *POOLING_KERNELS,
    *RECURRENT_KERNELS,
    *ACTIVATION_KERNELS,
    *DROPOUT_KERNELS,
    *RANDOM_KERNELS,
    *LOSS_KERNELS,
    *NORMALIZATION_KERNELS,
    *EMBEDDING_KERNELS,
    *GATHER_KERNELS,
    *FOURIER_KERNELS,
    *ELEMENTWISE_KERNELS,
    *REDUCE_KERNELS,
    *SHAPE_KERNELS,
)


def kernel_operations(kernel: Kernel) -> tuple[str, ...]:
    """The operations at which the kernel's patterns end, each once, in the patterns' order."""
    return tuple(dict.fromkeys(t for pattern in kernel.patterns for t in pattern.targets))


def select_kernels(
    *,
    family: str | None = None,
    op: str | None = None,
    mode: str | None = None,
    kernels: tuple[Kernel, ...] = KERNELS,
) -> tuple[Kernel, ...]:
    """The kernels of a family, for an operation (`relu`, `aten.relu`, `aten.relu.default`) or mode.

    Raises:
        ConfigError: there is no such family, operation or mode.
    """
    families = sorted({kernel.family for kernel in kernels})
    _require("family", family, families)
    _require("mode", mode, BOTH_MODES)
    wanted = None if op is None else {_full(op), op_stem(_full(op))}
    found = tuple(
        kernel
        for kernel in kernels
        if (family is None or kernel.family == family)
        and (mode is None or mode in kernel.modes)
        and (wanted is None or wanted & {*kernel_operations(kernel), f"aten.{kernel.name}"})
    )
    if not found and op is not None:
        known = [t for kernel in kernels for t in kernel_operations(kernel)]
        raise ConfigError(
            f"no kernel ends at the operation {op!r}",
            hint=nearest(_full(op), known) or "`openwafer kernels` lists all of them",
        )
    return found


def _full(op: str) -> str:
    return op if op.startswith("aten.") or op == "getitem" else f"aten.{op}"


def _require(what: str, value: str | None, allowed: tuple[str, ...] | list[str]) -> None:
    if value is not None and value not in allowed:
        raise ConfigError(
            f"unknown {what} {value!r}", allowed=", ".join(allowed), hint=nearest(value, allowed)
        )


def table_text(kernels: tuple[Kernel, ...] = KERNELS) -> str:
    """The library for the terminal: name, family, dtypes, modes, operations, sources."""
    rows = [("kernel", "family", "dtypes", "modes", "operations", "source of its numbers")]
    for kernel in kernels:
        operations = [op.removeprefix("aten.") for op in kernel_operations(kernel)]
        more = f" +{len(operations) - 2}" if len(operations) > 2 else ""
        dtypes = f"{len(kernel.dtypes)} dtypes" if len(kernel.dtypes) > 4 else _join(kernel.dtypes)
        modes = "both" if set(kernel.modes) == set(BOTH_MODES) else _join(kernel.modes)
        names = " ".join(operations[:2]) + more
        rows.append((kernel.name, kernel.family, dtypes, modes, names, "; ".join(kernel.sources)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def table_json(kernels: tuple[Kernel, ...] = KERNELS) -> str:
    """The library for machines: a list of objects, one for each kernel."""
    return json.dumps(
        [
            {
                "kernel": kernel.name,
                "family": kernel.family,
                "summary": kernel.summary,
                "operations": list(kernel_operations(kernel)),
                "dtypes": list(kernel.dtypes),
                "modes": list(kernel.modes),
                "sources": list(kernel.sources),
            }
            for kernel in kernels
        ],
        indent=1,
    )


def _join(names: tuple[str, ...]) -> str:
    return ",".join(names)
