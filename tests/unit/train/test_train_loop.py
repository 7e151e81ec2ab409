"""The loop's rules: where it ends, what is due when, what stops it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fakes import (
    FakeExecutor,
    FakeSource,
    MeanMetric,
    batch_at,
    learning_rate_at,
    make_job,
    same_weights,
    weights,
)

from openwafer.config.runconfig import RunConfig
from openwafer.errors import CheckpointError, ConfigError, DataError, NumericsError
from openwafer.train.checkpoint_dir import list_checkpoints
from openwafer.train.evaluation import samples_in
from openwafer.train.hooks import Hooks
from openwafer.train.job import run_job
from openwafer.train.position import Budget, Progress, training_budget


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="openwafer")
    return caplog


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_saved(model_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(model_dir)]


def test_same_weights_as_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Two epochs of 5 batches, 2 a step: the fifth batch of each epoch is not used."""
    executor = FakeExecutor()
    torch.manual_seed(3)
    run = RunConfig(model_dir=tmp_path, num_epochs=2, log_steps=0)
    run_job(make_job(executor, run, train_source=FakeSource(5), grad_accum_steps=2))

    model, reference = FakeExecutor().model, FakeExecutor()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(3)
    step = 0
    for epoch in (0, 1):
        for first in (0, 2):
            optimizer.param_groups[0]["lr"] = learning_rate_at(step)
            optimizer.zero_grad()
            for index in (0, 1):
                x, y = batch_at(epoch, first + index)
                generator = torch.Generator().manual_seed(31 * step + index)
                keep = (torch.rand(x.shape, generator=generator) > 0.1).float()
                noise = 0.01 * torch.randn(x.shape)
                (F.mse_loss(model(x * keep + noise), y) / 2).backward()
            optimizer.step()
            step += 1
    assert same_weights(weights(executor), dict(model.state_dict()))
    assert not same_weights(weights(executor), weights(reference))


def test_logs_and_checkpoints_when_due(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    run = RunConfig(
        model_dir=tmp_path,
        max_steps=11,
        log_steps=4,
        checkpoint_steps=5,
        keep_checkpoint_max=0,
        save_initial_checkpoint=True,
        cs_ip="local",
    )
    run_job(make_job(FakeExecutor(), run))
    assert [line["step"] for line in lines(tmp_path / "train/metrics.jsonl")] == [4, 8, 11]
    assert steps_saved(tmp_path) == [0, 5, 10, 11]
    assert "| Train Device=cpu, Step=8, Loss=0." in log.text
    assert "Training finished with 44 samples in " in log.text
    assert log.messages[-1] == "Training Completed Successfully!"
    assert "Saved checkpoint at global step: 10" in log.messages


def test_log_steps_0_logs_the_last_and_checkpoint_steps_0_saves_none(tmp_path: Path) -> None:
    run = RunConfig(model_dir=tmp_path, max_steps=5, log_steps=0)
    run_job(make_job(FakeExecutor(), run))
    assert [line["step"] for line in lines(tmp_path / "train/metrics.jsonl")] == [5]
    assert steps_saved(tmp_path) == []


def test_logged_values_are_those_of_the_step(tmp_path: Path) -> None:
    seen: list[tuple[float, int, int]] = []

    class Recording(Hooks):
        def on_train_batch_end(self, loss: torch.Tensor, epoch: int, step: int) -> None:
            seen.append((loss.item(), epoch, step))

    run = RunConfig(model_dir=tmp_path, max_steps=6, log_steps=3)
    source = FakeSource(4)
    run_job(make_job(FakeExecutor(), run, train_source=source, hooks=Recording()))
    third, sixth = lines(tmp_path / "train/metrics.jsonl")
    assert third["loss"] == seen[2][0]
    assert sixth["loss"] == seen[5][0]
    assert third["lr"] == learning_rate_at(2)
    assert third["grad_norm"] == 0.5
    assert sixth["loss_scale"] == 1024.0 + 6
    assert third["samples_per_sec"] > 0
    assert [(epoch, step) for _, epoch, step in seen] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 5),
        (1, 6),
    ]


