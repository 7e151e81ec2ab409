"""GPT-3 in TensorFlow: GPT-2's network (test_zoo_gpt2.py), at its own sizes."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from test_zoo_gpt2 import SMALL  # noqa: E402
from zoo_harness import check_twin  # noqa: E402

NAME = "gpt3/tiny"


def test_as_in_pytorch() -> None:
    check_twin(NAME, SMALL)
