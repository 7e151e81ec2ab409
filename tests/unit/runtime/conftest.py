"""One thread for tiny tensors: waiting for a second one is all that it would do. No metrics of
other tests, whose names those of a model would have to differ from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from openwafer.frontends.torch.metrics import forget_all_metrics


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_metrics() -> None:
    forget_all_metrics()
