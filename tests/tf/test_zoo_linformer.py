"""Linformer in TensorFlow."""

from __future__ import annotations

from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import check_modes, check_twin  # noqa: E402

NAME = "linformer/tiny"
STYLES = ("linformer", "linformer-shared-kv", "linformer-shared-layers")


def test_as_in_pytorch() -> None:
    check_twin(NAME)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_styles_as_in_pytorch(style: str) -> None:
    check_twin(NAME, [f"model.attention_style={style}"], steps=3)


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_all_modes_alike(tmp_path: Path, steps: int) -> None:
    check_modes(NAME, tmp_path, steps=steps)
