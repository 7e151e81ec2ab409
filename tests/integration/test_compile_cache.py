"""The compile cache of a run: found again for the same model, missed by any change that matters."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fc_mnist_runs import EXAMPLE, SMALL, Outcome, everything_in, run_here, write_params

BASE: dict[str, Any] = {**SMALL, "runconfig.max_steps": 2}
CACHED = "Found a cached compilation for this model configuration"


def compile_with(
    tmp_path: Path, changes: dict[str, Any], *flags: str, mode: str = "train"
) -> Outcome:
    """`--compile_only` into one model_dir, which all calls of a test share."""
    params = write_params(tmp_path / "params.yaml", {**BASE, **changes})
    folder = tmp_path / "model_dir"
    return run_here(mode, params, folder, "--compile_only", *flags).succeeded()


def plans(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "model_dir").glob("cs_*")}


def test_a_second_compile_is_read(tmp_path: Path) -> None:
    first = compile_with(tmp_path, {})
    assert CACHED not in first.output
    (directory,) = (tmp_path / "model_dir").glob("cs_*")
    assert re.fullmatch(r"cs_[0-9a-f]{64}", directory.name)
    names = {"plan.json", "deltat_estimate.json", "compile_report.txt", "report.html"}
    assert {path.name for path in directory.iterdir()} == names
    old = 1_000_000_000
    for path in (directory, *directory.iterdir()):
        os.utime(path, (old, old))
    content = everything_in(directory)
    second = compile_with(tmp_path, {})
    assert CACHED in second.output
    assert plans(tmp_path) == {directory.name}
    assert everything_in(directory) == content
    assert {path.stat().st_mtime for path in (directory, *directory.iterdir())} == {old}


def test_training_finds_what_compile_only_wrote(tmp_path: Path) -> None:
    compile_with(tmp_path, {})
    before = plans(tmp_path)
    params = write_params(tmp_path / "params.yaml", BASE)
    outcome = run_here("train", params, tmp_path / "model_dir", "--cs_ip", "local").succeeded()
    assert CACHED in outcome.output
    assert plans(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"train_input.batch_size": 16}, ()),
        ({"model.hidden_size": 24}, ()),
        pytest.param({"model.depth": 3}, (), marks=pytest.mark.slow),
        pytest.param({"model.dropout": 0.3}, (), marks=pytest.mark.slow),
        pytest.param({"model.activation_fn": "tanh"}, (), marks=pytest.mark.slow),
        ({"model.mixed_precision": True}, ()),
        pytest.param(
            {"model.mixed_precision": True, "model.fp16_type": "float16"},
            (),
            marks=pytest.mark.slow,
        ),
        pytest.param({"optimizer.optimizer_type": "RMSprop"}, (), marks=pytest.mark.slow),
        ({"optimizer.momentum": 0.0}, ()),
        ({"optimizer.grad_accum_steps": 2}, ()),
        ({}, ("--machine", "tiny")),
        ({}, ("--execution_mode", "weight_streaming")),
    ],
    ids=str,
)
def test_changes_that_matter_miss(
    changes: dict[str, Any], flags: tuple[str, ...], tmp_path: Path, base_plan: str
) -> None:
    outcome = compile_with(tmp_path, changes, *flags)
    assert CACHED not in outcome.output
    (name,) = plans(tmp_path)
    assert name != base_plan


@pytest.mark.parametrize(
    "changes",
    [
        {"runconfig.max_steps": 3, "runconfig.log_steps": 1, "runconfig.seed": 5},
        {"optimizer.learning_rate": 0.5, "optimizer.momentum": 0.5},
        {"train_input.shuffle": False, "eval_input.batch_size": 4},
    ],
    ids=str,
)
def test_changes_that_do_not_matter_hit(
    changes: dict[str, Any], tmp_path: Path, base_plan: str
) -> None:
    compile_with(tmp_path, changes)
    assert plans(tmp_path) == {base_plan}


def test_evaluation_has_a_plan_of_its_own(tmp_path: Path, base_plan: str) -> None:
    compile_with(tmp_path, {}, mode="eval")
    assert base_plan not in plans(tmp_path)


def test_overrides_of_the_machine_miss(tmp_path: Path, base_plan: str) -> None:
    overrides = tmp_path / "fabric.yaml"
    overrides.write_text("clock_hz: 500_000_000\n")
    outcome = compile_with(tmp_path, {}, "--fabric_config_file", str(overrides))
    assert base_plan not in plans(tmp_path)
    assert outcome.plan()["plan"]["predicted"]["clock_hz"] == 500_000_000


@pytest.fixture(scope="module")
def base_plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    compile_with(folder, {})
    (name,) = plans(folder)
    return name


def test_a_damaged_plan_is_named_and_compiled_again(tmp_path: Path) -> None:
    compile_with(tmp_path, {})
    (path,) = (tmp_path / "model_dir").glob("cs_*/plan.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    outcome = compile_with(tmp_path, {})
    assert CACHED not in outcome.output
    assert re.search(r"WARNING.*plan\.json cannot be used, compiling again", outcome.output)
    assert path.read_text() == whole


def test_validate_only_writes_no_plan(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", BASE)
    outcome = run_here("train", params, tmp_path / "model_dir", "--validate_only").succeeded()
    assert set(everything_in(tmp_path / "model_dir")) <= {"validate.json"}
    assert "Compile for training completed successfully!" in outcome.output
    assert "linear" in outcome.output.lower() or "matmul" in outcome.output.lower()
    evaluated = run_here("eval", params, tmp_path / "model_dir", "--validate_only").succeeded()
    assert "Compile for evaluation completed successfully!" in evaluated.output


def test_compile_dir_takes_the_plan(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", {**BASE, "runconfig.checkpoint_steps": 0})
    flags = ("--cs_ip", "local", "--compile_dir", str(tmp_path / "plans"))
    run_here("train", params, tmp_path / "model_dir", *flags).succeeded()
    assert not list((tmp_path / "model_dir").glob("cs_*"))
    assert len(list((tmp_path / "plans").glob("cs_*/plan.json"))) == 1


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        (r'"total_utilization":[0-9.]*', "plan.json"),
        (r'"estimated_deltat":[0-9.]*', "deltat_estimate.json"),
    ],
)
def test_the_documented_grep(pattern: str, file: str, tmp_path: Path) -> None:
    """As in the guide: grep -o over every compile in model_dir."""
    compile_with(tmp_path, {})
    command = f"grep -orE --include='*.json' '{pattern}' {tmp_path / 'model_dir'}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    lines = [line.split(":", 1) for line in found.stdout.splitlines()]
    assert {Path(place).name for place, _ in lines} == {file}
    values = {float(text.rsplit(":", 1)[1]) for _, text in lines}
    assert len(values) == 1
    assert values.pop() > 0


def test_the_plan_holds_the_documented_summary(tmp_path: Path) -> None:
    """docs/artifacts.md: the fields that scripts read, with numbers that agree with each other."""
    outcome = compile_with(tmp_path, {})
    plan = outcome.plan()
    (directory,) = outcome.model_dir.glob("cs_*")
    deltat = json.loads((directory / "deltat_estimate.json").read_text())
    for name in (
        "active_pes",
        "samples_per_sec",
        "compute_samples_per_sec",
        "transmission_samples_per_sec",
        "num_layers",
        "total_utilization",
    ):
        assert plan[name] > 0, name
    assert plan["num_parameters"] == 64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10
    assert set(plan["memory_bytes"]) == {"device", "store"}
    assert 0 < plan["total_utilization"] <= 1
    slowest = min(plan["compute_samples_per_sec"], plan["transmission_samples_per_sec"])
    assert plan["samples_per_sec"] == pytest.approx(slowest, rel=1e-6)
    cycles = deltat["Frequency"] / deltat["est_samples_per_sec"]
    assert deltat["estimated_deltat"] == pytest.approx(cycles, abs=1)
    for path in (directory / "plan.json", directory / "deltat_estimate.json"):
        text = path.read_text()
        assert '": ' not in text.replace("\\", ""), "the JSON is not compact"


def test_the_plan_counts_the_optimizer_it_is_for(tmp_path: Path) -> None:
    """Bytes per weight: none for SGD, 4 with momentum, 8 for RMSprop with it."""
    expected = [
        ({"optimizer.momentum": 0.0}, 0),
        ({}, 4),
        ({"optimizer.optimizer_type": "RMSprop"}, 8),
    ]
    for index, (changes, num_bytes) in enumerate(expected):
        outcome = compile_with(tmp_path / str(index), changes)
        plan = outcome.plan()
        memory = plan["plan"]["memory"]
        held = sum(uses.get("optimizer", 0) for uses in memory.values())
        assert held == num_bytes * plan["num_parameters"], changes


def test_the_example_is_the_documented_one() -> None:
    """examples/fc_mnist/run.py is written as a user writes it: nothing but a call of run."""
    source = (EXAMPLE / "run.py").read_text()
    assert "run(MNISTModel, train_input_dataloader, eval_input_dataloader, set_defaults)" in source
