"""The Transformer in TensorFlow."""

from __future__ import annotations

from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import ADAMW, SLOW_ADAMW, check_modes, check_twin  # noqa: E402

NAME = "transformer/tiny"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model.share_embedding_weights=False",
            "model.use_bias_in_output=True",
            "model.share_encoder_decoder_embedding=False",
            "model.position_embedding_type=learned",
            "model.use_pre_encoder_decoder_layer_norm=True",
            "model.attention_type=dot_product",
            "model.use_projection_bias_in_attention=True",
            "model.use_ffn_bias_in_attention=True",
            "model.use_ffn_bias=False",
            "model.nonlinearity=gelu",
            "model.label_smoothing=0.1",
            "model.loss_scaling=batch_size",
            "model.lm_loss_weight=0.5",
        ],
    ],
    ids=["tiny", "all else"],
)
def test_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, overrides)


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_all_modes_alike(tmp_path: Path, steps: int) -> None:
    check_modes(NAME, tmp_path, steps=steps, optimizer=ADAMW if steps < 50 else SLOW_ADAMW)
