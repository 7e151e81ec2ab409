"""Linformer in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import check_twin  # noqa: E402

NAME = "linformer/tiny"
STYLES = ("linformer", "linformer-shared-kv", "linformer-shared-layers")


def test_as_in_pytorch() -> None:
    check_twin(NAME)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_styles_as_in_pytorch(style: str) -> None:
    check_twin(NAME, [f"model.attention_style={style}"], steps=3)
