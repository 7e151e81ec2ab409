"""A Program as text: equal for equal models, different for anything that a plan can depend on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from handmade_program import program_of
from openwafer.graph.program import TensorSpec, tensor_specs
from openwafer.graph.text import program_text, sha256_of


class Model(nn.Module):
    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.a = nn.Linear(6, 8 if change == "width" else 4, bias=change != "bias")
        self.b = nn.Linear(6, 4) if change == "another module" else None
        if change == "frozen":
            self.a.weight.requires_grad_(False)
        self.register_buffer("n", torch.ones(4, dtype=torch.float16 if change == "dtype" else None))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (self.b or self.a)(x)
        h = F.relu(h) if self.change == "operation" else F.gelu(h)
        factor = 2.5 if self.change == "number" else 2.0
        h = h * factor if self.change == "width" else h * factor * self.n
        return h.sum() if self.change == "reduction" else h.mean(dtype=torch.float32)


def fresh_text(change: str = "", num_samples: int = 3, *, training: bool = True) -> str:
    return program_text(program_of(Model(change), torch.zeros(num_samples, 6), training=training))


text = cache(fresh_text)


def test_equal_models_have_equal_texts() -> None:
    torch.manual_seed(0)
    first = text()
    torch.manual_seed(1)  # values of weights do not matter
    assert fresh_text() == first


@pytest.mark.parametrize(
    "other",
    [
        *(
            lambda change=change: text(change)
            for change in (
                "width", "bias", "another module", "frozen", "dtype", "operation", "number",
                "reduction",
            )
        ),
        lambda: text(num_samples=4),
        lambda: text(training=False),
    ],
)  # fmt: skip
def test_any_change_shows(other: Callable[[], str]) -> None:
    assert other() != text()


def test_hashes_are_sha256() -> None:
    assert sha256_of("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_specs() -> None:
    value = (torch.zeros(2, 3), [torch.zeros((), dtype=torch.bfloat16)], None, 3)
    assert tensor_specs(value) == (TensorSpec((2, 3), "float32"), TensorSpec((), "bfloat16"))
    spec = TensorSpec((2, 3), "int16")
    assert (spec.numel, spec.num_bytes, spec.torch_dtype) == (6, 12, torch.int16)
    assert str(spec) == "int16[2×3]"
