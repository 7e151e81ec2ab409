"""The same script as four tasks: one computes, three stream the data."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from openwafer.frontends.tf.cluster import CSSlurmClusterResolver, tf_config  # noqa: E402

SCRIPT = Path(__file__).with_name("tf_worker_script.py")


def run(model_dir: Path, *, tasks: int) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, str(SCRIPT), str(model_dir), address if tasks > 1 else "local"]
    if tasks > 1:
        launch = [sys.executable, "-m", "openwafer.cli", "launch", "--tasks", str(tasks), "--"]
        command = [*launch, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (model_dir / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_three_workers_give_the_losses_of_one_process(tmp_path: Path) -> None:
    """Not sharded by the input function: the workers pass on every third batch each."""
    alone = run(tmp_path / "alone", tasks=1)
    assert len(alone) == 20
    assert run(tmp_path / "four", tasks=4) == alone
    assert (tmp_path / "four" / "model.ckpt-20.index").exists()


def test_tf_config_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURMD_NODENAME", "node-1")
    found = []
    for rank in range(4):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        config = tf_config()
        assert config["cluster"] == {
            "chief": ["node-1:23111"],
            "worker": ["node-1:23112", "node-1:23113", "node-1:23114"],
        }
        found.append((config["task"]["type"], config["task"]["index"]))
        resolver = CSSlurmClusterResolver(port_base=23111)
        assert resolver.get_task_info() == found[-1]
        assert resolver.cluster_spec().as_dict() == config["cluster"]
        assert resolver.master() == "node-1:23111"
    assert found == [("chief", 0), ("worker", 0), ("worker", 1), ("worker", 2)]


def test_a_single_task_has_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert tf_config() == {}
    assert CSSlurmClusterResolver().get_task_info() == ("chief", 0)
