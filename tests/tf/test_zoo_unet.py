"""U-Net in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import MOMENTUM, check_twin  # noqa: E402

NAME = "unet/tiny"
OTHER_FORM = [
    "model.initial_conv_filters=4",
    "model.convs_per_block=[3x3_conv, 1x1_conv]",
    "model.skip_connect=False",
    "model.enable_bias=False",
    "model.downscale_method=avg_pool",
    "model.nonlinearity=LeakyReLU",
    "model.initializer=kaiming_normal",
]


@pytest.mark.parametrize("overrides", [[], OTHER_FORM], ids=["tiny", "other form"])
def test_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, overrides)
    check_twin(NAME, overrides, optimizer=MOMENTUM)
