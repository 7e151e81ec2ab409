"""The Transformer in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import check_twin  # noqa: E402

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
