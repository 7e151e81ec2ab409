"""Training with evaluations, evaluation alone, and checkpoints that go from one mode to another."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fc_mnist_runs import (
    DROP,
    EXAMPLE,
    MODE_FLAGS,
    Outcome,
    assert_close_run,
    assert_same_bits,
    checkpoint_steps,
    load_example,
    run_here,
    write_params,
)
from sklearn.datasets import load_digits
from torch import nn

BASE: dict[str, Any] = {
    "runconfig.max_steps": 33,
    "runconfig.log_steps": 1,
    "runconfig.checkpoint_steps": 33,
    "eval_input.batch_size": 60,
}

ADAM: dict[str, Any] = {
    "optimizer.optimizer_type": "Adam",
    "optimizer.momentum": DROP,
    "optimizer.learning_rate": 0.003,
}

Flags = Callable[[str], tuple[str, ...]]


def held_out(batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    digits = load_digits()
    chosen = np.arange(len(digits.target)) % 5 == 0
    images = torch.tensor(digits.images[chosen].reshape(-1, 64) / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[chosen])
    whole = range(0, len(labels) - batch_size + 1, batch_size)
    return [(images[s : s + batch_size], labels[s : s + batch_size]) for s in whole]


def evaluate_by_hand(
    weights: dict[str, torch.Tensor], batch_size: int, num_batches: int | None = None
) -> dict[str, float]:
    """The mean of the batches' losses and the share of right answers, without dropout."""
    network = load_example(EXAMPLE).MNISTModel.__init__.__globals__["MNIST"]
    model = network(64, [50] * 4, 0.1, "relu").eval()
    model.load_state_dict(weights)
    losses: list[float] = []
    right = 0
    batches = held_out(batch_size)[:num_batches]
    with torch.no_grad():
        for images, labels in batches:
            losses.append(float(nn.functional.nll_loss(model(images), labels)))
            right += int((model(images).argmax(-1) == labels).sum())
    return {
        "avg_eval_loss": sum(losses) / len(losses),
        "accuracy": right / (len(batches) * batch_size),
    }


@pytest.mark.parametrize(
    "mode", ["plain", "weight_streaming", pytest.param("layer_pipelined", marks=pytest.mark.slow)]
)
def test_train_and_eval(mode: str, tmp_path: Path) -> None:
    """Epochs of 11 steps: evaluated after 11, 22 and 33, and trained as if it were not."""
    params = write_params(tmp_path / "params.yaml", {**BASE, "runconfig.checkpoint_steps": 11})
    both = run_here("train_and_eval", params, tmp_path / "both", *MODE_FLAGS[mode]).succeeded()
    trained = run_here("train", params, tmp_path / "train", *MODE_FLAGS[mode]).succeeded()
    assert both.losses() == trained.losses()
    assert_same_bits(both.checkpoint()["model"], trained.checkpoint()["model"])
    rows = both.metrics("eval")
    assert [row["step"] for row in rows] == [11, 22, 33]
    for row in rows:
        expected = evaluate_by_hand(both.checkpoint(row["step"])["model"], 60)
        assert row["avg_eval_loss"] == pytest.approx(expected["avg_eval_loss"], rel=1e-5)
        assert row["accuracy"] == expected["accuracy"]
    assert "Training Completed Successfully!" in both.output
    assert "Evaluation Completed Successfully!" in both.output


