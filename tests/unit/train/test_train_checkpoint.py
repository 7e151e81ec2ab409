"""What a checkpoint holds, which one is taken, which are kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_fakes import CODEC, FakeExecutor, make_job, same_weights, weights

from openwafer.config.runconfig import RunConfig
from openwafer.errors import CheckpointError
from openwafer.train.checkpoint import (
    Checkpoint,
    OptimizerCodec,
    compare_models,
    contents_of,
    fingerprint,
    from_contents,
    require_fit,
)
from openwafer.train.checkpoint_dir import (
    CheckpointFolder,
    checkpoint_path,
    find_latest,
    list_checkpoints,
)
from openwafer.train.checkpoint_file import read_file, write_file
from openwafer.train.job import run_job
from openwafer.train.position import Progress
from openwafer.train.start import start_training


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shapes_of(executor: FakeExecutor) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in weights(executor).items()}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="openwafer")
    return caplog


def train_once(model_dir: Path, steps: int, **changes: Any) -> FakeExecutor:
    executor = FakeExecutor()
    run = RunConfig(model_dir=model_dir, max_steps=steps, checkpoint_steps=2)
    run_job(make_job(executor, replace(run, **changes)))
    return executor


def test_contents_go_through_a_file_unchanged(tmp_path: Path) -> None:
    executor = train_once(tmp_path, 3)
    progress = Progress(global_step=3, epoch=1, batch=4, origin_step=2, origin_epoch=1)
    checkpoint = Checkpoint(
        state=executor.state(), progress=progress, learning_rate=0.25, started_from="/x.mdl"
    )
    path = tmp_path / "c.mdl"
    write_file(path, contents_of(checkpoint, CODEC))
    loaded = from_contents(read_file(path), CODEC, where="c.mdl")
    assert loaded.progress == progress
    assert loaded.started_from == "/x.mdl"
    assert loaded.state.loss_scale == checkpoint.state.loss_scale
    assert same_weights(loaded.state.model, checkpoint.state.model)
    assert loaded.state.optimizer.keys() == checkpoint.state.optimizer.keys()
    for name, entry in loaded.state.optimizer.items():
        assert same_weights(entry, checkpoint.state.optimizer[name])


def test_plain_torch_goes_on_from_our_entries(tmp_path: Path) -> None:
    """The four documented entries load into plain torch objects."""
    executor = train_once(tmp_path, 4)
    entries = torch.load(checkpoint_path(tmp_path, 4), weights_only=True)
    model = FakeExecutor().model
    model.load_state_dict(entries["model"])
    assert same_weights(dict(model.state_dict()), weights(executor))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.AdamW(model.parameters()), lambda step: 1.0
    )
    scheduler.load_state_dict({**scheduler.state_dict(), **entries["lr_scheduler"]})
    assert scheduler.last_epoch == entries["global_step"] == 4
    assert entries["data_position"] == {"epoch": 0, "batch": 4}
    assert entries["rng"]["seed"] == 1
    assert entries["openwafer"]["fingerprint"] == fingerprint(entries["model"])


def test_a_checkpoint_of_release_1_6_resumes(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    trained = train_once(tmp_path / "a", 4)
    entries = torch.load(checkpoint_path(tmp_path / "a", 4), weights_only=True)
    old = {k: entries[k] for k in ("model", "optimizer", "lr_scheduler", "global_step")}
    path = tmp_path / "old.mdl"
    torch.save(old, path)
    executor = FakeExecutor()
    run = RunConfig(model_dir=tmp_path / "b", max_steps=9, checkpoint_path=path)
    start = start_training(run, executor, CODEC)
    assert start.progress == Progress(global_step=4, origin_step=4)
    assert same_weights(weights(executor), weights(trained))
    assert "old.mdl has no data position" in log.text


def test_a_bare_state_dict_loads_weights_only(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    donor = FakeExecutor()
    with torch.no_grad():
        donor.model[0].weight.add_(1)
    torch.save(donor.model.state_dict(), tmp_path / "w.mdl")
    executor = FakeExecutor()
    run = RunConfig(model_dir=tmp_path / "m", max_steps=2, checkpoint_path=tmp_path / "w.mdl")
    assert start_training(run, executor, CODEC).progress.global_step == 0
    assert same_weights(weights(executor), weights(donor))
    assert "has no optimizer state" in log.text
    torch.save({"epoch": 3, "stuff": [1]}, tmp_path / "no.mdl")
    with pytest.raises(CheckpointError, match="no weights") as caught:
        start_training(replace(run, checkpoint_path=tmp_path / "no.mdl"), executor, CODEC)
    assert "epoch, stuff" in caught.value.hint


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    train_once(tmp_path, 2)
    entries = read_file(checkpoint_path(tmp_path, 2))
    entries["openwafer"]["format"] = 99
    with pytest.raises(CheckpointError, match="format 99"):
        from_contents(entries, CODEC, where="x")


def test_mismatch_lists_every_kind_with_the_nearest_name() -> None:
    expected = {"fc.weight": (2, 3), "fc.bias": (2,), "head.weight": (4,)}
    found = {
        "fc.weight": torch.zeros(2, 5),
        "fc.biass": torch.zeros(2),
        "head.weight": torch.zeros(4),
    }
    mismatch = compare_models(expected, found)
    assert mismatch.missing == ("fc.bias",)
    assert mismatch.unexpected == ("fc.biass",)
    assert mismatch.wrong_shape == ("fc.weight",)
    with pytest.raises(CheckpointError) as caught:
        require_fit(expected, found, where="c.mdl")
    assert "fc.bias (did you mean `fc.biass`?)" in caught.value.what
    assert "fc.weight (2×5 in the checkpoint, not 2×3)" in caught.value.what
    assert not compare_models(expected, {n: torch.zeros(s) for n, s in expected.items()})
    many = compare_models({f"layer{i}": () for i in range(20)}, {})
    assert "and 12 more" in str(many)


def test_another_model_leaves_the_executor_untouched(tmp_path: Path) -> None:
    train_once(tmp_path, 2)
    executor = FakeExecutor(width=5)
    before = weights(executor)
    run = RunConfig(model_dir=tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match="does not fit"):
        start_training(run, executor, CODEC)
    assert same_weights(weights(executor), before)


def test_another_optimizer_is_told(tmp_path: Path) -> None:
    train_once(tmp_path, 2)

    def refuse(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
        raise KeyError("momentum_buffer")

    codec = OptimizerCodec(to_torch=CODEC.to_torch, from_torch=refuse)
    with pytest.raises(CheckpointError, match="another optimizer"):
        start_training(RunConfig(model_dir=tmp_path, max_steps=4), FakeExecutor(), codec)


def test_pretrained_takes_matching_weights_only(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    donor = train_once(tmp_path / "a", 4)
    path = checkpoint_path(tmp_path / "a", 4)
    executor = FakeExecutor(width=5)
    own = weights(executor)
    run = RunConfig(
        model_dir=tmp_path / "b", max_steps=4, checkpoint_path=path, is_pretrained_checkpoint=True
    )
    start = start_training(run, executor, CODEC)
    assert start.progress == Progress()
    assert torch.equal(weights(executor)["2.weight"], weights(donor)["2.weight"])
    assert torch.equal(weights(executor)["0.weight"], own["0.weight"])
    assert executor.state().optimizer == {}
    assert "not taken over: of another shape: 0.weight" in log.text
    with pytest.raises(CheckpointError, match="no weight of the checkpoint fits"):
        start_training(run, executor, CODEC, expected={"other": (1,)})


def test_damaged_checkpoints_are_named_and_passed_over(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    train_once(tmp_path, 6)
    truncate(checkpoint_path(tmp_path, 6))
    assert find_latest(tmp_path) == checkpoint_path(tmp_path, 4)
    assert "checkpoint_6.mdl is passed over: the checkpoint is damaged" in log.text
    start = start_training(RunConfig(model_dir=tmp_path, max_steps=9), FakeExecutor(), CODEC)
    assert start.progress.global_step == 4
    for _, path in list_checkpoints(tmp_path):
        truncate(path) if path.stat().st_size > 200 else None
    with pytest.raises(CheckpointError, match="none of the checkpoints is whole"):
        find_latest(tmp_path)
    with pytest.raises(CheckpointError, match="none of the checkpoints is whole"):
        start_training(RunConfig(model_dir=tmp_path, max_steps=9), FakeExecutor(), CODEC)


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "absent") is None
    run = RunConfig(model_dir=tmp_path / "absent", max_steps=1)
    assert start_training(run, FakeExecutor(), CODEC).path is None


def test_names_are_ordered_by_number_and_others_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint_9.mdl", "checkpoint_10.mdl", "checkpoint_x.mdl", "checkpoint_3.mdl~"):
        (tmp_path / name).write_text("")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10]


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_keep_last(keep: int, left: list[int], tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep_max=keep)
    for step in (1, 2, 3, 4):
        folder.save(step, {"model": {}})
    assert [step for step, _ in list_checkpoints(tmp_path)] == left


def test_keep_last_spares_what_it_must(tmp_path: Path) -> None:
    """The start of the run stays, and so do later steps of a run that this one was rewound from."""
    old = CheckpointFolder(tmp_path, keep_max=0)
    for step in (10, 20, 30):
        old.save(step, {"model": {}})
    folder = CheckpointFolder(tmp_path, keep_max=1, protected=checkpoint_path(tmp_path, 10))
    for step in (11, 12):
        folder.save(step, {"model": {}})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [10, 12, 20, 30]


def test_nothing_is_deleted_where_the_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, keep_max=1)
    folder.save(1, {"model": {}})
    monkeypatch.setattr("shutil.disk_usage", lambda path: (10, 10, 0))
    monkeypatch.setattr(
        "openwafer.train.checkpoint_file._require_room", lambda path, needed: _no_space()
    )
    with pytest.raises(CheckpointError):
        folder.save(2, {"model": {}})
    assert find_latest(tmp_path) == checkpoint_path(tmp_path, 1)


def _no_space() -> None:
    raise OSError(30, "Read-only file system")


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint_7.mdl.tmp").write_text("half")
    (tmp_path / ".mine.tmp").write_text("keep")
    CheckpointFolder(tmp_path).remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == [".mine.tmp"]


def test_an_explicit_checkpoint_rewinds_then_its_own_run_goes_on(tmp_path: Path) -> None:
    train_once(tmp_path, 6)
    given = checkpoint_path(tmp_path, 2)
    run = RunConfig(model_dir=tmp_path, max_steps=5, checkpoint_steps=1, checkpoint_path=given)
    executor = FakeExecutor()
    start = start_training(run, executor, CODEC)
    assert (start.progress.global_step, start.resumed) == (2, False)
    run_job(make_job(FakeExecutor(), replace(run, max_steps=3)))
    again = start_training(run, executor, CODEC)
    assert (again.progress.global_step, again.resumed) == (3, True)
    fresh = start_training(replace(run, autoresume=False), executor, CODEC)
    assert (fresh.progress.global_step, fresh.resumed) == (2, False)


def test_another_seed_is_said(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    train_once(tmp_path, 2)
    start_training(RunConfig(model_dir=tmp_path, max_steps=4, seed=5), FakeExecutor(), CODEC)
    assert "was trained with seed 1, this run has 5" in log.text
