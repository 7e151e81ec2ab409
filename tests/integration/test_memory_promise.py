"""--device_memory is a promise that the kernel can check: the run lives within RLIMIT_DATA of that
size, from building the model to the last checkpoint, where the plain loop dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fc_mnist_runs import command_environment

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from openwafer.cli import main
main(sys.argv[1:])
"""

WIDE = ("model.hidden_size=1024", "model.filter_size=4096", "model.layers=10", "model.heads=8")


def train(limit_mib: int, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    given = ("train", "gpt2/tiny", "--batch_size", "2", "--max_steps", "2", "--seed", "3")
    store = folder / "store"
    store.mkdir(exist_ok=True)
    return subprocess.run(
        [
            *(sys.executable, "-c", LIMITED, str(limit_mib), *given, "--set", *WIDE),
            *("--set", "runconfig.checkpoint_steps=2", "runconfig.log_steps=1"),
            *("--model_dir", str(folder / "model_dir"), *flags),
        ],
        env={**command_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=folder,
    )


@pytest.mark.slow
def test_a_model_that_does_not_fit_trains_within_the_limit(tmp_path: Path) -> None:
    """128 million weights: 2 GiB with gradients and optimizer state, in 1.2 GiB with torch itself.
    Building, streaming, spilling, a checkpoint, and going on from it."""
    streamed = (
        *("--cs_ip", "local", "--execution_mode", "weight_streaming"),
        *("--weight_store", f"disk:{tmp_path / 'store'}", "--device_memory", "1200MiB"),
    )
    found = train(1200, tmp_path, *streamed)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "memory of a step" in found.stderr + found.stdout
    again = train(1200, tmp_path, *streamed, "--max_steps", "3")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Going on from" in again.stderr + again.stdout
    plain = train(1200, tmp_path / "..", "--model_dir", str(tmp_path / "plain"))
    assert plain.returncode != 0


@pytest.mark.slow
def test_compiled_layers_keep_their_blocks_within_the_limit(tmp_path: Path) -> None:
    """With the pool of large blocks, and the compiler in the same process."""
    found = train(
        1700,
        tmp_path,
        *("--set", "runconfig.layer_compiler=inductor"),
        *("--cs_ip", "local", "--execution_mode", "weight_streaming"),
        *("--weight_store", f"disk:{tmp_path / 'store'}", "--device_memory", "1700MiB"),
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "does not compile" not in found.stderr + found.stdout


@pytest.mark.slow
def test_what_cannot_fit_is_said_before_anything_runs(tmp_path: Path) -> None:
    found = train(
        4000,
        tmp_path,
        *("--cs_ip", "local", "--execution_mode", "weight_streaming"),
        *("--weight_store", f"disk:{tmp_path / 'store'}", "--device_memory", "300MiB"),
    )
    assert found.returncode == 2
    assert "MiB more than there are" in found.stderr + found.stdout
    assert not list((tmp_path / "store").iterdir())
