"""T5 in TensorFlow."""

from __future__ import annotations

from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import ADAMW, SLOW_ADAMW, check_modes, check_twin  # noqa: E402

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


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_all_modes_alike(tmp_path: Path, steps: int) -> None:
    check_modes(NAME, tmp_path, steps=steps, optimizer=ADAMW if steps < 50 else SLOW_ADAMW)
