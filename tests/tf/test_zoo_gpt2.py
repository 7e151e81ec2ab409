"""GPT-2 in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import check_twin  # noqa: E402

NAME = "gpt2/tiny"
BYTES = [
    f"{section}.{key}"
    for section in ("train_input", "eval_input")
    for key in ("tokenizer=byte", "embedded_bytes=60000")
]
SMALL = [
    *BYTES,
    "model.layers=2",
    "model.hidden_size=32",
    "model.filter_size=64",
    "train_input.max_sequence_length=24",
    "eval_input.max_sequence_length=24",
]
"""Makes the tiny model small enough for tests that are about its arithmetic."""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model.share_embedding_weights=False",
            "model.use_bias_in_output=True",
            "model.position_embedding_type=fixed",
            "model.attention_type=dot_product",
            "model.loss_scaling=batch_size",
            "model.loss_weight=0.5",
        ],
        [
            "model.use_position_embedding=False",
            "model.nonlinearity=gelu",
            "model.use_projection_bias_in_attention=False",
            "model.use_ffn_bias_in_attention=False",
            "model.use_ffn_bias=False",
        ],
    ],
    ids=["tiny", "other output and positions", "no positions and no biases"],
)
def test_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, [*SMALL, *overrides])


@pytest.mark.slow
def test_the_whole_tiny_model_is_as_in_pytorch() -> None:
    check_twin(NAME, BYTES)
