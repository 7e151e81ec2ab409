"""Operations that no gradient passes are refused where one must: before the run, as torch would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from handmade_program import program_of
from openwafer.kernels import KERNELS
from openwafer.kernels.match import WITHOUT_DERIVATIVE, cover
from openwafer.kernels.pattern import op_stem

ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.floor_divide": lambda x: x // 0.5,
    "aten.heaviside": lambda x: torch.heaviside(x, torch.ones(())),
}


class Rounded(nn.Module):
    """[batch, 4] to a loss, through `rounding` of a linear layer's result."""

    def __init__(self, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return (y + self.rounding(y)).square().mean()


def refused(rounding: Callable[[Tensor], Tensor], *, training: bool = True) -> list[str]:
    program = program_of(Rounded(rounding), torch.zeros(2, 4), training=training)
    return [op_stem(refusal.op) for refusal in cover(program).refusals]


@pytest.mark.parametrize("op", ROUNDINGS)
def test_what_plain_torch_cannot_derive_is_refused_in_training(op: str) -> None:
    rounding = ROUNDINGS[op]
    with pytest.raises(RuntimeError, match=r"derivative .* not implemented"):
        Rounded(rounding)(torch.ones(2, 4)).backward()
    assert refused(rounding) == [op]
    assert refused(rounding, training=False) == []


@pytest.mark.parametrize("op", ROUNDINGS)
def test_a_detached_operand_needs_no_derivative(op: str) -> None:
    def rounding(x: Tensor) -> Tensor:
        return ROUNDINGS[op](x.detach())

    Rounded(rounding)(torch.ones(2, 4)).backward()
    assert refused(rounding) == []


def test_the_refusal_says_where_and_what_to_do() -> None:
    program = program_of(Rounded(ROUNDINGS["aten.floor_divide"]), torch.zeros(2, 4))
    (refusal,) = cover(program).refusals
    assert __file__.endswith(refusal.file)
    text = str(refusal)
    assert "no derivative" in text
    assert "x.detach()" in text


@pytest.mark.filterwarnings("ignore")  # of operations that are called in odd ways here
def test_the_table_is_torchs_own() -> None:
    """Every operation of the library on tensors alone: which results torch cannot derive."""
    found = {
        f"aten.{packet}" for packet, results in _results() if any(map(_is_not_derived, results))
    }
    assert found == set(WITHOUT_DERIVATIVE)


def _is_not_derived(result: Any) -> bool:
    return (
        isinstance(result, Tensor)
        and result.grad_fn is not None
        and "NotImplemented" in result.grad_fn.name()
    )


def _results() -> Iterator[tuple[str, list[Any]]]:
    working = (k for k in KERNELS if not k.is_free and k.family != "random")
    targets = {target for kernel in working for p in kernel.patterns for target in p.targets}
    for packet in sorted({op_stem(t).removeprefix("aten.") for t in targets if "aten." in t}):
        overloads = getattr(torch.ops.aten, packet, None)
        for name in overloads.overloads() if overloads else ():
            call = getattr(overloads, name)
            needed = [a for a in call._schema.arguments if not a.has_default_value()]
            if needed and all(str(argument.type) == "Tensor" for argument in needed):
                tensors = [torch.rand(3, 3, requires_grad=True) for _ in needed]
                try:
                    yield packet, pytree.tree_leaves(call(*tensors))
                except (RuntimeError, IndexError, ValueError, NotImplementedError):
                    continue  # other shapes or dtypes than these
