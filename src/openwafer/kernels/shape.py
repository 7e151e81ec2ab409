"""Views, copies, casts and constants: operations that compute nothing.

Tensors of float64 may be held and moved (many constants come from NumPy), as long as they are cast
to another dtype before anything is computed with them. These kernels cost nothing. On a wafer a
transposition or a concatenation does move data; its routes are part of placement and routing, not
of a kernel's cycles.
"""

from __future__ import annotations

from collections.abc import Callable

from openwafer.kernels.cost import free_cost
from openwafer.kernels.kernel import ALL_DTYPES, Candidate, Kernel, Rejection, specs_of
from openwafer.kernels.pattern import Op

__all__ = ["CONSTANT", "SHAPE_KERNELS"]


def _nothing_wrong(candidate: Candidate) -> Rejection | None:
    return None


def _check_cast(candidate: Candidate) -> Rejection | None:
    """A tensor of another dtype may come in, as long as it leaves as one that kernels take."""
    for spec in specs_of(candidate.anchor):
        if spec.dtype not in ALL_DTYPES:
            return Rejection(
                f"kernel `cast` gives {', '.join(ALL_DTYPES)}; `{candidate.anchor.name}` is "
                f"{spec.dtype}",
                "`.to(torch.float32)`, or leave the cast out",
            )
    return None


def _free(
    name: str,
    summary: str,
    names: str,
    *,
    dtypes: tuple[str, ...] = (*ALL_DTYPES, "float64"),
    check: Callable[[Candidate], Rejection | None] = _nothing_wrong,
) -> Kernel:
    targets = " ".join(word if word == "getitem" else f"aten.{word}" for word in names.split())
    return Kernel(
        name=name,
        family="shape",
        summary=summary,
        patterns=(Op(targets),),
        dtypes=dtypes,
        cost=free_cost,
        check=check,
        sources=("no arithmetic",),
    )


CONSTANT = _free(
    "constant",
    "values known when compiling",
    "zeros ones full empty arange linspace logspace eye zeros_like ones_like full_like "
    "empty_like scalar_tensor new_zeros new_ones new_full new_empty tril_indices triu_indices "
    "zero empty_strided new_empty_strided empty_permuted range hann_window hamming_window",
)
"""Also of any operation whose operands are all constants (match.py)."""

SHAPE_KERNELS: tuple[Kernel, ...] = (
    _free(
        "view",
        "the same elements under another shape",
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as alias "
        "ravel contiguous clone detach lift_fresh lift_fresh_copy atleast_1d atleast_2d "
        "atleast_3d as_strided view_copy _reshape_alias pixel_shuffle pixel_unshuffle "
        "channel_shuffle native_channel_shuffle resolve_conj resolve_neg",
    ),
    _free(
        "transpose",
        "dimensions in another order",
        "permute transpose t movedim moveaxis swapaxes swapdims numpy_T mT adjoint",
    ),
    _free(
        "broadcast",
        "one element in several places",
        "expand expand_as broadcast_to broadcast_tensors repeat tile meshgrid "
        "repeat_interleave.self_int expand_copy",
    ),
    _free(
        "pick",
        "some of the elements, at places known when compiling",
        "getitem select slice split split_with_sizes chunk narrow unbind tensor_split hsplit "
        "vsplit dsplit diagonal linalg_diagonal unsafe_split unsafe_split_with_sizes unsafe_chunk "
        "split_copy split_with_sizes_copy slice_copy select_copy",
    ),
    _free(
        "join",
        "tensors side by side",
        "cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag",
    ),
    _free(
        "reorder",
        "elements in another order, or at a distance from each other",
        "flip fliplr flipud roll rot90 diag diag_embed diagflat",
    ),
    _free(
        "pad",
        "a border of zeros, of a number, or of what lies next to it",
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d _pad_circular _pad_enum",
    ),
    _free(
        "cast",
        "the same values in another dtype",
        "_to_copy to type_as copy",
        check=_check_cast,
    ),
    CONSTANT,
    _free(
        "assertion",
        "a condition that the capture has checked",
        "_assert_tensor_metadata _assert_async _assert_scalar sym_size sym_constrain_range "
        "sym_constrain_range_for_size",
        dtypes=(*ALL_DTYPES, "float64", "complex64", "complex128"),
    ),
)
