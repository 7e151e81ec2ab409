"""Blocks that torch allocates from the pool: whose they are, how many are mapped, and that nothing
of one shows in another. In processes of their own, since the pool is a whole process's."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from openwafer.errors import PlanError
from openwafer.runtime.forms.inductor import chosen_compiler

INSTALLED = """
import json, os, random, resource, threading
import torch
from openwafer.runtime.memory.block_pool import install_block_pool
MIB = 1 << 20
pool = install_block_pool()
def block(num_bytes):
    return torch.empty(num_bytes, dtype=torch.uint8)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""

RANDOM_BLOCKS = """
# A block is told from all others by what it is filled with; a list of sizes is the slow pool.
draw = random.Random(7)
limit = 24 * MIB
pool.limit(limit)
live, wrong, over = [], 0, 0
for number in range(700):
    if live and (draw.random() < 0.5 or sum(t.numel() for t, _ in live) > 2 * limit):
        tensor, mark = live.pop(draw.randrange(len(live)))
        wrong += int((tensor != mark).any())
        del tensor
    else:
        size = draw.choice([100, MIB - 1, MIB, 3 * MIB, draw.randrange(1, 5 * MIB)])
        tensor = block(size).fill_(number % 251)
        live.append((tensor, number % 251))
        del tensor
    pooled = [t.numel() for t, _ in live if t.numel() >= MIB]
    # What is in use, an eighth of each block wasted, or the limit.
    over += pool.mapped_bytes > max(limit, sum(pooled) * 8 / 7 + 4096 * len(pooled))
live.clear()
kept = pool.mapped_bytes
pool.close()
print(json.dumps({"wrong": wrong, "over": over, "kept": kept, "closed": pool.mapped_bytes}))
"""

SAME_AGAIN = """
pool.limit(100 * MIB)
found = []
for _ in range(4):
    before = pool.num_mappings, faults()
    a = block(30 * MIB).zero_()
    b = block(20 * MIB).zero_()
    del a
    c = block(28 * MIB).zero_()
    del b, c
    found.append((pool.num_mappings - before[0], faults() - before[1]))
large = block(120 * MIB).zero_()
with_large = pool.mapped_bytes
del large
print(json.dumps({"found": found, "with_large": with_large, "after": pool.mapped_bytes}))
"""

USES = """
pool.limit(200 * MIB)
torch.manual_seed(1)
x, w = torch.randn(700, 900), torch.randn(900, 800)
shape = (x @ w).shape
near = torch.allclose((x.bfloat16() @ w.bfloat16()).float(), x @ w, rtol=0.1, atol=1.0)
grown = torch.arange(MIB).resize_(3 * MIB)
same = bool((grown[:MIB] == torch.arange(MIB)).all())
failed = ""
try:
    block(1 << 50)
except torch.OutOfMemoryError as error:
    failed = str(error)
wrong = []
def work(mark):
    for round in range(20):
        tensors = [block(size * MIB).fill_(mark) for size in (1, 2, 3)]
        wrong.extend(1 for t in tensors if (t != mark).any())
threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
[thread.start() for thread in threads]
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if (block(5 * MIB).fill_(9) == 9).all() else 1)
    children.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
[thread.join() for thread in threads]
print(json.dumps({"shape": shape, "near": near, "same": same, "failed": failed,
                  "wrong": len(wrong), "children": children}))
"""


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each of the programs found, one after another in one process."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the pool is for Linux")
    try:
        chosen_compiler("inductor", device=torch.device("cpu"), activation_bytes=0)
    except PlanError:
        pytest.skip("no C++ compiler")
    program = "pool.close()\n".join([INSTALLED, RANDOM_BLOCKS, SAME_AGAIN, USES])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_two_blocks_overlap_and_the_limit_holds(found: list[dict[str, Any]]) -> None:
    random_blocks = found[0]
    assert random_blocks["wrong"] == 0
    assert random_blocks["over"] == 0
    assert 12 << 20 < random_blocks["kept"] <= 24 << 20
    assert random_blocks["closed"] == 0


def test_the_same_blocks_again_are_no_new_memory(found: list[dict[str, Any]]) -> None:
    """Also one of about the size of one that was freed; what no longer fits goes back."""
    again = found[1]
    assert again["found"][0][0] == 2
    assert all(mappings == 0 and faults < 100 for mappings, faults in again["found"][1:])
    assert again["with_large"] == again["after"] + (120 << 20) == 120 << 20


def test_torch_uses_it_as_its_own(found: list[dict[str, Any]]) -> None:
    """oneDNN's buffers, growing tensors, no memory left, threads, and processes that fork."""
    uses = found[2]
    assert uses["shape"] == [700, 800]
    assert uses["near"]
    assert uses["same"]
    assert "not enough host memory" in uses["failed"]
    assert uses["wrong"] == 0
    assert uses["children"] == [0] * 5
