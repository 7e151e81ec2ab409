"""A model built in files has the same weights as one built in memory, and takes no memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from openwafer.errors import PlanError
from openwafer.frontends.torch import weights_in_files
from openwafer.frontends.torch.weights_in_files import WeightsInFiles, drop_pages
from openwafer.runtime.memory.host_memory import process_bytes
from openwafer.zoo import build


class Tied(nn.Module):
    """Every way in which a weight comes about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        block = nn.TransformerEncoderLayer(64, 2, 128)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(2))
        self.conv = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        self.drawn = nn.Parameter(torch.randn(100, 50) * 0.1)
        self.filled = nn.Parameter(torch.full((80, 80), 2.0), requires_grad=False)
        self.register_buffer("mask", torch.ones(90, 90).tril())
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.embed.weight
        for block in self.blocks:
            nn.init.xavier_normal_(block.linear1.weight)


@pytest.mark.parametrize("name", ["tied", "gpt2/tiny", "t5/tiny", "unet/tiny", "bert/tiny"])
def test_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_in_files, "SMALLEST_BYTES", 4096)

    def make() -> nn.Module:
        torch.manual_seed(5)
        return Tied() if name == "tied" else build(name)

    expected = make()
    with WeightsInFiles(tmp_path):
        found = make()
    assert list(tmp_path.iterdir()) == []
    after = torch.rand(3)
    torch.manual_seed(5)
    make()
    assert torch.equal(torch.rand(3), after)  # no more and no fewer draws
    wanted = expected.state_dict(keep_vars=True)
    given = found.state_dict(keep_vars=True)
    assert given.keys() == wanted.keys()
    for key, value in given.items():
        assert torch.equal(value, wanted[key])
        assert value.stride() == wanted[key].stride()
        assert value.requires_grad == wanted[key].requires_grad
        assert type(value) is type(wanted[key])
    ties = [{id(v): k for k, v in state.items()} for state in (given, wanted)]
    assert len(ties[0]) == len(ties[1])


def test_no_memory_is_taken(tmp_path: Path) -> None:
    before = process_bytes()
    with WeightsInFiles(tmp_path):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12)))
    assert process_bytes() - before < 2 * 2048 * 2048 * 4  # of 12
    assert float(model(torch.ones(1, 2048)).sum().detach()) != 0.0


def test_a_full_disk_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with WeightsInFiles(tmp_path), pytest.raises(PlanError, match="No space left"):
        nn.Linear(1024, 1024)
    assert list(tmp_path.iterdir()) == []


def test_pages_that_are_dropped_are_no_memory_of_the_process_and_are_read_again(
    tmp_path: Path,
) -> None:
    with WeightsInFiles(tmp_path):
        weight = torch.arange(8 << 20)
    in_memory = torch.arange(8 << 20)
    before = pages_of_files_bytes()
    drop_pages([weight, in_memory])
    assert before - pages_of_files_bytes() >= weight.nbytes
    assert torch.equal(weight, in_memory)


def pages_of_files_bytes() -> int:
    """In this process's memory, as the kernel counts them."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = [int(line.split()[1]) for line in status if line.startswith(("RssFile", "RssShmem"))]
    return 1024 * sum(fields)
