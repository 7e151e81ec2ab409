"""For every kernel a function that uses it, on tensors of drawn sizes and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from kernel_runner import floats

__all__ = ["ACCURACY", "ALWAYS", "CASES", "Case", "Sizes", "drawn_sizes"]

A = torch.ops.aten
Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """What is drawn: rows, columns (even), image height and width, a further extent, a dtype."""

    n: int = 3
    c: int = 4
    h: int = 8
    w: int = 8
    k: int = 5
    dtype: torch.dtype = torch.float32

    def floats(self, *shape: int, low: float = -1.0) -> Tensor:
        return floats(*shape, dtype=self.dtype, low=low)

    def index(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 up to `high`."""
        count = torch.Size(shape).numel()
        return ((torch.arange(count) * 7 + 2) % high).reshape(shape)

    @property
    def x(self) -> Tensor:
        return self.floats(self.n, self.c)

    @property
    def positive(self) -> Tensor:
        return self.floats(self.n, self.c, low=0.1)

    @property
    def image(self) -> Tensor:
        return self.floats(2, self.c, self.h, self.w)


def drawn_sizes(dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[Sizes]:
    return st.builds(
        Sizes,
        n=st.integers(2, 6),
        c=st.sampled_from((4, 6, 8)),
        h=st.integers(6, 10),
        w=st.integers(6, 10),
        k=st.integers(1, 6),
        dtype=st.sampled_from(dtypes),
    )


@dataclass(frozen=True)
class Case:
    """`kernels` lie where `function` is captured with the tensors that `make` gives for sizes."""

    kernels: str
    function: Callable[..., Any]
    make: Callable[[Sizes], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


ACCURACY = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative to the largest element: sums of several 16-bit gradients are added in another order."""

ALWAYS = {"constant", "view", "mul", "add", "sum", "cast"}
"""In every case."""

_SINGLE = (torch.float32,)
"""PyTorch has no 16-bit kernel of some operation of these on a CPU."""
_NO_HALF = (torch.float32, torch.bfloat16)


def _x(s: Sizes) -> tuple[Tensor, ...]:
    return (s.x,)


def _positive(s: Sizes) -> tuple[Tensor, ...]:
    return (s.positive,)


def _image(s: Sizes) -> tuple[Tensor, ...]:
    return (s.image,)


def _pair(s: Sizes) -> tuple[Tensor, ...]:
    return s.x, s.positive


def _heads(s: Sizes) -> tuple[Tensor, ...]:
    return tuple(s.floats(2, s.n, length, s.c) for length in (s.k, s.h, s.h))


def _cell(gates: int) -> Callable[[Sizes], tuple[Tensor, ...]]:
    return lambda s: (
        s.x,
        s.floats(s.n, s.k),
        s.floats(gates * s.k, s.c),
        s.floats(gates * s.k, s.k),
    )


def _unary(names: str, make: Callable[[Sizes], tuple[Tensor, ...]], **settings: Any) -> Case:
    """Torch functions of one tensor, all in one capture."""
    functions = [getattr(torch, n, None) or getattr(F, n) for n in names.split()]
    return Case(names, lambda x: [f(x) for f in functions], make, **settings)


CASES: tuple[Case, ...] = (
    Case("linear", F.linear, lambda s: (s.x, s.floats(s.k, s.c), s.floats(s.k))),
    Case("matmul", lambda a, b: (a @ b, torch.mv(a, b[:, 0]), torch.dot(a[0], b[:, -1])),
         lambda s: (s.x, s.floats(s.c, s.k))),
    Case("matmul_add", lambda c, a, b: (torch.baddbmm(c, a, b), torch.addbmm(c[0], a, b)),
         lambda s: (s.floats(2, s.n, s.k), s.floats(2, s.n, s.c), s.floats(2, s.c, s.k))),
    Case("einsum", lambda a, b: (torch.einsum("...ij,jk->...ik", a, b), torch.einsum("bij", a)),
         lambda s: (s.floats(2, s.n, s.c), s.floats(s.c, s.k))),
    Case("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2),
         _heads),
    Case("attention_spelled_out",
         lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT), -1) @ v, _heads),
    Case("rotary",
         lambda x, c, s: x * c + torch.cat((-x[..., x.shape[-1] // 2 :],
                                            x[..., : x.shape[-1] // 2]), -1) * s,
         lambda s: (s.x, s.x, s.x)),
    Case("convolution", lambda x, w, v: (F.conv2d(x, w, padding=1), F.conv1d(x[:, :, 0], v)),
         lambda s: (s.image, s.floats(s.k, s.c, 3, 3), s.floats(s.k, s.c, 2))),
    Case("convolution", lambda x, w: F.conv3d(x, w, padding="same"),
         lambda s: (s.floats(1, 2, s.n, s.c, s.k), s.floats(s.k, 2, 3, 3, 3))),
    Case("transposed_convolution", lambda x, w: F.conv_transpose2d(x, w, stride=2),
         lambda s: (s.image, s.floats(s.c, s.k, 2, 2))),
    Case("avg_pool max_pool adaptive_pool unpool resize_nearest resize_linear resize_cubic unfold",
         lambda x: (F.avg_pool2d(x, 2), F.max_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, 1),
                    F.adaptive_max_pool2d(x, 2), F.interpolate(x, scale_factor=2),
                    F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2,
                                   output_size=x.shape[2:]),
                    F.interpolate(x, (5, 5), mode="bilinear"),
                    F.interpolate(x, (5, 5), mode="bicubic"),
                    F.fold(F.unfold(x, 2), x.shape[2:], 2)), _image, _SINGLE),
    _unary("relu relu6 hardtanh leaky_relu elu sigmoid tanh silu gelu softplus mish hardswish "
           "hardsigmoid", _x),
    Case("log_sigmoid threshold glu elu",
         lambda x: (F.logsigmoid(x), F.threshold(x, 0.1, 3.0), F.glu(x), F.selu(x)), _x),
    Case("prelu", F.prelu, lambda s: (s.image, s.floats(s.c))),
    Case("quick_gelu softmax", lambda x: (x * torch.sigmoid(1.702 * x), F.softmax(x, -1)), _x),
    Case("dropout", lambda x: F.dropout(x, 0.5), _x),
    Case("bernoulli",
         lambda x: (F.dropout2d(x, 0.5), x * torch.empty(2, 1, 1, 1).bernoulli_(0.5),
                    torch.bernoulli(x.sigmoid()),
                    x * torch.empty_like(x).bernoulli_(x.detach().sigmoid())), _image),
    Case("rand randn randint randperm",
         lambda x: (x * torch.floor(0.8 + torch.rand(x.shape[0], 1)), x * torch.rand_like(x),
                    torch.randn_like(x.T).T * x, torch.normal(x.float(), x.float().exp()),
                    torch.normal(0.0, 1.0, x.shape) + x, torch.empty_like(x).normal_(1, 2) * x,
                    torch.empty_like(x).uniform_(2, 3) * x, x * torch.randint(5, x.shape),
                    x * torch.randint_like(x, 2, 5), x[torch.randperm(x.shape[0])]), _x),
    Case("exponential log_normal cauchy geometric poisson",
         lambda x: (F.gumbel_softmax(x), x * torch.empty_like(x).log_normal_(),
                    torch.atan(x * torch.empty_like(x).cauchy_()),
                    x * torch.empty_like(x).geometric_(0.4), torch.poisson(x.float().exp())),
         _x, _NO_HALF),
    Case("cross_entropy log_softmax nll_loss",
         lambda x, y: (F.cross_entropy(x, y, label_smoothing=0.1), F.log_softmax(x, -1),
                       F.nll_loss(F.log_softmax(x, -1), y), F.nll_loss(x, y)),
         lambda s: (s.x, s.index(s.c, s.n))),
    Case("mse_loss l1_loss smooth_l1_loss kl_div poisson_nll_loss",
         lambda x, y: (F.mse_loss(x, y), F.l1_loss(x, y), F.smooth_l1_loss(x, y),
                       F.huber_loss(x, y), F.kl_div(x, y, reduction="batchmean"),
                       F.poisson_nll_loss(x, y)), _pair),
    Case("binary_cross_entropy",
         lambda x, y: (F.binary_cross_entropy_with_logits(x, y.detach()),
                       F.binary_cross_entropy(torch.sigmoid(x), y.detach())), _pair),
    Case("margin_loss distance_loss",
         lambda x, y: (F.multi_margin_loss(x, y), F.soft_margin_loss(x[:, 0], y),
                       F.cosine_embedding_loss(x, 2 * x, y), F.triplet_margin_loss(x, x + 1, -x)),
         lambda s: (s.x, torch.ones(s.n, dtype=torch.long)), _SINGLE),
    Case("layer_norm rms_norm",
         lambda x, w, b: (F.layer_norm(x, w.shape, w, b), F.rms_norm(x, w.shape, w)),
         lambda s: (s.x, s.floats(s.c), s.floats(s.c))),
    Case("group_norm instance_norm batch_norm",
         lambda x: (F.group_norm(x, 2), F.instance_norm(x),
                    F.batch_norm(x, None, None, training=True)), _image),
    Case("weight_norm", lambda v, g: torch._weight_norm(v, g), lambda s: (s.x, s.floats(s.n, 1))),
    Case("embedding embedding_bag index gather scatter index_put slice_scatter one_hot",
         lambda x, i: (F.embedding(i, x), F.embedding_bag(i, x, mode="sum"), x[i[0, :3]],
                       torch.gather(x, 0, i), x.index_select(0, i[0]), F.one_hot(i, 9),
                       x.scatter_add(0, i, x[:1]), x.index_put((i[0, :2],), x[:2] * 2),
                       x.slice_scatter(x[:1] * 2, 0, 1, 2)),
         lambda s: (s.x, s.index(s.n, 1, s.c))),
    Case("fourier_real", lambda x: (torch.fft.fft2(x).real, torch.fft.fft(torch.fft.fft(x)).imag),
         _x, _SINGLE),
    Case("histogram", lambda x: torch.histc(x.detach(), 4, -1, 1), _x, _SINGLE),
    Case("rnn", lambda x, h, w, v: torch.rnn_tanh_cell(x, h, w, v), _cell(1)),
    Case("lstm", lambda x, h, w, v: torch.lstm_cell(x, (h, h), w, v), _cell(4)),
    Case("gru", lambda x, h, w, v: torch.gru_cell(x, h, w, v), _cell(3)),
    Case("sub rsub outer div reciprocal remainder floor_divide",
         lambda x: (x - 2, 1 - x, torch.outer(x[0], x[1]), x / x.square(), x.reciprocal(),
                    x.detach() % 0.3, x.detach() // 0.3), _positive),
    Case("square kron deg2rad rad2deg",
         lambda x: (x.square(), torch.kron(x, x), torch.deg2rad(x), torch.rad2deg(x)), _x),
    Case("addcmul addcdiv lerp addr cross",
         lambda x, y: (torch.addcmul(x, y, y), torch.addcdiv(x, x, y), torch.lerp(x, y, 0.3),
                       torch.addr(x, x[:, 0], y[0]), torch.linalg.cross(x[:, :3], y[:, :3])),
         _pair),
    _unary("neg sign floor ceil round trunc signbit frac nan_to_num abs", _x),
    Case("clamp clamp_min clamp_max minimum maximum copysign heaviside",
         lambda x, y: (x.clamp(-0.5, 0.5), x.clamp_min(0), x.clamp_max(0), torch.minimum(x, y),
                       torch.maximum(x, y), torch.copysign(x, y), torch.max(x, y),
                       torch.heaviside(x.detach(), y.detach())), _pair),
    Case("pow atan2 hypot logaddexp logaddexp2 xlogy",
         lambda x, y: (y**3, y**x, torch.atan2(x, y), torch.hypot(x, y), torch.logaddexp(x, y),
                       torch.logaddexp2(x, y), torch.xlogy(x, y)), _pair, _NO_HALF),
    _unary("sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh asin acos atan "
           "asinh atanh erf erfc erfinv lgamma digamma sinc",
           lambda s: (s.positive * 0.9,), dtypes=_NO_HALF),
    Case("logit acosh", lambda x: (torch.logit(x * 0.9), torch.acosh(x + 2)), _positive),
    Case("special_entr special_log_ndtr special_ndtr special_xlog1py",
         lambda x: (torch.special.entr(x), torch.special.log_ndtr(x), torch.special.ndtr(x),
                    torch.special.xlog1py(x, x)), _positive, _SINGLE),
    Case("eq ne lt le gt ge isclose",
         lambda x: (x == 0, x != 0, x < 0, x <= x.T.T, x > 0, x >= 0, torch.isclose(x, x)), _x),
    Case("logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_xor "
         "bitwise_not bitwise_left_shift bitwise_right_shift where masked_fill",
         lambda m, x, i: (torch.logical_and(m, ~m), torch.logical_or(m, m), torch.logical_not(m),
                          torch.logical_xor(m, m), m & m, m | m, m ^ m, i << 1, i >> 1,
                          torch.where(m, x, 0.0), x.masked_fill(m, 2.0)),
         lambda s: (s.index(2, s.n, s.c) == 1, s.x, s.index(s.n, 1, s.c))),
    Case("triu tril fill", lambda x: (x.triu(), x.tril(1), A.fill(x, 2.0)), _x),
    Case("isnan isinf isfinite isposinf isneginf",
         lambda x: (x.isnan(), x.isinf(), x.isfinite(), A.isposinf(x), A.isneginf(x)), _x),
    Case("sum mean trace amax amin aminmax max min argmax argmin any all count_nonzero prod",
         lambda x: (x.sum(), x.mean(1), x.trace(), x.amax(0), x.amin(0), *x.aminmax(), x.max(),
                    *x.min(0), x.argmax(1), x.argmin(1), (x > 0).any(), (x > 0).all(0),
                    torch.count_nonzero(x.detach()), x.prod(1)), _x),
    Case("var std norm distance logsumexp cumsum cumprod logcumsumexp",
         lambda x: (x.var(1), x.std(), torch.linalg.vector_norm(x, dim=1), x.norm(),
                    F.cosine_similarity(x, x + 1), F.pairwise_distance(x, x * 2),
                    torch.logsumexp(x, 1), x.cumsum(1), x.cumprod(1), x.logcumsumexp(1)), _x),
    Case("sort topk search",
         lambda x: (*x.sort(1), *x.topk(2), *x.median(1),
                    torch.bucketize(x.float(), torch.arange(3.0))), _x),
    Case("transpose broadcast pick join reorder pad",
         lambda x: (x.mT, x.expand(2, *x.shape), x[1:], torch.cat([x, x]), x.flip(0).roll(1),
                    F.pad(x, (1, 1)), x.repeat_interleave(2, 0)), _x),
)  # fmt: skip
