"""What a run says and leaves behind besides checkpoints: log lines, events, files for scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fc_mnist_runs import MODE_FLAGS, SMALL, everything_in, load_example, run_here, write_params
from sklearn.datasets import load_digits

BASE: dict[str, Any] = {
    **SMALL,
    "runconfig.max_steps": 20,
    "runconfig.log_steps": 5,
    "runconfig.checkpoint_steps": 10,
}

PERFORMANCE = {
    "total_samples",
    "total_time",
    "samples_per_sec",
    "compile_time",
    "programming_time",
    "est_samples_per_sec",
    "suspected_input_bottleneck (beta)",
    "fabric_cores",
    "fabric_utilization",
    "delta_t",
    "Frequency",
    "input_bound_workers",
}

STREAMING_PERFORMANCE = {
    "step_seconds",
    "predicted_step_seconds",
    "busy_seconds_per_step",
    "exposed_seconds_per_step",
    "bound_by",
    "suggestions",
}
"""Where the time of a weight streaming step goes (docs/artifacts.md)."""


def events_of(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars in TensorBoard's event files: by name, then by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        name: {event.step: event.value for event in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


@pytest.mark.parametrize(
    "mode", ["plain", "layer_pipelined", pytest.param("weight_streaming", marks=pytest.mark.slow)]
)
def test_lines_files_and_events(mode: str, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", {**BASE, "optimizer.learning_rate": 0.05})
    model_dir = tmp_path / "model_dir"
    outcome = run_here("train_and_eval", params, model_dir, *MODE_FLAGS[mode]).succeeded()
    pattern = (
        r"INFO:   \| Train Device=cpu Step=(\d+) Loss=([\d.]+) Time=\d\d:\d\d:\d\d"
        if mode == "plain"
        else r"INFO:   \| Train Device=cpu, Step=(\d+), Loss=([\d.]+), Rate=[\d.]+ samples/sec, "
        r"GlobalRate=[\d.]+ samples/sec"
    )
    lines = [re.fullmatch(pattern, line) for line in outcome.output.splitlines()]
    printed = {int(found[1]): float(found[2]) for found in lines if found}
    rows = {row["step"]: row for row in outcome.metrics()}
    assert list(printed) == list(rows) == [5, 10, 15, 20]
    for step, loss in printed.items():
        assert loss == pytest.approx(rows[step]["loss"], abs=6e-6)
        assert rows[step]["lr"] == 0.05
        assert rows[step]["samples_per_sec"] > 0
    assert "Saved checkpoint at global step: 10" in outcome.output
    events = events_of(model_dir / "train")
    assert set(events) >= {"loss", "lr", "samples_per_sec"}
    for step, row in rows.items():
        assert events["loss"][step] == np.float32(row["loss"])
        assert events["lr"][step] == np.float32(0.05)
    assert set(events_of(model_dir / "eval")) == {"avg_eval_loss", "accuracy"}
    written = yaml.safe_load((model_dir / "train_and_eval/params_train_and_eval.yaml").read_text())
    assert written["runconfig"]["max_steps"] == 20
    assert written["model"]["hidden_sizes"] == [16, 16]


@pytest.mark.parametrize(
    "mode", ["plain", "layer_pipelined", pytest.param("weight_streaming", marks=pytest.mark.slow)]
)
def test_performance_json(mode: str, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", BASE)
    outcome = run_here("train", params, tmp_path / "model_dir", *MODE_FLAGS[mode]).succeeded()
    path = outcome.model_dir / "performance" / "performance.json"
    fields = json.loads(path.read_text())
    streamed = STREAMING_PERFORMANCE if mode == "weight_streaming" else set[str]()
    assert set(fields) == PERFORMANCE | streamed
    assert list(fields) == sorted(fields)
    assert fields["total_samples"] == 20 * 32
    rate = fields["total_samples"] / fields["total_time"]
    assert fields["samples_per_sec"] == pytest.approx(rate, rel=1e-9)
    assert re.match(r"(Yes|No): [\d.]+%", fields["suspected_input_bottleneck (beta)"])
    predicted = (
        "est_samples_per_sec",
        "fabric_cores",
        "fabric_utilization",
        "delta_t",
        "Frequency",
    )
    if mode == "plain":
        assert all(fields[name] is None for name in predicted)
        return
    plan = outcome.plan()
    assert fields["est_samples_per_sec"] == plan["samples_per_sec"]
    assert fields["fabric_utilization"] == plan["total_utilization"]
    assert fields["Frequency"] == 850e6
    assert fields["fabric_cores"] == plan["plan"]["fabric"]["fabric_pes"]
    assert fields["delta_t"] == plan["plan"]["predicted"]["delta_t_cycles"]
    assert fields["compile_time"] > 0


def test_evaluation_keeps_the_figures_of_training(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", BASE)
    run_here("train", params, tmp_path / "model_dir").succeeded()
    path = tmp_path / "model_dir" / "performance" / "performance.json"
    before = path.read_text()
    run_here("eval", params, tmp_path / "model_dir").succeeded()
    assert path.read_text() == before


@pytest.mark.parametrize("mode", ["plain", "weight_streaming"])
def test_save_stream_size_writes_the_first_batches(mode: str, tmp_path: Path) -> None:
    """In file order, so that they can be told from the data set itself."""
    changes = {**BASE, "train_input.shuffle": False, "runconfig.save_stream_size": 3}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("train", params, tmp_path / "model_dir", *MODE_FLAGS[mode]).succeeded()
    streams = np.load(outcome.model_dir / "train" / "streams.0.npz")
    digits = load_digits()
    kept = np.arange(len(digits.target)) % 5 != 0
    assert set(streams.files) == {f"{number}/[{part}]" for number in range(3) for part in (0, 1)}
    for number in range(3):
        chosen = slice(32 * number, 32 * (number + 1))
        images = digits.images[kept][chosen].reshape(32, -1) / 16
        np.testing.assert_array_equal(streams[f"{number}/[0]"], images.astype(np.float32))
        np.testing.assert_array_equal(streams[f"{number}/[1]"], digits.target[kept][chosen])


@pytest.mark.parametrize("size", [2, 1000])
def test_save_stream_size_in_an_evaluation(size: int, tmp_path: Path) -> None:
    """Also where there are fewer batches than were asked for."""
    changes = {**BASE, "runconfig.save_stream_size": size}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("eval", params, tmp_path / "model_dir").succeeded()
    streams = np.load(outcome.model_dir / "eval" / "streams.0.npz")
    assert len(streams.files) == 2 * min(size, 360 // 32)


def test_enable_summaries_writes_every_module(tmp_path: Path) -> None:
    """The tensors of the last step, forward and backward: their shapes, and what must hold
    between them."""
    changes = {**BASE, "runconfig.enable_summaries": True, "model.dropout": 0.0}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("train", params, tmp_path / "model_dir").succeeded()
    arrays = np.load(outcome.model_dir / "summaries" / "summaries.npz")
    assert arrays["fc_layers.0/forward"].shape == (32, 16)
    assert arrays["last_layer/backward"].shape == (32, 10)
    example = load_example()
    network = example.MNISTModel.__init__.__globals__["MNIST"](64, [16, 16], 0.0, "relu")
    modules = {name for name, _ in network.named_modules() if name and name != "fc_layers"}
    assert {name.rsplit("/", 1)[0] for name in arrays.files} >= modules
    # Rows of a gradient of log-softmax sum to zero.
    np.testing.assert_allclose(arrays["last_layer/backward"].sum(axis=1), 0, atol=1e-6)
    assert (arrays["nonlin/forward"] >= 0).all()
    refused = run_here("train", params, tmp_path / "compiled", "--cs_ip", "local")
    assert refused.exit_code == 2
    assert "enable_summaries" in refused.output
    assert not (tmp_path / "compiled").exists()


def test_settings_without_effect_are_said_once(tmp_path: Path) -> None:
    """Every documented flag is accepted; those for the original cluster say that nothing comes
    of them."""
    without_effect = {
        "--credentials_path": ("creds",),
        "--mgmt_address": ("server:443",),
        "--num_wgt_servers": ("12",),
        "--debug_args_path": ("debug",),
        "--mount_dirs": ("/a", "/b"),
        "--python_paths": ("/c",),
        "--volume_mount_path": ("/d",),
        "--dist_addr": ("host:1",),
        "--dist_backend": ("gloo",),
        "--init_method": ("env://",),
    }
    with_effect = [
        *("--compile_dir", str(tmp_path / "model_dir"), "--cpu", "--logging", "info"),
        *("--num_csx", "1", "--multireplica", "--cs_ip", "local"),
    ]
    given = ["--appliance"]
    given += [text for flag, values in without_effect.items() for text in (flag, *values)]
    params = write_params(tmp_path / "params.yaml", {**BASE, "runconfig.max_steps": 1})
    outcome = run_here("train", params, tmp_path / "model_dir", *given, *with_effect).succeeded()
    for flag in without_effect:
        name = flag.removeprefix("--")
        said = [line for line in outcome.output.splitlines() if f"`{name}` has no effect" in line]
        assert len(said) == 1, name
    assert outcome.plan()["execution_mode"] == "weight_streaming", "that is what --appliance means"
    assert "`appliance`: weight streaming on this machine" in outcome.output
    quiet = run_here("train", params, tmp_path / "quiet", *with_effect).succeeded()
    assert "no effect" not in quiet.output


@pytest.mark.parametrize("level", ["error", "WARNING"])
def test_logging_level(level: str, tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", BASE)
    outcome = run_here("train", params, tmp_path / "model_dir", "--logging", level).succeeded()
    assert outcome.output == ""
    assert len(outcome.losses()) == 4


def test_no_steps_are_logged_but_the_last(tmp_path: Path) -> None:
    changes = {**BASE, "runconfig.log_steps": 0, "runconfig.checkpoint_steps": 0}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("train", params, tmp_path / "model_dir").succeeded()
    assert [row["step"] for row in outcome.metrics()] == [20]
    assert not any("checkpoint" in name for name in everything_in(outcome.model_dir))


def test_debug_metrics_count_every_byte(tmp_path: Path) -> None:
    """Weights cross twice a step and gradients once, whatever the number of microbatches."""
    weight_bytes = 4 * (64 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10)
    changes = {**BASE, "runconfig.show_debug_metrics": True, "optimizer.grad_accum_steps": 2}
    params = write_params(tmp_path / "params.yaml", changes)
    flags = MODE_FLAGS["weight_streaming"]
    outcome = run_here("train", params, tmp_path / "model_dir", *flags).succeeded()
    counters = dict(re.findall(r"Counter (.*): ([\d.]+)", outcome.output))
    assert int(counters["layers fetched"]) == 20 * 2 * 3
    assert int(counters["bytes fetched"]) == 20 * 2 * weight_bytes
    assert int(counters["bytes returned"]) == 20 * weight_bytes
    assert int(counters["peak device bytes"]) > 0
    assert float(counters["compile seconds"]) > 0
