"""Views, copies, casts and constants: operations that compute nothing.

They cost nothing here. On a wafer a transposition or a concatenation does move data; its routes are
part of placement and routing, not of a kernel's cycles.
"""

from __future__ import annotations

from openwafer.kernels.cost import free_cost
from openwafer.kernels.kernel import ALL_DTYPES, Kernel
from openwafer.kernels.pattern import Op

__all__ = ["SHAPE_KERNELS"]


def _free(name: str, summary: str, targets: str) -> Kernel:
    return Kernel(
        name=name,
        family="shape",
        summary=summary,
        patterns=tuple(
            Op(target if target == "getitem" else f"aten.{target}") for target in targets.split()
        ),
        dtypes=ALL_DTYPES,
        cost=free_cost,
        sources=("no arithmetic",),
    )


SHAPE_KERNELS: tuple[Kernel, ...] = (
    _free(
        "view",
        "the same elements under another shape",
        "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int "
        "squeeze.default squeeze.dim squeeze.dims unsqueeze.default view_as.default alias.default "
        "contiguous.default clone.default detach.default lift_fresh_copy.default",
    ),
    _free(
        "transpose",
        "dimensions in another order",
        "permute.default transpose.int t.default movedim.int numpy_T.default",
    ),
    _free(
        "broadcast",
        "one element in several places",
        "expand.default expand_as.default broadcast_to.default broadcast_tensors.default "
        "repeat.default",
    ),
    _free(
        "pick",
        "some of the elements, at places known when compiling",
        "getitem select.int slice.Tensor split.Tensor split_with_sizes.default chunk.default "
        "narrow.int unbind.int",
    ),
    _free("join", "tensors side by side", "cat.default stack.default"),
    _free("cast", "the same values in another dtype", "_to_copy.default to.dtype to.device "
          "to.dtype_layout to.other type_as.default"),
    _free(
        "constant",
        "values known when compiling",
        "zeros.default ones.default full.default empty.memory_format arange.default arange.start "
        "arange.start_step zeros_like.default ones_like.default full_like.default "
        "empty_like.default scalar_tensor.default new_zeros.default new_ones.default "
        "new_full.default",
    ),
    _free(
        "assertion",
        "a condition that the capture has checked",
        "_assert_tensor_metadata.default _assert_async.msg",
    ),
)  # fmt: skip
