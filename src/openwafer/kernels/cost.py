"""The parts that cost formulas of all families are put together from.

Decides how operand bytes, weights and the update are counted. Does not decide how much arithmetic
a kernel does; each family says that in its own file.
"""

from __future__ import annotations

from torch import fx

from openwafer.kernels.kernel import CostContext, KernelCost, Match, Work, specs_of

__all__ = ["elementwise_cost", "free_cost", "kernel_cost", "per_sample"]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def kernel_cost(
    match: Match,
    context: CostContext,
    *,
    forward: Work,
    backward: Work,
    parallelism: int,
    saved: tuple[fx.Node, ...],
    inner_saved_bytes: int = 0,
) -> KernelCost:
    """A cost from a family's arithmetic: fills in bytes, weights and the update.

    `forward` and `backward` hold arithmetic alone. `saved` are the activations that the backward
    formula reads; those that do not depend on the batch are not counted, since they never wait.
    `inner_saved_bytes` are what it reads besides, of results that exist inside the kernel alone.
    """
    bytes_in = sum(_num_bytes(node) for node in match.inputs if node not in match.resident)
    bytes_out = sum(spec.num_bytes for spec in specs_of(match.anchor))
    has_backward = context.training and bool(match.grad_inputs)
    waiting = [node for node in dict.fromkeys(saved) if node not in match.resident]
    dtype = _compute_dtype(match)
    item = ITEM_BYTES.get(dtype, 4)
    owned = sum(parameter.spec.numel for parameter in match.owned) if context.training else 0
    own_copy = sum(p.spec.num_bytes for p in match.owned if p.spec.dtype != dtype)
    optimizer = context.optimizer
    return KernelCost(
        forward=forward + Work(bytes_in=bytes_in, bytes_out=bytes_out),
        backward=backward + _backward_bytes(match, bytes_out) if has_backward else Work(),
        update=Work(elementwise_ops=owned * optimizer.ops_per_parameter),
        weight_bytes=sum(_num_bytes(n) for n in match.inputs if n in match.resident),
        gradient_bytes=owned * item,
        owned_bytes=owned * optimizer.state_bytes_per_parameter + (own_copy if owned else 0),
        saved_bytes=(
            sum(_num_bytes(node) for node in waiting) + inner_saved_bytes if has_backward else 0
        ),
        parallelism=parallelism,
        dtype=dtype,
    )


def elementwise_cost(
    match: Match,
    context: CostContext,
    *,
    ops_per_element: int,
    backward_ops_per_element: int | None = None,
    saved: tuple[fx.Node, ...] | None = None,
) -> KernelCost:
    """A cost of so many operations per element of the largest tensor that the match touches.

    The backward count is for each input that gets a gradient and defaults to the forward one.
    What is saved defaults to every input.
    """
    tensors = [spec for node in (*match.inputs, match.anchor) for spec in specs_of(node)]
    numel = max((spec.numel for spec in tensors), default=0)
    per_grad = ops_per_element if backward_ops_per_element is None else backward_ops_per_element
    return kernel_cost(
        match,
        context,
        forward=Work(elementwise_ops=numel * ops_per_element),
        backward=Work(elementwise_ops=numel * per_grad * len(match.grad_inputs)),
        parallelism=per_sample(numel, context),
        saved=match.inputs if saved is None else saved,
    )


def free_cost(match: Match, context: CostContext) -> KernelCost:
    """The cost of what neither computes nor moves."""
    return KernelCost(
        forward=Work(), backward=Work(), update=Work(), weight_bytes=0, gradient_bytes=0,
        owned_bytes=0, saved_bytes=0, parallelism=0, dtype=_compute_dtype(match),
    )  # fmt: skip


def per_sample(count: int, context: CostContext) -> int:
    """The share of one sample, at least 1."""
    return max(1, count // context.num_samples)


def _backward_bytes(match: Match, bytes_out: int) -> Work:
    """The backward pass takes the gradient of the result and gives those of the activations."""
    given = (node for node in match.grad_inputs if node not in match.resident)
    return Work(bytes_in=bytes_out, bytes_out=sum(_num_bytes(node) for node in given))


def _num_bytes(node: fx.Node) -> int:
    return sum(spec.num_bytes for spec in specs_of(node))


def _compute_dtype(match: Match) -> str:
    """The widest float among operands and results: what the arithmetic must be done in."""
    names = [spec.dtype for node in (*match.inputs, match.anchor) for spec in specs_of(node)]
    for dtype in ("float32", "bfloat16", "float16"):
        if dtype in names:
            return dtype
    return "float32"
