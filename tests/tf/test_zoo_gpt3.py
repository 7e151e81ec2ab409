"""GPT-3 in TensorFlow: GPT-2's network (test_zoo_gpt2.py), at its own sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from test_zoo_gpt2 import BYTES, SMALL  # noqa: E402
from zoo_harness import check_modes, check_twin  # noqa: E402

NAME = "gpt3/tiny"


def test_as_in_pytorch() -> None:
    check_twin(NAME, SMALL)


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_all_modes_alike(tmp_path: Path, steps: int) -> None:
    check_modes(NAME, tmp_path, SMALL if steps < 50 else BYTES, steps=steps)
