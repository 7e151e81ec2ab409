"""Batch scripts, container lines, and what is refused before SLURM is asked.

A real SLURM is asked in tests/cluster.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from openwafer.errors import LaunchError
from openwafer.launch.batch_script import JobRequest, batch_script
from openwafer.launch.command import add_submit_flags, run_submit
from openwafer.launch.container import Container, choose_container
from openwafer.launch.slurm import check_agreement, write_script

RUN = ("python", "run.py", "--mode", "train", "--params", "configs/params.yaml")


def request(*command: str, **changes: object) -> JobRequest:
    values: dict[str, object] = {"job_name": "fc_mnist", "output": "/home/me/fc_mnist/slurm-%j.out"}
    return JobRequest(command=(*RUN, *command), **(values | changes))  # type: ignore[arg-type]


def submit(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_submit_flags(parser)
    return run_submit(parser.parse_args(list(flags)))


def test_the_documented_job(golden: Callable[[str, str], None]) -> None:
    singularity = choose_container(
        "/ocean/neocortex/cerebras/cbcore_latest.sif",
        ["/local1/cerebras/data,/local2/cerebras/data", "/jet/home/me/my model"],
        runtime="singularity",
    )
    script = batch_script(
        request(
            "--model_dir", "my model", "--cs_ip", "${CS_IP_ADDR}",
            cpus_per_task=14, account="cis230001p", time="2:00:00", container=singularity,
        )
    )  # fmt: skip
    golden("launch_job_neocortex.sbatch", script)


def test_a_job_that_goes_on_after_its_time(golden: Callable[[str, str], None]) -> None:
    script = batch_script(
        request(tasks=4, gres="", partition="sdf", time="30", requeue=True, warn_seconds=60)
    )
    golden("launch_job_requeue.sbatch", script)


@pytest.mark.parametrize("runtime", ["singularity", "apptainer", "charliecloud"])
def test_container_lines(runtime: str, golden: Callable[[str, str], None]) -> None:
    container = choose_container(
        "/images/wafer",
        ["/data:/mnt/data", "/scratch"],
        runtime=runtime,
        working_dir="/home/me/fc_mnist",
    )
    golden(f"launch_container_{runtime}.txt", " ".join(container.wrap(RUN)) + "\n")


def test_a_folder_is_for_charliecloud_and_a_file_for_what_is_installed(tmp_path: Path) -> None:
    def only(name: str) -> Callable[[str], str | None]:
        return lambda asked: f"/usr/bin/{name}" if asked == name else None

    assert choose_container(str(tmp_path)).runtime == "charliecloud"
    assert choose_container("a.sif", which=only("apptainer")).runtime == "apptainer"
    assert choose_container("a.sif", which=only("singularity")).runtime == "singularity"
    assert choose_container("a.sif", which=lambda name: None).runtime == "singularity"
    assert "--nv" in Container(image="a.sif", runtime="apptainer", working_dir="/", gpu=True).wrap(
        RUN
    )


def test_scripts_are_valid_shell_whatever_the_words_are(tmp_path: Path) -> None:
    """bash itself reads them, and each word reaches the command as it was typed."""
    words = ("a b", "$HOME", "`id`", "it's", '"', "*", "--set", "x=[1, 2]")
    text = batch_script(request(*words, requeue=True, gres=""))
    script = tmp_path / "job"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"
    for name in ("srun", "scontrol"):
        fake = programs / name
        fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name}" "$@" END >> {log}\nexit 0\n')
        fake.chmod(0o755)
    subprocess.run(
        ["bash", str(script)],
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SLURMD_NODENAME": "n1"},
        check=True,
    )
    calls = [call.split("\n") for call in log.read_text().split("END\n") if call]
    assert len(calls) == 3
    for call in calls:
        assert all(word in call for word in words)
    assert calls[2][-3:-1] == ["--cs_ip", "n1:9000"]
    assert "--validate_only" in calls[0]
    assert "--compile_only" in calls[1]


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"SBATCH_ACCOUNT": "other"}, ("--account is mine", "SBATCH_ACCOUNT=other")),
        ({"SLURM_NTASKS": "4"}, ("--tasks is 7", "SLURM_NTASKS=4")),
        ({"SBATCH_GRES": "gpu:1"}, ("--gres is cs:cerebras:1", "SBATCH_GRES=gpu:1")),
    ],
)
def test_slurm_and_the_flags_disagree(variables: dict[str, str], parts: tuple[str, ...]) -> None:
    asked = request(account="mine")
    check_agreement(asked, {})
    check_agreement(asked, {"SBATCH_ACCOUNT": "mine", "SLURM_NTASKS": "7"})
    with pytest.raises(LaunchError) as caught:
        check_agreement(asked, variables)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "no command"),
        (("--tasks", "0", "--", *RUN), "--tasks is 0"),
        (("--time", "soon", "--", *RUN), "not a time"),
        (("--bind", "/data", "--", *RUN), "there is none"),
        (("--container", "a.sif", "--bind", ":/x", "--", *RUN), "binds no folder"),
        (("--container", "a.sif", "--container_runtime", "dokcer", "--", *RUN), "unknown"),
        (("--account", "a b", "--", *RUN), "cannot stand"),
    ],
)
def test_wrong_flags(flags: tuple[str, ...], text: str) -> None:
    with pytest.raises(LaunchError, match=text):
        submit(*flags)


def test_dry_run_prints_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit("--dry_run", "--", *RUN) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=model_dir\n")
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match="no sbatch"):
        submit("--", *RUN, "--model_dir", str(tmp_path / "model"))
    assert (tmp_path / "model/job.sbatch").stat().st_mode & 0o100


def test_a_script_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="cannot write"):
        write_script(request(), tmp_path / "file")