@pytest.mark.parametrize(
    "mode", ["weight_streaming", pytest.param("layer_pipelined", marks=pytest.mark.slow)]
)
def test_eval_all(mode: str, tmp_path: Path) -> None:
    """Every whole checkpoint, oldest first; a damaged one is named and passed over."""
    params = write_params(tmp_path / "params.yaml", {**BASE, "runconfig.checkpoint_steps": 11})
    trained = run_here("train", params, tmp_path / "model_dir", *MODE_FLAGS[mode]).succeeded()
    damaged = trained.model_dir / "checkpoint_22.mdl"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    outcome = run_here("eval_all", params, trained.model_dir, *MODE_FLAGS[mode]).succeeded()
    rows = outcome.metrics("eval")
    assert [row["step"] for row in rows] == [11, 33]
    for row in rows:
        expected = evaluate_by_hand(outcome.checkpoint(row["step"])["model"], 60)
        assert row["avg_eval_loss"] == pytest.approx(expected["avg_eval_loss"], rel=1e-5)
        assert row["accuracy"] == expected["accuracy"]
    assert "checkpoint_22.mdl" in outcome.output
    assert "Evaluating 2 checkpoint(s)" in outcome.output
    nothing = run_here("eval_all", params, tmp_path / "empty", *MODE_FLAGS[mode])
    assert nothing.exit_code == 2
    assert "there is no checkpoint to evaluate" in nothing.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("trained")
    params = write_params(folder / "params.yaml", {**BASE, **ADAM})
    return run_here("train", params, folder / "plain").succeeded()


@pytest.mark.parametrize(
    ("mode", "batch_size"),
    [
        ("plain", 60),
        ("weight_streaming", 100),
        pytest.param("layer_pipelined", 60, marks=pytest.mark.slow),
        pytest.param("layer_pipelined", 100, marks=pytest.mark.slow),
    ],
)
def test_eval_of_a_checkpoint(mode: str, batch_size: int, tmp_path: Path, trained: Outcome) -> None:
    params = write_params(tmp_path / "params.yaml", {**BASE, "eval_input.batch_size": batch_size})
    checkpoint = str(trained.model_dir / "checkpoint_33.mdl")
    flags = (*MODE_FLAGS[mode], "--checkpoint_path", checkpoint)
    outcome = run_here("eval", params, tmp_path / "model_dir", *flags).succeeded()
    (row,) = outcome.metrics("eval")
    expected = evaluate_by_hand(trained.checkpoint()["model"], batch_size)
    assert row["step"] == 33
    assert row["avg_eval_loss"] == pytest.approx(expected["avg_eval_loss"], rel=1e-5)
    assert row["accuracy"] == expected["accuracy"]
    assert expected["avg_eval_loss"] < 0.98 * math.log(10), "an untrained model proves nothing"
    assert checkpoint_steps(outcome.model_dir) == []


def test_eval_takes_the_newest_checkpoint_of_model_dir(tmp_path: Path, trained: Outcome) -> None:
    params = write_params(tmp_path / "params.yaml", BASE)
    outcome = run_here("eval", params, trained.model_dir).succeeded()
    assert "Evaluating" in outcome.output
    assert "checkpoint_33.mdl" in outcome.output
    limited = run_here(
        "eval",
        write_params(tmp_path / "limited.yaml", {**BASE, "runconfig.eval_steps": 2}),
        tmp_path / "limited",
        "--checkpoint_path",
        str(trained.model_dir / "checkpoint_33.mdl"),
    ).succeeded()
    (row,) = limited.metrics("eval")
    expected = evaluate_by_hand(trained.checkpoint()["model"], 60, num_batches=2)
    assert row["accuracy"] == expected["accuracy"]
    assert row["avg_eval_loss"] == pytest.approx(expected["avg_eval_loss"], rel=1e-5)
    assert row["accuracy"] != outcome.metrics("eval")[0]["accuracy"]


