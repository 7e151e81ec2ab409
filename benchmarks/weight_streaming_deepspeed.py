"""Case `deepspeed`: ours from RAM and from disk, against DeepSpeed ZeRO-3 offload to RAM and NVMe.

Decides the pairs and where DeepSpeed comes from: a virtual environment of its own in the cache
folder, made on first use, that sees this one's torch. bf16 compute with fp32 master weights, AdamW,
no clipping on either side (DeepSpeed's default would be 1.0). NVMe offload needs libaio's headers
(Debian: libaio-dev); the first run builds DeepSpeed's operators.
"""

from __future__ import annotations

import os
import site
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timed_child import ChildError, TimedChild
from benchmarks.weight_streaming_case import CaseResult, step_seconds
from benchmarks.weight_streaming_model import SEQUENCE

__all__ = ["run"]

VERSION = "0.19.8"
BATCH_SIZE = 4
_PAIRS = {"ram": "cpu", "disk": "nvme"}
"""Our store → the device that DeepSpeed offloads to."""


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """Tokens per second, a result for each kind of store."""
    python = _python()
    env = {"DS_ACCELERATOR": "cpu", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    for store, device in _PAIRS.items():
        with tempfile.TemporaryDirectory() as folder:
            theirs = ["--device", device, "--folder", folder, "--batch_size", str(BATCH_SIZE)]
            ours = [store, "--batch_size", str(BATCH_SIZE)]
            with (
                TimedChild("benchmarks.weight_streaming_side", ours) as our_side,
                TimedChild(
                    "benchmarks.weight_streaming_deepspeed_child",
                    [*theirs, "--clip", "0.0"],
                    python=python,
                    env=env,
                ) as their_side,
            ):
                sides = {"ours": our_side, "theirs": their_side}
                found = step_seconds(sides, repeat=repeat, warm_up=2)
        rates = {n: BATCH_SIZE * SEQUENCE / statistics.median(s) for n, s in found.items()}
        yield CaseResult(
            case=f"{case}_{device}",
            ours=rates["ours"],
            theirs=rates["theirs"],
            unit="tokens/s",
            details={"deepspeed": VERSION, "batch": [BATCH_SIZE, SEQUENCE], "repeat": repeat},
        )


def _python() -> Path:
    """The interpreter that has DeepSpeed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "openwafer" / f"deepspeed-{VERSION}"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        _checked([sys.executable, "-m", "venv", str(folder)])
        packages = next(folder.glob("lib/python*/site-packages"))
        lines = [f"import site; site.addsitedir({place!r})" for place in site.getsitepackages()]
        (packages / "parent.pth").write_text("\n".join(lines) + "\n")
        _checked([str(python), "-m", "pip", "install", "-q", f"deepspeed=={VERSION}", "ninja"])
        ready.touch()
    return python


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"{' '.join(command)}: {done.stderr[-2000:]}")
