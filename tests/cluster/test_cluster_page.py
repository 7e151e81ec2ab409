"""docs/cluster.md, followed: every command of the page is run, as someone who reads it would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_client import Cluster
from test_cluster_documented_script import DOCUMENTED

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 240

BLOCKS = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs/cluster.md").read_text(), re.DOTALL)
"""The page's blocks. One that begins with `#!` is a file, `job.sh`."""


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "fc_mnist"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "examples/fc_mnist", folder, ignore=ignored)
    params = folder / "configs/params.yaml"
    shorter = params.read_text().replace("max_steps: 400", "max_steps: 60")
    params.write_text(shorter.replace("checkpoint_steps: 200", "checkpoint_steps: 30"))
    return folder


def shell(line: str, folder: Path) -> str:
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "SBATCH_", "SRUN_"))
    }
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    variables["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


def rows(model_dir: Path, part: str) -> list[dict[str, float]]:
    lines = (model_dir / part / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_no_block_of_the_page_is_left_out() -> None:
    """Each is run by one of the tests below."""
    run = ("#SBATCH", "sbatch job.sh", "--requeue", "staged --cs_ip local --num_stages 2")
    run += ("openwafer launch", "eval_all", "--container")
    assert [sum(text in block for text in run) for block in BLOCKS] == [1] * len(BLOCKS)
    assert all(block_with(text) for text in run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_part_without_slurm(folder: Path) -> None:
    staged = shell(block_with("staged --cs_ip local --num_stages 2"), folder)
    assert "Starting 2 processes" in staged
    assert "Stage 1 of 2" in staged
    assert "Training Completed Successfully!" in staged
    streamed = shell(block_with("openwafer launch"), folder)
    assert "Waiting for 2 streamer(s)" in streamed
    assert "Training Completed Successfully!" in streamed
    ours, theirs = rows(folder / "staged", "train"), rows(folder / "streamed", "train")
    assert ours[-1]["step"] == theirs[-1]["step"] == 60
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=2e-6)
    shell(block_with("eval_all"), folder)
    assert [row["step"] for row in rows(folder / "staged", "eval")] == [30, 60]


def test_the_containers_script_is_printed(folder: Path) -> None:
    """Nothing is started, and nothing written."""
    script = shell(block_with("--container"), folder)
    assert f" exec --bind /data,{folder} openwafer.sif python-pt run.py" in script
    assert not (folder / "model").exists()


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_part_with_slurm(cluster: Cluster, folder: Path) -> None:
    """`sbatch job.sh` is run by test_cluster_documented_script.py: the page's script is that one,
    with an address for sites that set none. The other command is run here."""
    script = block_with("#SBATCH").replace("${CS_IP_ADDR:-127.0.0.1:9000}", "${CS_IP_ADDR}")
    assert script == DOCUMENTED
    assert block_with("sbatch job.sh") == "sbatch job.sh\n"
    submitted = cluster.run("bash", "-c", block_with("--requeue"), cwd=folder)
    text = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, text
    assert "Submitted batch job" in text
    assert "Waiting for 6 streamer(s)" in text
    assert "Training Completed Successfully!" in text
    assert (folder / "model/job.sbatch").exists()


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_stages_and_workers_under_slurm(cluster: Cluster, folder: Path) -> None:
    """Five tasks of one job: two compute, three stream."""
    command = ("python", "run.py", "--mode", "train", "--params", "configs/params.yaml")
    done = cluster.run(
        "srun", "--ntasks=5", "--kill-on-bad-exit", *command, "--model_dir", "staged",
        "--cs_ip", "127.0.0.1:9000", "--num_stages", "2", cwd=folder,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "Waiting for 3 streamer(s)" in text
    assert "Training Completed Successfully!" in text
    alone = cluster.run(
        *command, "--model_dir", "alone", "--cs_ip", "local", "--num_stages", "1",
        "--num_microbatches", "8", cwd=folder,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stdout + alone.stderr
    ours, theirs = rows(folder / "staged", "train"), rows(folder / "alone", "train")
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=2e-6)
