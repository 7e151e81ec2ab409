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


def run(model_dir: Path, mode: str, *data: str, tasks: int) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    cs_ip = address if tasks > 1 else "local"
    command = [sys.executable, str(SCRIPT), str(model_dir), cs_ip, mode, *data]
    if tasks > 1:
        launch = [sys.executable, "-m", "openwafer.cli", "launch", "--tasks", str(tasks), "--"]
        command = [*launch, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (model_dir / "train" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20
    assert (model_dir / "model.ckpt-20.index").exists()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["layer_pipelined", "weight_streaming"])
def test_three_workers_give_the_losses_of_one_process(tmp_path: Path, mode: str) -> None:
    """Not sharded by the input function: the workers pass on every third batch each."""
    alone = run(tmp_path / "alone", mode, "all", tasks=1)
    assert run(tmp_path / "four", mode, "all", tasks=4) == alone


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_data_that_the_input_function_shards(tmp_path: Path, num_workers: int) -> None:
    """Each worker passes on all of its part, and the steps take turns with the workers."""
    mode, parts = "layer_pipelined", ("parts", str(num_workers))
    alone = run(tmp_path / "alone", mode, *parts, tasks=1)
    sharded = run(tmp_path / "sharded", mode, "shard", tasks=1 + num_workers)
    assert sharded == alone


def test_tf_config_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURMD_NODENAME", "node-1")
    found = []
    for rank in range(4):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        config = tf_config()
        # As the logs of release 1.6 show it, and below as those of the older scripts do.
        assert config["cluster"] == {
            "chief": ["node-1:49600"],
            "worker": ["node-1:49602", "node-1:49604", "node-1:49606"],
        }
        found.append((config["task"]["type"], config["task"]["index"]))
        resolver = CSSlurmClusterResolver(port_base=23111)
        assert resolver.get_task_info() == found[-1]
        assert resolver.cluster_spec().as_dict() == {
            "chief": ["node-1:23111"],
            "worker": ["node-1:23112", "node-1:23113", "node-1:23114"],
        }
        assert resolver.master() == "node-1:23111"
    assert found == [("chief", 0), ("worker", 0), ("worker", 1), ("worker", 2)]


def test_a_single_task_has_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert tf_config() == {}
    assert CSSlurmClusterResolver().get_task_info() == ("chief", 0)
