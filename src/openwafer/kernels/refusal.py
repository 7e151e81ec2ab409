"""Why an operation has no kernel, and what to write instead.

Decides the reason, the nearest supported operation and the way out, and how refusals read. Does not
decide what is refused (match.py and the kernels).
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import fx

from openwafer.graph.program import Site, site_of
from openwafer.kernels.folding import fold_names, folding_key
from openwafer.kernels.kernel import Kernel, Rejection, specs_of
from openwafer.kernels.pattern import op_stem, target_name

__all__ = ["EXPLANATIONS", "Explanation", "Refusal", "explain", "refusals_text", "tensors_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An operation that no kernel takes, or that no gradient can pass in training.

    node: its name in the captured graph.
    op: the operation, as `aten.cumsum.default`.
    tensors: shapes and dtypes of what it reads and gives.
    site: module path and class, the user's file and line.
    reason: why no kernel takes it.
    nearest: the nearest operation that a kernel takes; empty where there is none near.
    suggestion: what to write instead.
    """

    node: str
    op: str
    tensors: str
    site: Site
    reason: str
    nearest: str
    suggestion: str

    @property
    def module(self) -> str:
        """Path of the module that runs the operation; empty for the model itself."""
        return self.site.module

    @property
    def file(self) -> str:
        return self.site.file

    @property
    def line(self) -> int:
        return self.site.line

    def __str__(self) -> str:
        return "\n".join(_lines((self,)))


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known about operations that are refused on principle."""

    reason: str
    nearest: str
    suggestion: str


def refusals_text(refusals: Sequence[Refusal]) -> str:
    """All refusals, numbered; those of repeated layers once, with their count."""
    groups: defaultdict[tuple[str, ...], list[Refusal]] = defaultdict(list)
    for refusal in refusals:
        site = refusal.site
        place = (folding_key(site.module), site.module_type, site.file, str(site.line))
        groups[(refusal.op, refusal.tensors, refusal.reason, *place)].append(refusal)
    lines: list[str] = []
    for number, group in enumerate(groups.values(), start=1):
        head, *rest = _lines(group)
        lines.append(f"{number:>3}. {head}")
        lines.extend(f"     {line}" for line in rest)
    return "\n".join(lines)


def _lines(group: Sequence[Refusal]) -> list[str]:
    first = group[0]
    count = f"  ×{len(group)}" if len(group) > 1 else ""
    labelled = (
        ("at", _place(group)),
        ("why", first.reason),
        ("nearest", first.nearest),
        ("try", first.suggestion),
    )
    return [
        f"{first.op}  {first.tensors}{count}",
        *(f"  {label:<8} {text}" for label, text in labelled if text),
    ]


def _place(group: Sequence[Refusal]) -> str:
    site = group[0].site
    module = fold_names(refusal.module for refusal in group) or "(top)"
    if site.module_type:
        module += f" ({site.module_type})"
    return f"{module}, {site.file}:{site.line}" if site.file else f"{module}, unknown line"


def explain(
    node: fx.Node, rejections: Sequence[Rejection], kernels: Sequence[Kernel], mode: str
) -> Refusal:
    """The refusal of an operation, given what the kernels that could lie there said."""
    op = target_name(node)
    if op.startswith("auto_functionalized"):  # torch's form of an operation that works in place
        op = str(node.args[0])
    known = _known(node, op)
    if rejections:
        reason = "; ".join(dict.fromkeys(rejection.reason for rejection in rejections))
        tips = [rejection.alternative for rejection in rejections if rejection.alternative]
        nearest = f"the same operation as {_kernel_of(op, kernels)} takes it"
        suggestion = tips[0] if tips else known.suggestion
    else:
        reason, nearest, suggestion = known.reason, known.nearest, known.suggestion
        if not nearest:
            nearest = _nearest_op(op, kernels)
    return Refusal(
        node=node.name,
        op=op,
        tensors=tensors_text(node),
        site=site_of(node),
        reason=reason,
        nearest=nearest,
        suggestion=suggestion,
    )


def _known(node: fx.Node, op: str) -> Explanation:
    for key in (op, op_stem(op)):
        if key in EXPLANATIONS:
            return EXPLANATIONS[key]
    for start, explanation in _BY_PREFIX.items():
        if op.startswith(start):
            return explanation
    specs = [spec for n in (*node.all_input_nodes, node) for spec in specs_of(n)]
    if any(spec.dtype.startswith("complex") for spec in specs):
        return _COMPLEX
    if not op.startswith(("aten.", "prims.")):
        return Explanation(
            f"`{op}` is a custom operation: what it computes and costs is not known",
            "",
            "the same computation in torch operations; many libraries have a plain "
            "implementation to choose in the model's configuration",
        )
    return Explanation(
        f"there is no kernel for `{op_stem(op)}`",
        "",
        "the same computation in operations that `openwafer kernels` lists",
    )


def _kernel_of(op: str, kernels: Sequence[Kernel]) -> str:
    names = [k.name for k in kernels if any(_has(p.targets, op) for p in k.patterns)]
    return f"kernel `{names[0]}`" if names else "a kernel"


def _has(targets: tuple[str, ...], op: str) -> bool:
    return op in targets or op_stem(op) in targets


def _nearest_op(op: str, kernels: Sequence[Kernel]) -> str:
    close = difflib.get_close_matches(op_stem(op), _stems(tuple(kernels)), n=1, cutoff=0.7)
    return f"`{close[0]}`" if close else ""


@lru_cache(maxsize=4)
def _stems(kernels: tuple[Kernel, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(op_stem(t) for k in kernels for p in k.patterns for t in p.targets))


def tensors_text(node: fx.Node) -> str:
    """Shapes and dtypes of what an operation reads and gives."""
    read = [str(spec) for source in node.all_input_nodes for spec in specs_of(source)]
    given = [str(spec) for spec in specs_of(node)]
    return f"({', '.join(read)}) -> {', '.join(given) or 'nothing'}"


def _all(names: str, explanation: Explanation) -> Mapping[str, Explanation]:
    return {f"aten.{name}": explanation for name in names.split()}


_COMPLEX = Explanation(
    "complex numbers: kernels compute in float32, float16 and bfloat16",
    "two real tensors",
    "keep real and imaginary parts as two real tensors and write the products out",
)
_FOURIER = Explanation(
    "a Fourier transform gives complex numbers, which no kernel computes with",
    "`aten.matmul`",
    "products with the transform's cosine and sine matrices, held as two real buffers",
)
_DATA_SHAPE = Explanation(
    "the shape of the result depends on the data; a static graph has one shape for every batch",
    "`aten.where`",
    "keep the full shape and a mask: torch.where(mask, x, 0), or a product with the mask",
)
_HOST = Explanation(
    "a number on the host ends the static graph",
    "",
    "keep the value a tensor, and choose with torch.where instead of `if`",
)
_RANDOM = Explanation(
    "random numbers come from (seed, step, layer, microbatch), so that every way of running draws "
    "the same; this distribution has no such draw",
    "`aten.rand`",
    "the distribution as a formula of torch.rand, torch.randn or tensor.exponential_(), as in "
    "F.gumbel_softmax; or draw it in the dataset and pass it with the batch",
)
_OWN_GENERATOR = Explanation(
    "numbers from a torch.Generator of the model's own, which only the plain loop has",
    "the same operation without generator=",
    "leave generator= out: numbers come from (seed, step, layer, microbatch) in every mode",
)
_RANDOM_WINDOWS = Explanation(
    "places chosen at random, by an operation that draws the numbers itself",
    "`aten.max_pool2d`",
    "F.max_pool2d, or slopes of your own: torch.where(x > 0, x, x * torch.rand_like(x))",
)
_FACTORIZATION = Explanation(
    "a factorization is a long chain of steps that each depend on the one before; there is no "
    "kernel for it",
    "`aten.matmul`",
    "an iteration of matrix products (Newton-Schulz for inverses and roots), or compute it in the "
    "dataset",
)
_QUANTIZED = Explanation(
    "quantized arithmetic has no kernel",
    "the same layer in bfloat16",
    "the model without quantization; mixed_precision: True halves memory",
)

EXPLANATIONS: Mapping[str, Explanation] = {
    **_all(
        "nonzero nonzero_numpy argwhere masked_select masked_scatter unique_dim _unique _unique2 "
        "unique_consecutive unique_dim_consecutive bincount combinations nonzero_static",
        _DATA_SHAPE,
    ),
    "aten.repeat_interleave.Tensor": _DATA_SHAPE,
    **_all("item _local_scalar_dense equal is_nonzero allclose", _HOST),
    **_all("multinomial binomial _standard_gamma _sample_dirichlet randint_like.Tensor", _RANDOM),
    **_all("rand.generator randn.generator randint.generator randperm.generator", _OWN_GENERATOR),
    **_all(
        "rrelu rrelu_with_noise rrelu_with_noise_functional fractional_max_pool2d "
        "fractional_max_pool3d",
        _RANDOM_WINDOWS,
    ),
    **_all(
        "svd qr cholesky cholesky_inverse cholesky_solve inverse pinverse det slogdet logdet "
        "matrix_exp matrix_power triangular_solve lu_unpack lu_solve geqrf orgqr ormqr "
        "_lu_with_info",
        _FACTORIZATION,
    ),
    **_all("complex polar view_as_real view_as_complex real imag conj angle _conj", _COMPLEX),
    **_all("stft istft", _FOURIER),
    **_all("_int_mm _weight_int8pack_mm _weight_int4pack_mm _scaled_mm", _QUANTIZED),
    **_all("_scaled_grouped_mm", _QUANTIZED),
    **_all(
        "ctc_loss _ctc_loss",
        Explanation(
            "a dynamic program along the sequence, whose length depends on the data",
            "`aten.cross_entropy_loss`",
            "a loss per position (cross entropy of aligned labels)",
        ),
    ),
}
"""By operation, with or without its overload."""

_BY_PREFIX: Mapping[str, Explanation] = {
    "aten.fft_": _FOURIER,
    "aten._fft_": _FOURIER,
    "aten.linalg_": _FACTORIZATION,
    "aten._linalg_": _FACTORIZATION,
    "aten.quantize": _QUANTIZED,
    "aten.dequantize": _QUANTIZED,
    "aten.fake_quantize": _QUANTIZED,
    "aten._fake_quantize": _QUANTIZED,
    "quantized.": _QUANTIZED,
    "aten.sparse": Explanation(
        "sparse tensors have no kernel", "`aten.gather`", "dense tensors with integer indices"
    ),
}
