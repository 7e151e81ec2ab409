"""The runtime's references and small models are shared with its unit tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "runtime"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
