"""RoBERTa in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import check_twin  # noqa: E402

NAME = "roberta/tiny"


def test_as_in_pytorch() -> None:
    check_twin(NAME)
