"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from fc_mnist_runs import MODE_FLAGS, Changes, Outcome, run_here, write_params


@pytest.fixture
def flags_of(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """The flags of a mode, or of `disk`, whose store is an empty folder of this test."""

    def flags(mode: str) -> tuple[str, ...]:
        if mode != "disk":
            return MODE_FLAGS[mode]
        store = tmp_path / "store"
        store.mkdir(exist_ok=True)
        return (*MODE_FLAGS["weight_streaming"], "--weight_store", f"disk:{store}")

    return flags


@pytest.fixture
def train(tmp_path: Path, flags_of: Callable[[str], tuple[str, ...]]) -> Callable[..., Outcome]:
    """`train(mode, changes, *flags)`: train in this process in a model_dir named after the mode."""

    def run(mode: str, changes: Changes, *flags: str) -> Outcome:
        params = write_params(tmp_path / "params.yaml", changes)
        return run_here("train", params, tmp_path / mode, *flags_of(mode), *flags)

    return run


@pytest.fixture
def one_thread() -> Generator[None, None, None]:
    """Compute with one thread, as `run_here` does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
