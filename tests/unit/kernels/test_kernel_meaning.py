"""Every kernel lies in a real capture, and what it covers runs as eager PyTorch does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import ACCURACY, ALWAYS, CASES, Case, Sizes, drawn_sizes
from kernel_runner import check_against_eager, floats, kernel_names

from openwafer.kernels import KERNELS

A = torch.ops.aten


def _name(case: Case) -> str:
    return case.kernels[:40]


def _check(case: Case, sizes: Sizes) -> None:
    graph = check_against_eager(case.function, *case.make(sizes), tolerance=ACCURACY[sizes.dtype])
    assert set(case.kernels.split()) <= kernel_names(graph, own=True)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_a_kernel_lies_and_means_what_eager_does(case: Case) -> None:
    _check(case, Sizes())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_a_kernel_of_any_shape_and_dtype_means_what_eager_does(case: Case) -> None:
    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(sizes=drawn_sizes(case.dtypes))
    def check(sizes: Sizes) -> None:
        _check(case, sizes)

    check()


def test_every_kernel_of_the_library_has_a_case() -> None:
    tried = {name for case in CASES for name in case.kernels.split()}
    tried |= {"assertion", "grouped_matmul"}  # tests of their own
    assert {kernel.name for kernel in KERNELS} == tried | ALWAYS


def test_grouped_products() -> None:
    ends = torch.tensor([2, 6], dtype=torch.int32)

    def experts(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return A._grouped_mm(x.bfloat16(), w.bfloat16(), offsets)

    graph = check_against_eager(experts, floats(6, 16), floats(2, 16, 16), ends)
    assert "grouped_matmul" in kernel_names(graph)


FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
EXTENT = st.integers(1, 5)
FEW = settings(max_examples=3, deadline=None, derandomize=True)


@FEW
@given(dtype=FLOATS, rows=EXTENT, inner=EXTENT, columns=EXTENT, bias=st.booleans())
def test_linear_of_any_shape_and_dtype(dtype, rows, inner, columns, bias) -> None:
    arguments = [floats(rows, inner, dtype=dtype), floats(columns, inner, dtype=dtype)]
    arguments += [floats(columns, dtype=dtype)] if bias else []
    assert kernel_names(check_against_eager(F.linear, *arguments)) == {"linear"}


@FEW
@given(
    dtype=FLOATS, batch=EXTENT, size=st.integers(3, 7), groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3), stride=st.integers(1, 2), transposed=st.booleans(),
)  # fmt: skip
def test_convolution_of_any_shape_and_dtype(
    dtype, batch, size, groups, kernel, stride, transposed
) -> None:
    def convolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        function = F.conv_transpose2d if transposed else F.conv2d
        return function(x, w, stride=stride, groups=groups)

    weight = (4, 2, kernel, kernel) if transposed else (6, 4 // groups, kernel, kernel)
    arguments = floats(batch, 4, size, size, dtype=dtype), floats(*weight, dtype=dtype)
    expected = "transposed_convolution" if transposed else "convolution"
    assert kernel_names(check_against_eager(convolve, *arguments)) == {expected}


@FEW
@given(dtype=FLOATS, shape=st.lists(EXTENT, min_size=1, max_size=4), name=st.sampled_from(
    ["gelu", "silu", "softplus", "tanh", "sigmoid", "mish"]))  # fmt: skip
def test_activations_of_any_shape_and_dtype(dtype, shape, name) -> None:
    function = getattr(F, name)
    assert kernel_names(check_against_eager(function, floats(*shape, dtype=dtype))) == {name}


@FEW
@given(dtype=FLOATS, rows=EXTENT, width=st.integers(2, 6), affine=st.booleans())
def test_layer_norm_of_any_shape_and_dtype(dtype, rows, width, affine) -> None:
    def norm(x: torch.Tensor, *scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), *scale)

    scale = [floats(width, dtype=dtype)] * 2 if affine else []
    graph = check_against_eager(norm, floats(rows, width, dtype=dtype), *scale)
    assert kernel_names(graph) == {"layer_norm"}


@FEW
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), heads=EXTENT, queries=EXTENT,
    keys=EXTENT, width=st.integers(1, 8), causal=st.booleans(),
)  # fmt: skip
def test_attention_of_any_shape_and_dtype(dtype, heads, queries, keys, width, causal) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    shapes = ((2, heads, n, width) for n in (queries, keys, keys))
    graph = check_against_eager(attend, *(floats(*shape, dtype=dtype) for shape in shapes))
    assert kernel_names(graph) == {"attention"}
