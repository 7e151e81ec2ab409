"""T5 in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import check_twin  # noqa: E402

NAME = "t5/tiny"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model.share_embedding_weights=False",
            "model.share_encoder_decoder_embedding=False",
            "model.scale_output=True",
            "model.use_t5_layer_norm=False",
            "model.encoder_nonlinearity=gated-gelu",
            "model.decoder_nonlinearity=gated-relu",
            "model.relative_attention_num_buckets=4",
            "model.label_smoothing=0.1",
        ],
    ],
    ids=["tiny", "all else"],
)
def test_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, overrides)
