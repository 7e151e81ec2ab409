"""fc_mnist in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import MOMENTUM, check_twin  # noqa: E402

NAME = "fc_mnist/tiny"


@pytest.mark.parametrize("overrides", [[], ["model.hidden_sizes=[20, 12]"]])
def test_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, overrides)
    check_twin(NAME, overrides, optimizer=MOMENTUM)
