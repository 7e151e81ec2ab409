"""How many multiply-accumulates a matrix product takes, whatever its spelling.

Decides the count and the operands of each product operation. Does not decide which kernel it
belongs to (matmul.py, attention.py).
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from openwafer.kernels.kernel import Candidate, Rejection, specs_of
from openwafer.kernels.pattern import op_stem, target_name

__all__ = ["PRODUCTS", "one_dtype", "operand_nodes", "product_macs"]

PRODUCTS: dict[str, int] = {
    "aten.linear": 0,
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.matmul": 0,
    "aten.mv": 0,
    "aten.dot": 0,
    "aten.vdot": 0,
    "aten.inner": 0,
    "aten.tensordot": 0,
    "aten.linalg_vecdot": 0,
    "aten.addmm": 1,
    "aten.baddbmm": 1,
    "aten.addbmm": 1,
    "aten.addmv": 1,
}
"""Which argument is the first factor; the second factor follows it."""


def product_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one product operation.

    One for each element of the result and each element summed over.
    """
    stem = op_stem(target_name(node))
    if stem == "aten.einsum":
        return _einsum_macs(node)
    first, second = operand_nodes(node)
    result = prod(specs_of(node)[0].shape)
    if stem == "aten.tensordot":
        left, right = specs_of(first)[0].numel, specs_of(second)[0].numel
        # numel(a) * numel(b) holds each summed extent twice, the result holds it not at all.
        return round((left * right * result) ** 0.5)
    summed = specs_of(first)[0].shape[-1:]
    if stem == "aten.addbmm":
        summed = (summed[0], specs_of(first)[0].shape[0])
    return result * prod(summed)


def one_dtype(candidate: Candidate) -> Rejection | None:
    """PyTorch multiplies only tensors of one dtype; tensors without data show no error."""
    dtypes = {spec.dtype: None for node in candidate.inputs for spec in specs_of(node)}
    if len(dtypes) > 1:
        return Rejection(
            f"factors of different dtypes: {', '.join(dtypes)}",
            "one dtype for weights and inputs: `.to(weight.dtype)`, or mixed_precision: True",
        )
    return None


def operand_nodes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The factors of a product operation, in order; the same node may come twice."""
    if op_stem(target_name(node)) == "aten.einsum":
        operands: Any = node.args[1]
        return tuple(operands)
    start = PRODUCTS[op_stem(target_name(node))]
    return tuple(value for value in node.args[start : start + 2] if isinstance(value, fx.Node))


def _einsum_macs(node: fx.Node) -> int:
    """Operands are contracted from left to right, as torch does without opt_einsum."""
    terms, result, extents = _einsum_terms(node)
    total, held = 0, terms[0]
    for position, term in enumerate(terms[1:], start=1):
        later = result.union(*terms[position + 1 :])
        total += prod(extents[letter] for letter in held | term)
        held = (held | term) & later
    return total or prod(extents[letter] for letter in held)


def _einsum_terms(node: fx.Node) -> tuple[list[set[str]], set[str], dict[str, int]]:
    """The letters of each operand, those of the result, and their extents. An ellipsis becomes
    capital letters counted from the right, which einsum's own letters may not clash with here."""
    equation = str(node.args[0]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    names, extents = left.split(","), dict[str, int]()
    spelled: list[str] = []
    for letters, operand in zip(names, operand_nodes(node), strict=True):
        shape = specs_of(operand)[0].shape
        hidden = "".join(f"{chr(0x391 + i)}" for i in range(len(shape) - len(letters) + 3))[::-1]
        spelled.append(letters.replace("...", hidden))
        for letter, extent in zip(spelled[-1], shape, strict=True):
            extents[letter] = max(extent, extents.get(letter, 1))
    everything = "".join(spelled)
    if not arrow:
        right = "".join(letter for letter in extents if everything.count(letter) == 1)
    kept = set(right.replace("...", "")) | {letter for letter in extents if not letter.isascii()}
    return [set(term) for term in spelled], kept, extents
