"""Every command of the README is run, in a copy of the examples, as a newcomer would type them.

`make readme`, a part of `make ci`, runs the slow ones too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documented import ROOT, blocks, shell

README = "README.md"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("model_dir", "__pycache__")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=ignore)
    return folder


@pytest.mark.slow
def test_the_commands_by_hand(checkout: Path) -> None:
    lines = blocks(README, "sh")[1].strip().splitlines()
    assert lines[0].startswith("cd ")
    folder = checkout / lines[0].removeprefix("cd ")
    outputs = {}
    for line in lines[1:]:
        done = shell(line, folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}"
        outputs[line] = done.stdout
    said = "\n".join(outputs.values())
    assert said.count("Compile for training completed successfully!") == 2
    assert said.count("Training Completed Successfully!") == 3
    assert "Evaluation Completed Successfully!" in said
    assert re.search(r'"estimated_deltat":\d+', outputs[lines[-1]])


@pytest.mark.slow
def test_the_commands_of_the_zoo(tmp_path: Path) -> None:
    outputs: list[str] = []
    for line in blocks(README, "sh")[2].strip().splitlines():
        done = shell(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}"
        outputs.append(done.stdout)
    assert "gpt3/175b" in outputs[0]
    assert "Evaluation Completed Successfully!" in outputs[1] or "eval_metrics" in outputs[1]
    assert "delta-t" in outputs[2]
    assert "sweep.html" in outputs[3]
    assert "memory of a step" in outputs[4]
    assert all("Training Completed Successfully!" in said for said in outputs[4:])


def test_the_python_example(tmp_path: Path) -> None:
    (block,) = blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "every operation has a kernel" in done.stdout
    assert re.search(r"\d+ cycles per sample", done.stdout)


def test_make_knows_the_targets() -> None:
    for target in re.findall(r"^make ([a-z-]+)", blocks(README, "sh")[0], flags=re.MULTILINE):
        done = shell(f"make -n {target}", ROOT)
        assert done.returncode == 0, done.stdout


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    done = shell(f"{sys.executable} examples/fc_mnist/demo.py", ROOT)
    assert done.returncode == 0, done.stdout
    assert "(the same)" in done.stdout
    report = Path(done.stdout.split()[-1])
    assert report.name == "report.html"
    assert report.is_file()
