"""A job whose tasks run in a container, started by ch-run without any privileges.

The image is a folder made here from the installed Python: a system of its own with the programs
and libraries of this machine's /usr, and `python` and `python-pt` as the documented containers have
them. Apptainer's lines are compared with golden files only (tests/unit/launch).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from slurm_client import Cluster

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def make_image(image: Path, see: list[Path]) -> None:
    """A folder that ch-run starts; `see` are the folders that will be bound."""
    for name in ("dev", "etc", "home", "mnt", "proc", "sys", "tmp", "var", "ch", "opt/wafer/bin"):
        (image / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (image / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (image / "etc" / name).touch()
    for folder in see:
        (image / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)
    for name in ("python", "python-pt"):
        program = image / "opt/wafer/bin" / name
        program.write_text(f'#!/bin/sh\nexport INSIDE_WAFER=yes\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)
    (image / "ch/environment").write_text("PATH=/opt/wafer/bin:/usr/local/bin:/usr/bin:/bin\n")


def test_a_job_in_a_container(cluster: Cluster, tmp_path: Path) -> None:
    if shutil.which("ch-run") is None:
        pytest.skip("charliecloud is not installed (Debian: apt-get install charliecloud)")
    work = tmp_path / "fc_mnist"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "examples/fc_mnist", work, ignore=ignored)
    params = work / "configs/params.yaml"
    params.write_text(params.read_text().replace("max_steps: 400", "max_steps: 20"))
    with (work / "run.py").open("a") as script:
        script.write("    import os\n    print('inside:', os.environ.get('INSIDE_WAFER'))\n")
    interpreter = Path(sys.base_prefix)
    see = [Path("/usr"), interpreter, Path(sys.prefix), REPOSITORY]
    image = tmp_path / "image"
    make_image(image, [*see, work])
    done = cluster.run(
        "openwafer", "submit", "--tasks", "3", "--container", str(image),
        "--bind", ",".join(map(str, see)),
        "--", "python-pt", "run.py", "--mode", "train", "--params", "configs/params.yaml",
        "--model_dir", "model", cwd=work, USER="root",
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "ch-run --home" in (work / "model/job.sbatch").read_text()
    assert "Waiting for 2 streamer(s)" in output
    assert "Training Completed Successfully!" in output
    assert "inside: yes" in output
    losses = (work / "model/train/metrics.jsonl").read_text().splitlines()
    assert json.loads(losses[-1])["step"] == 20
