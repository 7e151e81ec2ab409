"""What holds a GPU to the memory that was promised, and what a user reads when it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runtime_cases import model_of
from runtime_reference import Setup, optimizer_config

from openwafer.errors import PlanError
from openwafer.runtime.memory import account
from openwafer.runtime.memory.account import DeviceMemory, limit_gpu

GIB = 1 << 30


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """What torch's allocator is told, on the second GPU, of 80 GiB."""
    told: list[tuple[float, int]] = []
    cuda = SimpleNamespace(
        current_device=lambda: 1,
        get_device_properties=lambda number: SimpleNamespace(total_memory=80 * GIB),
        set_per_process_memory_fraction=lambda fraction, number: told.append((fraction, number)),
    )
    monkeypatch.setattr(account.torch, "cuda", cuda)
    return told


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_the_allocator_is_held_to_the_budget(name: str, fractions: list[Any]) -> None:
    limit_gpu(torch.device(name), 24 * GIB)
    assert fractions == [(0.3, 1)]


def test_more_than_the_gpu_has_is_refused(fractions: list[Any]) -> None:
    with pytest.raises(PlanError, match="the GPU has 85,899,345,920"):
        limit_gpu(torch.device("cuda"), 81 * GIB)
    assert not fractions


@pytest.mark.parametrize(("budget", "words"), [(GIB, "1,073,741,824"), (None, "the device has")])
def test_a_device_that_runs_out_says_what_to_do(budget: int | None, words: str) -> None:
    with (
        pytest.raises(PlanError) as info,
        DeviceMemory(budget).explaining_exhaustion(torch.device("cuda")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has…")
    text = str(info.value)
    for part in ("CUDA out of memory.", words, "--num_microbatches", "expandable"):
        assert part in text


def test_a_step_whose_device_runs_out_says_so() -> None:
    setup = Setup(*model_of("gpt, tied head"))
    executor = setup.streaming(optimizer_config(), memory=DeviceMemory())

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("not enough host memory: you tried to allocate 99 bytes.")

    executor._traffic._link.to_device = full
    with pytest.raises(PlanError, match="not enough host memory") as info:
        executor.train_step([setup.batch], step=0)
    text = str(info.value)
    assert "activations" in text
    assert "expandable" not in text, "a CPU has no such setting"
    executor.close()
