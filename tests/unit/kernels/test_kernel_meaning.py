"""Every kernel lies in a real capture, and what it covers runs as eager PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runner import check_against_eager, floats, kernel_names

from openwafer.kernels import KERNELS

A = torch.ops.aten
X = floats(3, 4)
POSITIVE = floats(3, 4, low=0.1)
IMAGE = floats(2, 4, 8, 8)
INDEX = torch.tensor([[0, 2, 1, 0]])
TARGET = torch.tensor([0, 3, 1])
MASK = torch.tensor([[True, False, True, False]] * 3)

Case = tuple[str, Callable[..., Any], tuple[torch.Tensor, ...]]


def _case(kernels: str, function: Callable[..., Any], *arguments: torch.Tensor) -> Case:
    return kernels, function, arguments


def _unary(names: str, *arguments: torch.Tensor) -> Case:
    """Torch functions of one tensor, all in one capture."""
    functions = [getattr(torch, n, None) or getattr(F, n) for n in names.split()]
    return _case(names, lambda x: [f(x) for f in functions], *arguments)


CASES: tuple[Case, ...] = (
    _case("linear", F.linear, X, floats(5, 4), floats(5)),
    _case("matmul", lambda a, b: (a @ b, torch.mv(a, b[:, 0]), torch.dot(a[0], b[:, 1])),
          X, floats(4, 5)),
    _case("matmul_add", lambda c, a, b: (torch.baddbmm(c, a, b), torch.addbmm(c[0], a, b)),
          floats(2, 3, 5), floats(2, 3, 4), floats(2, 4, 5)),
    _case("einsum", lambda a, b: (torch.einsum("...ij,jk->...ik", a, b), torch.einsum("bij", a)),
          floats(2, 3, 4), floats(4, 5)),
    _case("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2),
          *(floats(2, 2, 5, 4),) * 3),
    _case("attention_spelled_out", lambda q, k, v: torch.softmax(q @ k.mT / 2, -1) @ v,
          *(floats(2, 2, 5, 4),) * 3),
    _case("rotary", lambda x, c, s: x * c + torch.cat((-x[..., 2:], x[..., :2]), -1) * s, X, X, X),
    _case("convolution", lambda x, w, v: (F.conv2d(x, w, padding=1), F.conv1d(x[:, :, 0], v)),
          IMAGE, floats(6, 4, 3, 3), floats(5, 4, 2)),
    _case("convolution", lambda x, w: F.conv3d(x, w, padding="same"),
          floats(1, 2, 3, 4, 4), floats(3, 2, 3, 3, 3)),
    _case("transposed_convolution", lambda x, w: F.conv_transpose2d(x, w, stride=2),
          IMAGE, floats(4, 3, 2, 2)),
    _case("avg_pool max_pool adaptive_pool unpool resize_nearest resize_linear resize_cubic unfold",
          lambda x: (F.avg_pool2d(x, 2), F.max_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, 1),
                     F.adaptive_max_pool2d(x, 2), F.interpolate(x, scale_factor=2),
                     F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
                     F.interpolate(x, (5, 5), mode="bilinear"),
                     F.interpolate(x, (5, 5), mode="bicubic"),
                     F.fold(F.unfold(x, 2), (8, 8), 2)), IMAGE),
    _unary("relu relu6 hardtanh leaky_relu elu sigmoid tanh silu gelu softplus mish hardswish "
           "hardsigmoid", X),
    _case("log_sigmoid threshold glu elu",
          lambda x: (F.logsigmoid(x), F.threshold(x, 0.1, 3.0), F.glu(x),
                     F.selu(x)), X),
    _case("prelu", F.prelu, IMAGE, floats(4)),
    _case("quick_gelu softmax", lambda x: (x * torch.sigmoid(1.702 * x), F.softmax(x, -1)), X),
    _case("dropout", lambda x: F.dropout(x, 0.5), X),
    _case("bernoulli", lambda x: F.dropout2d(x, 0.5), IMAGE),
    _case("bernoulli", lambda x: x * torch.empty(3, 1).bernoulli_(0.5), X),
    _case("cross_entropy log_softmax nll_loss",
          lambda x, y: (F.cross_entropy(x, y, label_smoothing=0.1), F.log_softmax(x, -1),
                        F.nll_loss(F.log_softmax(x, -1), y), F.nll_loss(x, y)), X, TARGET),
    _case("mse_loss l1_loss smooth_l1_loss kl_div poisson_nll_loss",
          lambda x, y: (F.mse_loss(x, y), F.l1_loss(x, y), F.smooth_l1_loss(x, y),
                        F.huber_loss(x, y), F.kl_div(x, y, reduction="batchmean"),
                        F.poisson_nll_loss(x, y)),
          X, POSITIVE),
    _case("binary_cross_entropy",
          lambda x, y: (F.binary_cross_entropy_with_logits(x, y.detach()),
                        F.binary_cross_entropy(torch.sigmoid(x), y.detach())), X, POSITIVE),
    _case("margin_loss distance_loss",
          lambda x, y: (F.multi_margin_loss(x, y), F.soft_margin_loss(x[:, 0], y),
                        F.cosine_embedding_loss(x, 2 * x, y), F.triplet_margin_loss(x, x + 1, -x)),
          X, torch.tensor([1, 1, 1])),
    _case("layer_norm rms_norm", lambda x, w, b: (F.layer_norm(x, (4,), w, b),
          F.rms_norm(x, (4,), w)), X, floats(4), floats(4)),
    _case("group_norm instance_norm batch_norm",
          lambda x: (F.group_norm(x, 2), F.instance_norm(x),
                     F.batch_norm(x, None, None, training=True)), IMAGE),
    _case("weight_norm", lambda v, g: torch._weight_norm(v, g), X, floats(3, 1)),
    _case("embedding embedding_bag index gather scatter index_put slice_scatter one_hot",
          lambda x, i: (F.embedding(i, x), F.embedding_bag(i, x, mode="sum"), x[i[0, :3]],
                        torch.gather(x, 0, i), x.index_select(0, i[0]), F.one_hot(i, 5),
                        x.scatter_add(0, i, x[:1]), x.index_put((i[0, :2],), x[:2] * 2),
                        x.slice_scatter(x[:1] * 2, 0, 1, 2)), X, INDEX),
    _case("fourier_real", lambda x: (torch.fft.fft2(x).real, torch.fft.fft(torch.fft.fft(x)).imag),
          X),
    _case("histogram", lambda x: torch.histc(x.detach(), 4, -1, 1), X),
    _case("rnn", lambda x, h, w, v: torch.rnn_tanh_cell(x, h, w, v), X, floats(3, 5),
          floats(5, 4), floats(5, 5)),
    _case("lstm", lambda x, h, w, v: torch.lstm_cell(x, (h, h), w, v), X, floats(3, 5),
          floats(20, 4), floats(20, 5)),
    _case("gru", lambda x, h, w, v: torch.gru_cell(x, h, w, v), X, floats(3, 5),
          floats(15, 4), floats(15, 5)),
    _case("sub rsub outer div reciprocal remainder floor_divide",
          lambda x: (x - 2, 1 - x, torch.outer(x[0], x[1]), x / x.square(), x.reciprocal(),
                     x.detach() % 0.3, x.detach() // 0.3), POSITIVE),
    _case("square kron deg2rad rad2deg",
          lambda x: (x.square(), torch.kron(x, x), torch.deg2rad(x), torch.rad2deg(x)), X),
    _case("addcmul addcdiv lerp addr cross",
          lambda x, y: (torch.addcmul(x, y, y), torch.addcdiv(x, x, y), torch.lerp(x, y, 0.3),
                        torch.addr(x, x[:, 0], y[0]), torch.linalg.cross(x[:, :3], y[:, :3])),
          X, POSITIVE),
    _unary("neg sign floor ceil round trunc signbit frac nan_to_num abs", X),
    _case("clamp clamp_min clamp_max minimum maximum copysign heaviside",
          lambda x, y: (x.clamp(-0.5, 0.5), x.clamp_min(0), x.clamp_max(0), torch.minimum(x, y),
                        torch.maximum(x, y), torch.copysign(x, y), torch.max(x, y),
                        torch.heaviside(x.detach(), y.detach())),
          X, POSITIVE),
    _case("pow atan2 hypot logaddexp logaddexp2 xlogy",
          lambda x, y: (y**3, y**x, torch.atan2(x, y), torch.hypot(x, y), torch.logaddexp(x, y),
                        torch.logaddexp2(x, y), torch.xlogy(x, y)), X, POSITIVE),
    _unary("sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh asin acos atan "
           "asinh atanh erf erfc erfinv lgamma digamma sinc", POSITIVE * 0.9),
    _case("logit acosh", lambda x: (torch.logit(x * 0.9), torch.acosh(x + 2)), POSITIVE),
    _case("special_entr special_log_ndtr special_ndtr special_xlog1py",
          lambda x: (torch.special.entr(x), torch.special.log_ndtr(x), torch.special.ndtr(x),
                     torch.special.xlog1py(x, x)), POSITIVE),
    _case("eq ne lt le gt ge isclose",
          lambda x: (x == 0, x != 0, x < 0, x <= x.T.T, x > 0, x >= 0, torch.isclose(x, x)), X),
    _case("logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor "
          "bitwise_not bitwise_left_shift bitwise_right_shift where masked_fill",
          lambda m, x, i: (torch.logical_and(m, ~m), torch.logical_or(m, m), torch.logical_not(m),
                           torch.logical_xor(m, m), m & m, m | m, m ^ m, i << 1, i >> 1,
                           torch.where(m, x, 0.0), x.masked_fill(m, 2.0)), MASK, X, INDEX),
    _case("triu tril fill", lambda x: (x.triu(), x.tril(1), A.fill(x, 2.0)), X),
    _case("isnan isinf isfinite isposinf isneginf",
          lambda x: (x.isnan(), x.isinf(), x.isfinite(), A.isposinf(x), A.isneginf(x)), X),
    _case("sum mean trace amax amin aminmax max min argmax argmin any all count_nonzero prod",
          lambda x: (x.sum(), x.mean(1), x.trace(), x.amax(0), x.amin(0), *x.aminmax(), x.max(),
                     *x.min(0), x.argmax(1), x.argmin(1), (x > 0).any(), (x > 0).all(0),
                     torch.count_nonzero(x.detach()), x.prod(1)), X),
    _case("var std norm distance logsumexp cumsum cumprod logcumsumexp",
          lambda x: (x.var(1), x.std(), torch.linalg.vector_norm(x, dim=1), x.norm(),
                     F.cosine_similarity(x, x + 1), F.pairwise_distance(x, x * 2),
                     torch.logsumexp(x, 1), x.cumsum(1), x.cumprod(1), x.logcumsumexp(1)), X),
    _case("sort topk search",
          lambda x: (*x.sort(1), *x.topk(2), *x.median(1), torch.bucketize(x, torch.arange(3.0))),
          X),
    _case("transpose broadcast pick join reorder pad",
          lambda x: (x.mT, x.expand(2, 3, 4), x[1:], torch.cat([x, x]), x.flip(0).roll(1),
                     F.pad(x, (1, 1)), x.repeat_interleave(2, 0)), X),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0][:40])
def test_a_kernel_lies_and_means_what_eager_does(case: Case) -> None:
    kernels, function, arguments = case
    found = kernel_names(check_against_eager(function, *arguments), own=True)
    assert set(kernels.split()) <= found


def test_every_kernel_of_the_library_has_a_case() -> None:
    tried = {name for names, _, _ in CASES for name in names.split()}
    tried |= {"constant", "view", "mul", "add", "sum", "cast"}  # in every case
    tried |= {"assertion", "grouped_matmul"}  # tests of their own
    assert {kernel.name for kernel in KERNELS} - tried == set()


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
