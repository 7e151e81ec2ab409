"""`eval`, `eval_all` and `train_and_eval` of zoo models in TensorFlow, on it and compiled.

The reference is the PyTorch twin with the checkpoint's weights, in a plain loop over the evaluation
data: the last batch is filled up with rows that are to count nowhere.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from run_harness import MODES, checkpoint, command  # noqa: E402
from zoo_harness import twin  # noqa: E402

from openwafer.zoo.tf.names import to_torch  # noqa: E402

NAME = "fc_mnist/tiny"
BATCH_SIZE = 50
SAVES = ["--set", "runconfig.checkpoint_steps=10", f"eval_input.batch_size={BATCH_SIZE}"]

Found = list[dict[str, float]]


def printed(name: str, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> Found:
    """The figures of the evaluations that the command prints, in order."""
    return figures(output(name, folder, capsys, *flags))


def output(name: str, folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    command(name, NAME, folder, *SAVES, *flags)
    return "".join(capsys.readouterr())


def figures(text: str) -> Found:
    lines = [line for line in text.splitlines() if "Evaluation:" in line]
    return [{k: float(v) for k, v in re.findall(r"(\w+) = ([^,\s]+)", line)} for line in lines]


def reference(folder: Path, step: int) -> dict[str, float]:
    of = twin(NAME, [f"eval_input.batch_size={BATCH_SIZE}"])
    model = of.torch_model()
    model.load_state_dict(to_torch(model, checkpoint(folder, step)))
    losses: list[float] = []
    right = total = 0
    for batch in of.evaluation:
        counts = batch["unique_ids"] >= 0
        images, labels = batch["images"][counts], batch["labels"][counts].long()
        with torch.no_grad():
            logits = model.logits(images=images)
        assert isinstance(logits, torch.Tensor)
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
        right += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    assert total % BATCH_SIZE, "the last batch is to be a smaller one"
    return {"loss": sum(losses) / len(losses), "accuracy": right / total, "global_step": step}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    command("train", NAME, folder, *SAVES, "--max_steps", "20")
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_every_checkpoint_has_the_values_of_its_weights(
    mode: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed("eval_all", trained, capsys, *MODES[mode])
    expected = [reference(trained, step) for step in (0, 10, 20)]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_one_checkpoint_and_fewer_batches(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--checkpoint_path", str(trained / "model.ckpt-10")]
    for flags in MODES.values():
        (found,) = printed("eval", trained, capsys, *given, *flags)
        assert found == pytest.approx(reference(trained, 10), rel=1e-5)
    few = [
        printed("eval", trained, capsys, "--set", "runconfig.eval_steps=3", *flags)
        for flags in MODES.values()
    ]
    assert few[1] == few[2] == [pytest.approx(few[0][0], rel=1e-5)]
    assert few[0][0]["loss"] != pytest.approx(reference(trained, 20)["loss"], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_training_ends_with_an_evaluation(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = printed("train_and_eval", tmp_path, capsys, "--max_steps", "5", *MODES[mode])
    assert found == pytest.approx(reference(tmp_path, 5), rel=1e-5)


def test_no_checkpoints_to_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        printed("eval_all", tmp_path, capsys)
    assert ending.value.code == 2
    assert "there are no checkpoints" in "".join(capsys.readouterr())


@pytest.mark.parametrize("mode", MODES)
def test_without_a_checkpoint_the_initial_weights_are_evaluated(
    mode: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that training begins with; the seed says which."""
    text = output("eval", tmp_path, capsys, *MODES[mode])
    assert f"no checkpoint in {tmp_path}: the initial weights are evaluated" in text
    (found,) = figures(text)
    assert found == pytest.approx(reference(trained, 0), rel=1e-5)
