"""What becomes of freed memory, from the kernel's side; in processes of their own, since the
C library is set for a whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

FREED = """
import json, resource, sys
from contextlib import nullcontext
from openwafer.runtime.memory.host_memory import (
    give_back_freed_memory, process_bytes, reusing_freed_memory
)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

give_back_freed_memory(kept_bytes=256 << 20)
bytearray(16 << 20)
before = process_bytes()
again = []
with reusing_freed_memory() if sys.argv[1] == "reused" else nullcontext():
    for _ in range(3):
        start = faults()
        bytearray(16 << 20), bytearray(8 << 20)
        again.append(faults() - start)
    stays = process_bytes() - before
block = bytearray(300 << 20)  # larger than all that stays
with_block = process_bytes()
del block
print(json.dumps({"faults": again, "stays": stays, "freed": with_block - process_bytes()}))
"""

PAGES = (24 << 20) // 4096
"""Of both blocks."""


def freed(how: str) -> dict[str, Any]:
    if not sys.platform.startswith("linux"):
        pytest.skip("mallopt is glibc's")
    done = subprocess.run(
        [sys.executable, "-c", FREED, how], check=True, capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout)


def test_a_limited_process_gives_large_blocks_back() -> None:
    found = freed("given back")
    assert found["stays"] < 1 << 20
    assert found["freed"] >= 300 << 20


def test_what_layers_make_again_and_again_is_in_memory_that_stays() -> None:
    """The second time no page is new; no more stays than was said; blocks outside go as before."""
    found = freed("reused")
    assert max(found["faults"][1:]) < PAGES // 100
    assert 0 < found["stays"] <= 256 << 20
    assert found["freed"] >= 300 << 20
