"""`openwafer compile …/tiny --frontend tf`: every model of the zoo is imported whole, with the
sizes and the arithmetic of its PyTorch twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from openwafer.cli import main
from openwafer.zoo.catalog import families


def plan_of(name: str, frontend: str, folder: Path) -> dict[str, Any]:
    assert main(["compile", name, "--frontend", frontend, "--model_dir", str(folder)]) == 0
    (path,) = folder.glob("cs_*/plan.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "family",
    [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in families()],
)
def test_the_plan_has_the_sizes_of_the_pytorch_twin(family: str, tmp_path: Path) -> None:
    ours, twin = (plan_of(f"{family}/tiny", one, tmp_path / one) for one in ("tf", "torch"))
    assert ours["num_parameters"] == twin["num_parameters"]
    macs = [sum(layer["forward_macs"] for layer in plan["plan"]["layers"]) for plan in (ours, twin)]
    assert macs[0] == macs[1]
