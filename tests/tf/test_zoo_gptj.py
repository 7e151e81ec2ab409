"""GPT-J in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from test_zoo_gpt2 import BYTES, SMALL  # noqa: E402
from zoo_harness import check_twin  # noqa: E402

from openwafer.errors import ConfigError  # noqa: E402

NAME = "gptj/tiny"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "model.rotary_dim=8",  # the whole of each head
            "model.use_untied_layer_norm=True",
            "model.share_embedding_weights=True",
            "model.use_bias_in_output=False",
            "model.use_projection_bias_in_attention=True",
            "model.use_ffn_bias_in_attention=True",
            "model.use_ffn_bias=False",
        ],
    ],
    ids=["tiny", "all else"],
)
def test_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, [*SMALL, "model.rotary_dim=4", *overrides])


@pytest.mark.slow
def test_the_whole_tiny_model_is_as_in_pytorch() -> None:
    check_twin(NAME, BYTES)


def test_more_positions_than_there_are_is_said() -> None:
    with pytest.raises(ConfigError, match="position 23"):
        check_twin(NAME, [*SMALL, "model.rotary_dim=4", "model.max_position_embeddings=20"])
