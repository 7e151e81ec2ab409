"""`openwafer train|eval|predict|validate|compile NAME`: the same run as a script's, on the zoo.

On fc_mnist/tiny, whose runs take a second, and where no data are read on GPT-2.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from openwafer.cli import main
from openwafer.data import build_dataset
from openwafer.zoo.catalog import build
from openwafer.zoo.model import AnyModel

FORMS = {
    "plain": [],
    "layer_pipelined": ["--cs_ip", "local", "--execution_mode", "layer_pipelined"],
    "weight_streaming": ["--cs_ip", "local", "--execution_mode", "weight_streaming"],
}
NAME = "fc_mnist/tiny"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a trained model."""
    folder = tmp_path_factory.mktemp("fc_mnist")
    command = ["train", NAME, "--max_steps", "40", "--batch_size", "64", "--cpu"]
    command += ["-o", str(folder), "--set", "optimizer.learning_rate=0.2", "model.dropout=0.1"]
    assert main([*command, "runconfig.checkpoint_steps=40"]) == 0
    return folder


@pytest.fixture(scope="module")
def model(model_dir: Path) -> AnyModel:
    """The same model, with the weights of the checkpoint."""
    model = build(NAME, dropout=0.1)
    contents = torch.load(model_dir / "checkpoint_40.mdl", weights_only=True)
    model.load_state_dict(contents["model"])
    return model.eval()


def test_training_leaves_the_files_of_a_run(model_dir: Path) -> None:
    params = yaml.safe_load((model_dir / "train/params_train.yaml").read_text())
    assert params["description"].partition(":")[0] == NAME
    assert params["train_input"]["batch_size"] == 64
    assert params["model"]["dropout"] == 0.1
    assert params["model"]["num_classes"] == 10  # from the data
    assert (model_dir / "performance/performance.json").is_file()


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_counts_every_sample_once(
    form: str, model_dir: Path, model: AnyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """360 samples in batches of 100: the last batch is filled up."""
    samples = build_dataset("digits", {}, "eval")
    assert len(samples) % 100
    batch = samples.batch(range(len(samples)), 0)
    logits = model.logits(**batch)
    assert isinstance(logits, torch.Tensor)
    right = (logits.argmax(-1) == batch["labels"]).float().mean()
    assert main(["eval", NAME, "--batch_size", "100", "-o", str(model_dir), *FORMS[form]]) == 0
    text = capsys.readouterr().out
    found = re.search(r"'accuracy': ([\d.]+)", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(right), abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_are_written_for_every_sample(
    form: str, model_dir: Path, model: AnyModel, tmp_path: Path
) -> None:
    samples = build_dataset("digits", {}, "predict")
    logits = model.logits(**samples.batch(range(len(samples)), 0))
    assert isinstance(logits, torch.Tensor)
    checkpoint = str(model_dir / "checkpoint_40.mdl")
    command = ["predict", NAME, "--batch_size", "100", "-o", str(tmp_path), *FORMS[form]]
    assert main([*command, "--checkpoint_path", checkpoint]) == 0
    lines = (tmp_path / "predict/predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["unique_id"] for record in records] == list(range(len(samples)))
    assert [record["prediction"] for record in records] == logits.argmax(-1).tolist()
    assert (tmp_path / "predict/params_predict.yaml").is_file()
    assert (tmp_path / "performance/performance_predict.json").is_file()


def test_nothing_is_read_or_allocated_to_validate_and_to_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no data are needed")

    monkeypatch.setattr("openwafer.data.registry.build_dataset", refuse)
    common = ["gpt2/small", "--set", "model.layers=1", "train_input.max_sequence_length=64"]
    folder = ["--batch_size", "3", "-o", str(tmp_path)]
    assert main(["validate", *common, *folder]) == 0
    report = json.loads((tmp_path / "validate.json").read_text())
    assert report["model"] == "gpt2/small"
    assert main(["compile", *common, *folder, "--execution_mode", "weight_streaming"]) == 0
    plan = next(tmp_path.glob("cs_*/plan.json")).read_text()
    assert "gpt2/small" in plan
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "fc_mnist/tyni"], "`fc_mnist/tiny`"),
        (["train"], "NAME"),
        (["train", NAME, "--mode", "eval"], "openwafer eval fc_mnist/tiny"),
        (["train", NAME, "--max_step", "3"], "`--max_steps`"),
        (["train", NAME, "--config", "x"], "--config"),
        (["train", NAME, "--set", "model.hiden_size=3"], "`hidden_size`"),
        (["train", NAME, "--set", "model.hidden_size=0", "--max_steps", "1"], "hidden_size"),
        (["train", NAME, "--batch_size", "0"], "--batch_size"),
        (["train", NAME, "--data_dir", "/nowhere"], "/nowhere"),
        (["train", NAME, "--params", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_wrong_command_is_one_error(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*argv, "-o", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_users_own_goes_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: {hidden_size: 7}\nrunconfig: {max_steps: 2, checkpoint_steps: 2}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", NAME, "--params", str(own), "--set", "model.depth=1"]) == 0
    state = torch.load(tmp_path / f"runs/{NAME}/checkpoint_2.mdl", weights_only=True)["model"]
    assert [tuple(weight.shape) for weight in state.values()] == [(7, 64), (7,), (10, 7), (10,)]


def test_help_lists_the_flags_of_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: openwafer train")
    for flag in ("--set", "--data_dir", "--batch_size", "--cs_ip", "--checkpoint_path", "NAME"):
        assert flag in text
    assert main([]) == 0
    assert "predict" in capsys.readouterr().out
