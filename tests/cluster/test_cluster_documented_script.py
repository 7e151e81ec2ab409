"""The documented batch script on a real SLURM: validate, compile, train with 7 tasks, evaluate."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from slurm_client import Cluster, until

EXAMPLE = Path(__file__).parents[2] / "examples" / "fc_mnist"

# As the documentation has it (CS-2 software 1.6 on Neocortex), but for paths and the container.
DOCUMENTED = """\
#!/bin/bash
#SBATCH --gres=cs:cerebras:1
#SBATCH --ntasks=7
#SBATCH --cpus-per-task=4
#SBATCH --output=slurm-%j.out

srun --ntasks=1 --kill-on-bad-exit python run.py --mode train --validate_only \
--params configs/params.yaml --model_dir model
srun --ntasks=1 --kill-on-bad-exit python run.py --mode train --compile_only \
--params configs/params.yaml --model_dir model
srun --kill-on-bad-exit python run.py --mode train \
--params configs/params.yaml --model_dir model --cs_ip ${CS_IP_ADDR}
srun --kill-on-bad-exit python run.py --mode eval \
--params configs/params.yaml --model_dir model --cs_ip ${CS_IP_ADDR}
"""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLE, tmp_path / "fc_mnist", ignore=shutil.ignore_patterns("__pycache__"))
    params = tmp_path / "fc_mnist/configs/params.yaml"
    params.write_text(params.read_text().replace("max_steps: 400", "max_steps: 200"))
    (tmp_path / "fc_mnist/job.sh").write_text(DOCUMENTED)
    return tmp_path / "fc_mnist"


def output_of(folder: Path, job_id: str) -> str:
    return (folder / f"slurm-{job_id}.out").read_text()


def weights(model_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(model_dir / f"checkpoint_{step}.mdl", weights_only=True)["model"]


def test_the_documented_script_and_one_process_give_the_same(
    cluster: Cluster, folder: Path
) -> None:
    """The site's variable names the wafer, an address of none of our machines."""
    job_id = cluster.sbatch(folder / "job.sh", CS_IP_ADDR="192.0.2.1")
    state = cluster.wait(job_id)
    output = output_of(folder, job_id)
    assert state["JobState"] == "COMPLETED", output
    assert "Compile for training completed successfully!" in output
    assert "Waiting for 6 streamer(s) to prime the data pipeline" in output
    assert "Training Completed Successfully!" in output
    assert "Evaluation Completed Successfully!" in output
    assert "Traceback" not in output
    assert not list((cluster.home / ".openwafer").glob(f"run-{job_id}-*")), "a secret was left"
    evaluation = json.loads((folder / "model/eval/metrics.jsonl").read_text().splitlines()[-1])
    assert evaluation["accuracy"] > 0.8
    alone = cluster.run(
        "python", "run.py", "--mode", "train", "--params", "configs/params.yaml",
        "--model_dir", "alone", "--cs_ip", "local", cwd=folder,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    ours, theirs = weights(folder / "model", 200), weights(folder / "alone", 200)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_jobs_on_one_node_do_not_fight_for_a_port(cluster: Cluster, folder: Path) -> None:
    """Both are given the same address."""
    script = folder / "two.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --ntasks=3\n#SBATCH --output=slurm-%j.out\n"
        "srun --kill-on-bad-exit python run.py --mode train --params configs/params.yaml "
        "--model_dir model-$SLURM_JOB_ID --cs_ip 127.0.0.1:9000\n"
    )
    jobs = [cluster.sbatch(script) for _ in range(2)]
    for job_id in jobs:
        state = cluster.wait(job_id)
        assert state["JobState"] == "COMPLETED", output_of(folder, job_id)
    first, second = (weights(folder / f"model-{job_id}", 200) for job_id in jobs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_interactive_srun_and_a_single_task(cluster: Cluster, folder: Path) -> None:
    command = ("python", "run.py", "--mode", "train", "--params", "configs/params.yaml")
    done = cluster.run(
        "srun", "--ntasks=3", "--gres=cs:cerebras:1", *command,
        "--model_dir", "many", "--cs_ip", "127.0.0.1:9000", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Waiting for 2 streamer(s)" in done.stdout + done.stderr
    one = cluster.run(
        "srun", "--ntasks=1", *command, "--model_dir", "one", "--cs_ip", "127.0.0.1:9000",
        cwd=folder,
    )  # fmt: skip
    assert one.returncode == 0, one.stdout + one.stderr
    assert "streamer(s)" not in one.stdout + one.stderr
    many, alone = weights(folder / "many", 200), weights(folder / "one", 200)
    assert all(torch.equal(many[name], alone[name]) for name in alone)


def test_a_worker_killed_by_slurm_ends_the_job_with_its_name(
    cluster: Cluster, folder: Path
) -> None:
    """The rank 1 process is killed; the job must end within 30 seconds, and say who it was."""
    script = folder / "killed.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --ntasks=3\n#SBATCH --output=slurm-%j.out\n"
        "srun --kill-on-bad-exit bash -c '"
        'if [ "$SLURM_PROCID" = 1 ]; then '
        "python run.py --mode train --params configs/params.yaml --model_dir killed "
        "--cs_ip 127.0.0.1:9000 & pid=$!; "
        "until grep -qs Step=50 slurm-$SLURM_JOB_ID.out; do sleep 0.1; done; "
        "kill -9 $pid; wait $pid; sleep 20; "
        "else exec python run.py --mode train --params configs/params.yaml --model_dir killed "
        "--max_steps 100000 --cs_ip 127.0.0.1:9000; fi'\n"
    )
    job_id = cluster.sbatch(script)
    state = cluster.wait(job_id)
    output = output_of(folder, job_id)
    assert state["JobState"] == "FAILED", output
    assert "worker 1" in output
    assert "was lost" in output


def test_the_warning_before_the_time_limit_saves_and_the_job_goes_on(
    cluster: Cluster, folder: Path
) -> None:
    """`scancel --signal` sends what SLURM sends before the limit; the requeued job resumes."""
    done = cluster.run(
        "openwafer", "submit", "--tasks", "3", "--time", "1:00:00", "--requeue", "--no_follow",
        "--", "python", "run.py", "--mode", "train", "--params", "configs/params.yaml",
        "--model_dir", "long", "--max_steps", "5000", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.split(":")[0].split()[-1]
    log = folder / f"long/slurm-{job_id}.out"
    until(lambda: log.exists() and "Step=100," in log.read_text())
    cluster.run("scancel", "--signal=TERM", job_id, cwd=folder)
    until(lambda: "Training stopped by SIGTERM" in log.read_text())
    until(lambda: cluster.state(job_id).get("Restarts") == "1")
    # SLURM itself waits two minutes; started within a second or so, the new start would be taken
    # for the old one ("job credential revoked").
    time.sleep(15)
    cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", cwd=folder)
    state = cluster.wait(job_id)
    assert state["JobState"] == "COMPLETED", log.read_text()
    assert "Going on from" in log.read_text()
    assert (folder / "long/checkpoint_5000.mdl").exists()
