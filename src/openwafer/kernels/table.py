"""The kernel library, as a list, and how it prints.

Decides which kernels there are; of patterns of equal size the earlier kernel is tried first.
"""

from __future__ import annotations

from openwafer.kernels.activation import ACTIVATION_KERNELS
from openwafer.kernels.dropout import DROPOUT_KERNELS
from openwafer.kernels.elementwise import ELEMENTWISE_KERNELS
from openwafer.kernels.embedding import EMBEDDING_KERNELS
from openwafer.kernels.kernel import Kernel
from openwafer.kernels.loss import LOSS_KERNELS
from openwafer.kernels.matmul import MATMUL_KERNELS
from openwafer.kernels.normalization import NORMALIZATION_KERNELS
from openwafer.kernels.reduce import REDUCE_KERNELS
from openwafer.kernels.shape import SHAPE_KERNELS

__all__ = ["ALTERNATIVES", "KERNELS", "table_text"]

KERNELS: tuple[Kernel, ...] = (
    *MATMUL_KERNELS,
    *ACTIVATION_KERNELS,
    *DROPOUT_KERNELS,
    *LOSS_KERNELS,
    *NORMALIZATION_KERNELS,
    *EMBEDDING_KERNELS,
    *ELEMENTWISE_KERNELS,
    *REDUCE_KERNELS,
    *SHAPE_KERNELS,
)

_SHAPE_FROM_DATA = "a mask of fixed shape: torch.where or a product with the mask"

ALTERNATIVES = {
    "aten.nonzero": _SHAPE_FROM_DATA,
    "aten.masked_select": _SHAPE_FROM_DATA,
    "aten.unique": _SHAPE_FROM_DATA,
    "aten._unique2": _SHAPE_FROM_DATA,
    "aten.item": "keep the value a tensor; a number on the host ends the static graph",
    "aten._local_scalar_dense": "keep the value a tensor; a number on the host ends the graph",
    "aten.selu": "torch.nn.ELU",
    "aten.celu": "torch.nn.ELU",
    "aten.prelu": "torch.nn.LeakyReLU",
    "aten.rrelu_with_noise": "torch.nn.LeakyReLU",
    "aten.log_sigmoid_forward": "torch.log(torch.sigmoid(x)), or -softplus(-x)",
    "aten.smooth_l1_loss": "torch.nn.MSELoss or torch.nn.L1Loss",
    "aten.huber_loss": "torch.nn.MSELoss or torch.nn.L1Loss",
    "aten.kl_div": "torch.nn.NLLLoss on log-probabilities",
}
"""What to write instead, by operation (without its overload), where the nearest name misleads."""


def table_text(kernels: tuple[Kernel, ...] = KERNELS) -> str:
    """The library as a table for the terminal: name, family, dtypes, modes, operations."""
    rows = [("kernel", "family", "dtypes", "modes", "operations")]
    for kernel in kernels:
        operations = sorted({pattern.target for pattern in kernel.patterns})
        rows.append(
            (
                kernel.name,
                kernel.family,
                f"{len(kernel.dtypes)} dtypes" if len(kernel.dtypes) > 4 else _join(kernel.dtypes),
                _join(kernel.modes),
                operations[0] + (f" +{len(operations) - 1}" if len(operations) > 1 else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _join(names: tuple[str, ...]) -> str:
    return ",".join(names)
