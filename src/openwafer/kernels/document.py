"""The kernel library as a page: `python -m openwafer.kernels.document` writes docs/kernels.md.

Decides the page's form. What it says comes from the kernels themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from openwafer.kernels.kernel import ALL_DTYPES, BOTH_MODES, Kernel
from openwafer.kernels.refusal import EXPLANATIONS, Explanation
from openwafer.kernels.table import KERNELS, kernel_operations

__all__ = ["document_text", "main"]

_HEAD = """# The kernel library

Made from the code by `python -m openwafer.kernels.document`; do not edit.

A model runs if every operation of its captured graph is covered by one of these kernels. Larger
patterns win: attention written as products and a softmax is one kernel where nothing else reads
the probabilities, and is matched operation by operation where something does. `openwafer kernels`
prints the same library on the terminal (`--family`, `--op`, `--mode`, `--json`), and
`openwafer.validate(model, batch)` says which kernels a model uses.

Kernels of the family `shape` move and compute nothing.
"""


def document_text(kernels: Sequence[Kernel] = KERNELS) -> str:
    """The whole page."""
    families = dict.fromkeys(kernel.family for kernel in kernels)
    parts = [_HEAD, f"{len(kernels)} kernels in {len(families)} families.\n"]
    for family in families:
        parts.append(_family(family, [kernel for kernel in kernels if kernel.family == family]))
    parts.append(_refusals())
    return "\n".join(parts)


def _family(family: str, kernels: Sequence[Kernel]) -> str:
    lines = [
        f"## {family}\n",
        "| kernel | what it computes | operations | dtypes | modes | source of its numbers |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        operations = " ".join(f"`{op.removeprefix('aten.')}`" for op in kernel_operations(kernel))
        cells = (
            kernel.name,
            _escaped(kernel.summary),
            operations,
            _dtypes(kernel.dtypes),
            "both" if set(kernel.modes) == set(BOTH_MODES) else ", ".join(kernel.modes),
            _escaped("; ".join(kernel.sources)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _dtypes(dtypes: tuple[str, ...]) -> str:
    if set(ALL_DTYPES) <= set(dtypes):
        extra = [dtype for dtype in dtypes if dtype not in ALL_DTYPES]
        return ", ".join(["all floats and integers", *extra])
    return ", ".join(dtypes)


def _refusals() -> str:
    lines = [
        "## What has no kernel, and what to write instead\n",
        "Every other operation without a kernel is refused too; the report names the nearest one.",
        "Tensors of float64 may be held, moved and cast, not computed with; complex numbers are",
        "refused wherever they leave a Fourier transform's kernel.\n",
        "| operations | why | nearest | instead |",
        "|---|---|---|---|",
    ]
    groups: dict[Explanation, list[str]] = {}
    for operation, explanation in EXPLANATIONS.items():
        groups.setdefault(explanation, []).append(f"`{operation.removeprefix('aten.')}`")
    lines.extend(
        f"| {' '.join(names)} | {_escaped(known.reason)} | {_escaped(known.nearest)} "
        f"| {_escaped(known.suggestion)} |"
        for known, names in groups.items()
    )
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or with `--check` say whether it is current."""
    parser = argparse.ArgumentParser(prog="python -m openwafer.kernels.document")
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/kernels.md"))
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args(argv)
    path: Path = arguments.path
    if not arguments.check:
        path.write_text(document_text(), encoding="utf-8")
        return 0
    if path.exists() and path.read_text("utf-8") == document_text():
        return 0
    print(f"{path} is not current: run python -m openwafer.kernels.document", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
