"""`openwafer COMMAND fc_mnist/tiny --frontend tf`, from the flags to the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import twin  # noqa: E402

from openwafer.cli import main  # noqa: E402
from openwafer.streaming.loader import BatchSequence  # noqa: E402
from openwafer.zoo.catalog import family_of, load, model_config  # noqa: E402
from openwafer.zoo.tf.functions import input_fn_of  # noqa: E402
from openwafer.zoo.tf.names import to_tf  # noqa: E402

NAME = "fc_mnist/tiny"


def command(*arguments: str, folder: Path) -> int:
    return main([*arguments, "--frontend", "tf", "--model_dir", str(folder)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert command("train", NAME, "--max_steps", "60", folder=folder) == 0
    return folder


def evaluation(folder: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert command("eval", NAME, *flags, folder=folder) == 0
    text = "".join(capsys.readouterr())
    return next(line for line in text.splitlines() if "Evaluation:" in line).split("global_step")[0]


def test_training_leaves_a_checkpoint_and_the_parameters(trained: Path) -> None:
    assert (trained / "model.ckpt-60.index").is_file()
    assert "fc_mnist/tiny" in (trained / "train" / "params_train.yaml").read_text()


def test_a_checkpoint_goes_to_pytorch_and_back(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = tmp_path / "ours.mdl", tmp_path / "back" / "model.ckpt-7"
    assert main(["convert", str(trained / "model.ckpt-60"), str(ours)]) == 0
    loaded, family = load(NAME), family_of(NAME)
    model = family.model(model_config(family, loaded.raw, loaded.locate))
    model.load_state_dict(torch.load(ours, weights_only=True)["model"])
    written = tf.train.load_checkpoint(str(trained / "model.ckpt-60"))
    for name, value in to_tf(model).items():
        np.testing.assert_array_equal(value, written.get_tensor(name))
    assert main(["convert", str(ours), str(back), "--model", NAME]) == 0
    again = tf.train.load_checkpoint(str(back))
    for name, value in to_tf(model).items():
        np.testing.assert_array_equal(value, again.get_tensor(name))
    found = [
        evaluation(trained, "--checkpoint_path", str(path), capsys=capsys)
        for path in (trained / "model.ckpt-60", back)
    ]
    assert found[0] == found[1]


def test_predictions_are_written_as_for_pytorch(trained: Path) -> None:
    assert command("predict", NAME, "--set", "runconfig.eval_steps=2", folder=trained) == 0
    lines = (trained / "predict" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["unique_id"] for row in rows] == list(range(80))
    assert all(0 <= row["prediction"] < 10 for row in rows)


def test_validate_and_compile_read_no_data(tmp_path: Path) -> None:
    absent = ["--data_dir", str(tmp_path / "absent")]
    given = ["--set", "model.image_shape=[1, 8, 8]", "model.num_classes=10"]
    assert command("validate", NAME, *absent, *given, folder=tmp_path) == 0
    assert json.loads((tmp_path / "validate.json").read_text())
    assert command("compile", NAME, *absent, *given, folder=tmp_path) == 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--num_stages", "2"], "num_stages"),
        (["--layer_compiler", "eager", "--cs_ip", "local"], "layer_compiler"),
        (["--num_csx", "2", "--cs_ip", "local"], "num_csx"),
        (["--checkpoint_path", "somewhere"], "is_pretrained_checkpoint"),
        (["--params", "lamb.yaml"], "SGD, Adam, AdamW"),
        (["--set", "optimizer.use_nesterov=True"], "use_nesterov"),
    ],
)
def test_what_tensorflow_has_not_is_refused(
    flags: list[str],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lamb.yaml").write_text("optimizer: {optimizer_type: Lamb, learning_rate: 0.1}")
    with pytest.raises(SystemExit) as ending:
        command("train", NAME, "--max_steps", "1", *flags, folder=tmp_path)
    assert ending.value.code == 2
    assert what in "".join(capsys.readouterr())


def test_the_batches_are_those_of_a_pytorch_run() -> None:
    loader = twin(NAME).train
    sequence = BatchSequence(loader, seed=5)
    expected = [batch["images"] for epoch in range(2) for batch in sequence.epoch(epoch)]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        dataset = input_fn_of(loader, seed=5, repeats=True)()
        batch = tf.compat.v1.data.make_one_shot_iterator(dataset).get_next()
        found = [session.run(batch)["images"] for _ in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