def test_microbatch_groups_and_the_remainder(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    executor, source = FakeExecutor(), FakeSource(7)
    run = RunConfig(model_dir=tmp_path, num_epochs=2)
    run_job(make_job(executor, run, train_source=source, grad_accum_steps=3))
    assert executor.group_sizes == [3, 3, 3, 3]
    assert source.taken == [(e, i) for e in (0, 1) for i in range(6)]
    assert source.closed == 2
    assert log.text.count("the last 1 of the 7 batches of each epoch are not used") == 1


def test_steps_per_epoch_caps_an_epoch(tmp_path: Path) -> None:
    source = FakeSource(10)
    run = RunConfig(model_dir=tmp_path, max_steps=5, steps_per_epoch=2)
    run_job(make_job(FakeExecutor(), run, train_source=source))
    assert source.taken == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_unsized_data_begin_again_until_max_steps(tmp_path: Path) -> None:
    executor, source = FakeExecutor(), FakeSource(3, sized=False)
    run = RunConfig(model_dir=tmp_path, max_steps=4)
    run_job(make_job(executor, run, train_source=source, grad_accum_steps=2))
    assert executor.steps == [0, 1, 2, 3]
    assert source.asked == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_source_shorter_than_it_says_still_ends_well(tmp_path: Path) -> None:
    executor = FakeExecutor()
    run = RunConfig(model_dir=tmp_path, num_epochs=2, log_steps=0, checkpoint_steps=100)
    source = FakeSource(3, said=5)
    result = run_job(make_job(executor, run, train_source=source))
    assert len(executor.steps) == 6
    assert result.exit_code == 0
    assert steps_saved(tmp_path) == [6]
    assert [line["step"] for line in lines(tmp_path / "train/metrics.jsonl")] == [6]


@pytest.mark.parametrize("sized", [True, False])
def test_too_few_batches_is_a_data_error_not_a_hang(sized: bool, tmp_path: Path) -> None:
    run = RunConfig(model_dir=tmp_path, max_steps=5)
    source = FakeSource(2, sized=sized)
    with pytest.raises(DataError, match="epoch"):
        run_job(make_job(FakeExecutor(), run, train_source=source, grad_accum_steps=3))


def test_ends_that_cannot_be(tmp_path: Path) -> None:
    start = Progress()
    both = RunConfig(model_dir=tmp_path, num_steps=2, num_epochs=2)
    with pytest.raises(ConfigError, match="exclude"):
        training_budget(both, num_batches=5, grad_accum_steps=1, start=start)
    with pytest.raises(ConfigError, match="when training ends"):
        training_budget(RunConfig(), num_batches=5, grad_accum_steps=1, start=start)
    with pytest.raises(ConfigError, match="no length"):
        training_budget(RunConfig(num_epochs=1), num_batches=None, grad_accum_steps=1, start=start)


@given(
    max_steps=st.none() | st.integers(1, 40),
    num_steps=st.none() | st.integers(1, 40),
    num_epochs=st.none() | st.integers(1, 5),
    cap=st.none() | st.integers(1, 6),
    length=st.integers(1, 12),
    accum=st.integers(1, 3),
    cut=st.integers(0, 60),
)
@settings(max_examples=200, deadline=None)
def test_a_budget_walked_by_hand(
    max_steps: int | None,
    num_steps: int | None,
    num_epochs: int | None,
    cap: int | None,
    length: int,
    accum: int,
    cut: int,
) -> None:
    """Steps counted one by one; and the same end is foretold from any place on the way."""
    if num_steps is not None:
        num_epochs = None
    if max_steps is num_steps is num_epochs is None or length < accum:
        return
    run = RunConfig(
        max_steps=max_steps, num_steps=num_steps, num_epochs=num_epochs, steps_per_epoch=cap
    )
    budget = training_budget(
        run, num_batches=length, grad_accum_steps=accum, start=Progress(), quiet=True
    )
    per_epoch = length // accum if cap is None else min(cap, length // accum)
    ends = [max_steps, num_steps, None if num_epochs is None else num_epochs * per_epoch]
    expected = min(end for end in ends if end is not None)
    walked = walk(budget, Progress())
    assert walked[-1].global_step == expected
    middle = walked[min(cut, len(walked) - 1)]
    assert budget.final_step(middle) == expected
    assert middle.batch <= per_epoch * accum


def walk(budget: Budget, progress: Progress) -> list[Progress]:
    places = [progress]
    while not budget.over(progress):
        if budget.epoch_over(progress):
            progress = progress.next_epoch()
        progress = progress.after_step(budget.batches_per_step)
        places.append(progress)
    return places


def test_complete_training_is_told_and_succeeds(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    run = RunConfig(model_dir=tmp_path, max_steps=4, checkpoint_steps=2)
    run_job(make_job(FakeExecutor(), run))
    performance = (tmp_path / "performance/performance.json").read_bytes()
    executor = FakeExecutor()
    result = run_job(make_job(executor, run))
    assert (result.exit_code, executor.steps) == (0, [])
    assert "Training is already complete: global step 4" in log.messages[-1]
    assert (tmp_path / "performance/performance.json").read_bytes() == performance
    assert [line["step"] for line in lines(tmp_path / "train/metrics.jsonl")] == [4]


def test_a_given_checkpoint_past_the_end_is_an_error(tmp_path: Path) -> None:
    run = RunConfig(model_dir=tmp_path / "a", max_steps=4, checkpoint_steps=2)
    run_job(make_job(FakeExecutor(), run))
    given = tmp_path / "a/checkpoint_4.mdl"
    again = RunConfig(model_dir=tmp_path / "b", max_steps=3, checkpoint_path=given)
    with pytest.raises(ConfigError, match="at global step 4, and training ends at 3") as caught:
        run_job(make_job(FakeExecutor(), again))
    assert "num_steps" in caught.value.hint


def test_num_steps_and_num_epochs_count_from_a_given_checkpoint(tmp_path: Path) -> None:
    run = RunConfig(model_dir=tmp_path / "a", num_epochs=1, checkpoint_steps=2)
    run_job(make_job(FakeExecutor(), run, train_source=FakeSource(4)))
    given = tmp_path / "a/checkpoint_4.mdl"
    more = RunConfig(model_dir=tmp_path / "b", num_steps=3, checkpoint_path=given)
    result = run_job(make_job(FakeExecutor(), more, train_source=FakeSource(4)))
    assert result.training is not None
    assert result.training.progress.global_step == 7
    epoch = RunConfig(model_dir=tmp_path / "c", num_epochs=1, checkpoint_path=given)
    source = FakeSource(4)
    result = run_job(make_job(FakeExecutor(), epoch, train_source=source))
    assert result.training is not None
    assert result.training.progress.global_step == 8
    assert source.taken == [(1, i) for i in range(4)]


def test_raising_max_steps_trains_on(tmp_path: Path) -> None:
    straight = FakeExecutor()
    torch.manual_seed(1)
    whole = RunConfig(model_dir=tmp_path / "a", max_steps=9, checkpoint_steps=3)
    run_job(make_job(straight, whole, train_source=FakeSource(4)))
    in_parts = FakeExecutor()
    torch.manual_seed(1)
    part = RunConfig(model_dir=tmp_path / "b", max_steps=4, checkpoint_steps=3)
    run_job(make_job(FakeExecutor(), part, train_source=FakeSource(4)))
    torch.manual_seed(99)
    run_job(make_job(in_parts, replace(part, max_steps=9), train_source=FakeSource(4)))
    assert in_parts.steps == [4, 5, 6, 7, 8]
    assert same_weights(weights(straight), weights(in_parts))


def test_nan_stops_at_its_step_and_is_never_saved(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.nan_at = {6}
    run = RunConfig(model_dir=tmp_path, max_steps=20, log_steps=10, checkpoint_steps=3)
    with pytest.raises(NumericsError, match="nan at global step 7") as caught:
        run_job(make_job(executor, run, grad_accum_steps=2))
    assert caught.value.where == "layer 2 of 2 microbatches"
    assert "checkpoint_6.mdl" in caught.value.hint
    assert steps_saved(tmp_path) == [3, 6]
    assert executor.steps == list(range(7))


def test_a_skipped_update_with_a_finite_loss_goes_on(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.skipped_at = {1, 3}
    run_job(make_job(executor, RunConfig(model_dir=tmp_path, max_steps=6, log_steps=3)))
    assert len(executor.steps) == 6


def test_a_loss_that_is_not_finite_stops_at_its_step_logged_or_not(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.nan_at = {1}
    executor.skipped_at = {1}
    run = RunConfig(model_dir=tmp_path, max_steps=6, log_steps=3, checkpoint_steps=4)
    with pytest.raises(NumericsError, match="step 2"):
        run_job(make_job(executor, run))
    assert steps_saved(tmp_path) == []


def test_nan_is_let_through_on_request(tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.nan_at = {1}
    run = RunConfig(model_dir=tmp_path, max_steps=4, log_steps=2, check_loss_values=False)
    run_job(make_job(executor, run))
    assert [line["loss"] is None for line in lines(tmp_path / "train/metrics.jsonl")] == [
        True,
        False,
    ]


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig(model_dir=tmp_path / "a", max_steps=8, checkpoint_steps=3)
    straight = FakeExecutor()
    torch.manual_seed(1)
    run_job(make_job(straight, replace(run, model_dir=tmp_path / "b")))

    def refuse(contents: dict[str, Any], file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    def fill_the_disk(step: int) -> None:
        if step == 4:
            monkeypatch.setattr("openwafer.train.checkpoint_file.save_archive", refuse)

    torch.manual_seed(1)
    with pytest.raises(CheckpointError, match="no room"):
        run_job(make_job(FakeExecutor(before_step=fill_the_disk), run))
    assert sorted(p.name for p in run.model_dir.iterdir() if p.is_file()) == ["checkpoint_3.mdl"]
    monkeypatch.undo()
    resumed = FakeExecutor()
    run_job(make_job(resumed, run))
    assert same_weights(weights(straight), weights(resumed))


def test_evaluation_averages_and_reports(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    executor = FakeExecutor()
    expected = [float(executor.eval_step(batch_at(0, index), step=0).loss) for index in range(3)]
    run = RunConfig(model_dir=tmp_path, mode="eval", log_steps=0)
    metric = MeanMetric()
    metric.values = [1e9]  # left over from something else
    result = run_job(make_job(executor, run, metrics=metric.functions()))
    assert result.evaluation is not None
    assert result.evaluation.avg_loss == pytest.approx(sum(expected) / 3, rel=1e-12)
    (line,) = lines(tmp_path / "eval/metrics.jsonl")
    assert line["avg_eval_loss"] == result.evaluation.avg_loss
    means = [float(batch_at(0, index)[1].mean()) for index in range(3)]
    assert line["eval/mean"] == pytest.approx(sum(means) / 3)
    assert "the initial weights are evaluated" in log.text
    assert f"Avg Eval. Loss = {result.evaluation.avg_loss}" in log.messages
    assert "Avg eval_metrics = {'eval/mean': " in log.text
    assert log.messages[-1] == "Evaluation Completed Successfully!"
    run_job(make_job(executor, run))
    assert len(lines(tmp_path / "eval/metrics.jsonl")) == 1


def test_evaluation_takes_the_newest_or_the_given_checkpoint(tmp_path: Path) -> None:
    trained = FakeExecutor()
    run = RunConfig(model_dir=tmp_path, max_steps=4, checkpoint_steps=2)
    run_job(make_job(trained, run))
    executor = FakeExecutor()
    result = run_job(make_job(executor, replace(run, mode="eval")))
    assert result.start.progress.global_step == 4
    assert same_weights(weights(executor), weights(trained))
    given = replace(run, mode="eval", checkpoint_path=tmp_path / "checkpoint_2.mdl")
    assert run_job(make_job(executor, given)).start.progress.global_step == 2


def test_evaluation_limits(tmp_path: Path) -> None:
    source = FakeSource(10, sized=False)
    run = RunConfig(model_dir=tmp_path, mode="eval", eval_steps=2)
    run_job(make_job(FakeExecutor(), run, eval_source=source))
    assert source.taken == [(0, 0), (0, 1)]
    with pytest.raises(ConfigError, match="no length"):
        run_job(make_job(FakeExecutor(), replace(run, eval_steps=None), eval_source=source))
    empty = FakeSource(0, sized=False)
    with pytest.raises(DataError, match="no batch"):
        run_job(make_job(FakeExecutor(), run, eval_source=empty))
    with pytest.raises(ConfigError, match="no eval data"):
        run_job(make_job(FakeExecutor(), run, eval_source=None))


def test_train_and_eval_evaluates_after_each_epoch_and_at_the_end(tmp_path: Path) -> None:
    run = RunConfig(model_dir=tmp_path, mode="train_and_eval", max_steps=10, checkpoint_steps=4)
    alone, both = FakeExecutor(), FakeExecutor()
    torch.manual_seed(1)
    run_job(make_job(both, run, train_source=FakeSource(4)))
    assert [line["step"] for line in lines(tmp_path / "eval/metrics.jsonl")] == [4, 8, 10]
    torch.manual_seed(1)
    plain = replace(run, mode="train", model_dir=tmp_path / "plain")
    run_job(make_job(alone, plain, train_source=FakeSource(4)))
    assert same_weights(weights(alone), weights(both))
    again = FakeExecutor()
    result = run_job(make_job(again, run, train_source=FakeSource(4)))
    assert again.steps == []
    assert result.evaluation is not None, "killed before its last evaluation, it makes up for it"
    assert [line["step"] for line in lines(tmp_path / "eval/metrics.jsonl")] == [4, 8, 10]


def test_hooks_are_called_in_order(tmp_path: Path) -> None:
    calls: list[str] = []

    class Spy(Hooks):
        def on_train_start(self) -> None:
            calls.append("train_start")

        def on_train_end(self, early_exit: bool) -> None:
            calls.append(f"train_end {early_exit}")

        def on_train_epoch_start(self) -> None:
            calls.append("epoch_start")

        def on_train_epoch_end(self, early_exit: bool) -> None:
            calls.append(f"epoch_end {early_exit}")

        def on_train_batch_start(self, data: Any) -> Any:
            calls.append("batch_start")
            return data

        def on_train_batch_end(self, loss: torch.Tensor, epoch: int, step: int) -> None:
            calls.append(f"batch_end {epoch} {step}")

        def on_eval_start(self) -> None:
            calls.append("eval_start")

        def on_eval_end(self, early_exit: bool) -> None:
            calls.append(f"eval_end {early_exit}")

    run = RunConfig(model_dir=tmp_path, mode="train_and_eval", max_steps=1)
    run_job(make_job(FakeExecutor(), run, grad_accum_steps=2, hooks=Spy()))
    assert calls == [
        "train_start",
        "epoch_start",
        "batch_start",
        "batch_start",
        "batch_end 0 1",
        "epoch_end False",
        "eval_start",
        "eval_end False",
        "train_end False",
    ]


def test_samples_in_nested_batches() -> None:
    x = torch.zeros(6, 2)
    assert samples_in(x) == 6
    assert samples_in({"ids": x, "n": torch.tensor(1)}) == 6
    assert samples_in([("name", {"a": x})]) == 6
    assert samples_in(("no tensor",)) == 0