@pytest.mark.parametrize(
    ("first", "second", "way"),
    [
        ("plain", "disk", "checkpoint_path"),
        ("weight_streaming", "plain", "model_dir"),
        pytest.param("disk", "layer_pipelined", "checkpoint_path", marks=pytest.mark.slow),
        pytest.param("disk", "layer_pipelined", "model_dir", marks=pytest.mark.slow),
        pytest.param("layer_pipelined", "weight_streaming", "model_dir", marks=pytest.mark.slow),
        pytest.param("plain", "layer_pipelined", "checkpoint_path", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_in_another_mode(
    first: str, second: str, way: str, tmp_path: Path, flags_of: Flags
) -> None:
    """20 steps in one mode and 20 in the other are 40 in either."""
    changes = {
        **BASE,
        "runconfig.max_steps": 40,
        "runconfig.checkpoint_steps": 20,
        **ADAM,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    half = tmp_path / "half"
    run_here("train", params, half, *flags_of(first), "--max_steps", "20").succeeded()
    if way == "model_dir":
        outcome = run_here("train", params, half, *flags_of(second)).succeeded()
    else:
        given = ("--checkpoint_path", str(half / "checkpoint_20.mdl"))
        outcome = run_here("train", params, tmp_path / "rest", *flags_of(second), *given)
        outcome.succeeded()
        assert [row["step"] for row in outcome.metrics()] == list(range(21, 41))
    whole = run_here("train", params, tmp_path / "whole", *flags_of(first)).succeeded()
    if way == "model_dir":
        assert_close_run(outcome, whole)
    else:
        np.testing.assert_allclose(outcome.losses(), whole.losses()[20:], rtol=1e-5)
    assert outcome.checkpoint()["global_step"] == 40


@pytest.mark.parametrize("mode", ["plain", "weight_streaming"])
def test_pretrained_weights_that_match_are_taken(
    mode: str, tmp_path: Path, trained: Outcome
) -> None:
    """Another head: the body comes from the checkpoint, the head is new, and the step is 0."""
    example = load_example()

    class OtherHead(example.MNISTModel):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.model.last_layer = nn.Linear(50, 12)

    path = str(trained.model_dir / "checkpoint_33.mdl")
    params = write_params(
        tmp_path / "params.yaml",
        {
            **BASE,
            "runconfig.max_steps": 3,
            "runconfig.checkpoint_steps": 3,
            "runconfig.save_initial_checkpoint": True,
        },
    )
    flags = (*MODE_FLAGS[mode], "--checkpoint_path", path, "--is_pretrained_checkpoint")
    outcome = run_here("train", params, tmp_path / mode, *flags, model_fn=OtherHead).succeeded()
    assert "last_layer.weight" in outcome.output
    assert [row["step"] for row in outcome.metrics()] == [1, 2, 3]
    start = outcome.checkpoint(0)["model"]
    for name, weight in trained.checkpoint()["model"].items():
        if name.startswith("fc_layers"):
            assert torch.equal(start[name], weight)
    assert start["last_layer.weight"].shape == (12, 50)
    # Without the flag the same file is refused, and nothing is trained.
    refused = run_here(
        "train",
        params,
        tmp_path / "refused",
        *MODE_FLAGS[mode],
        "--checkpoint_path",
        path,
        model_fn=OtherHead,
    )
    assert refused.exit_code == 2
    assert "last_layer.weight (10×50 in the checkpoint, not 12×50)" in refused.output
    assert "--is_pretrained_checkpoint" in refused.output


def test_plain_torch_reads_and_writes_checkpoints(tmp_path: Path, trained: Outcome) -> None:
    """The file is an ordinary torch file: its optimizer entry fits torch's own optimizer, and a
    bare state_dict saved by a plain program is taken as weights."""
    contents = trained.checkpoint()
    network = load_example().MNISTModel.__init__.__globals__["MNIST"](64, [50] * 4, 0.1, "relu")
    network.load_state_dict(contents["model"])
    is_bias = [name.endswith("bias") for name, _ in network.named_parameters()]
    weights = list(network.parameters())
    groups = [
        {"params": [w for w, bias in zip(weights, is_bias, strict=True) if bias is chosen]}
        for chosen in (False, True)
    ]
    optimizer = torch.optim.Adam(groups)
    optimizer.load_state_dict(contents["optimizer"])
    for state in optimizer.state.values():
        assert int(state["step"]) == 33
        assert state["exp_avg"].abs().max() > 0
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    params = write_params(tmp_path / "params.yaml", BASE)
    flags = ("--checkpoint_path", str(tmp_path / "bare.pt"))
    outcome = run_here("eval", params, tmp_path / "model_dir", *flags).succeeded()
    (row,) = outcome.metrics("eval")
    expected = evaluate_by_hand(contents["model"], 60)
    assert row["avg_eval_loss"] == pytest.approx(expected["avg_eval_loss"], rel=1e-5)
