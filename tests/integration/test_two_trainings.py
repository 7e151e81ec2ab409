"""Two runs in one model_dir: a training keeps a second one out, an evaluation may come in."""

from __future__ import annotations

from pathlib import Path

from fc_mnist_runs import SMALL, everything_in, run_here, write_params

from openwafer.train.run_lock import training_lock


def test_a_second_training_is_refused_and_an_evaluation_is_not(tmp_path: Path) -> None:
    changes = {**SMALL, "runconfig.max_steps": 4, "runconfig.checkpoint_steps": 2}
    params = write_params(tmp_path / "params.yaml", changes)
    model_dir = tmp_path / "model_dir"
    run_here("train", params, model_dir).succeeded()
    before = everything_in(model_dir)
    with training_lock(model_dir):
        refused = run_here("train", params, model_dir)
        assert refused.exit_code == 2
        assert "another training writes into this folder: process" in refused.output
        assert everything_in(model_dir).keys() == before.keys()
        run_here("eval", params, model_dir).succeeded()
    run_here("train", params, model_dir).succeeded()


def test_a_second_training_is_refused_before_it_compiles(tmp_path: Path) -> None:
    """Which may take minutes, and would leave a plan behind."""
    params = write_params(tmp_path / "params.yaml", {**SMALL, "runconfig.max_steps": 1})
    model_dir = tmp_path / "model_dir"
    flags = ("--cs_ip", "local", "--execution_mode", "layer_pipelined")
    with training_lock(model_dir):
        refused = run_here("train", params, model_dir, *flags)
        assert refused.exit_code == 2
        assert "another training writes into this folder: process" in refused.output
        assert not list(model_dir.glob("cs_*"))
        run_here("train", params, model_dir, *flags, "--compile_only").succeeded()
    assert list(model_dir.glob("cs_*"))
