"""Checkpoints in every form that Hugging Face folders have, and broken ones. That the converted
models compute the same is tested by family."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import openwafer.zoo.convert
import openwafer.zoo.hf_folder
from openwafer.cli import main
from openwafer.errors import CheckpointError, ConfigError, OpenWaferError
from openwafer.zoo.bert.torch_model import Bert, BertConfig
from openwafer.zoo.convert import convert, from_pretrained
from openwafer.zoo.gpt2.torch_model import GPT2, GPT2Config
from openwafer.zoo.model import AnyModel

safetensors_torch = pytest.importorskip("safetensors.torch")

GPT = GPT2Config(
    vocab_size=30,
    max_position_embeddings=8,
    hidden_size=12,
    num_hidden_layers=2,
    num_heads=2,
    filter_size=20,
)
BERT = BertConfig(
    vocab_size=30,
    max_position_embeddings=8,
    hidden_size=12,
    num_hidden_layers=1,
    num_heads=2,
    filter_size=20,
)


def checkpoint(model: AnyModel, folder: Path, family: str) -> Path:
    path = folder / "ours.mdl"
    torch.save({"model": model.state_dict()}, path)
    described = {"description": f"{family}: of a test", "model": asdict(model.config)}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(described))
    return path


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(1)
    return GPT2(GPT)


@pytest.fixture
def hf(model: GPT2, tmp_path: Path) -> Path:
    """A Hugging Face folder with one safetensors file."""
    convert(checkpoint(model, tmp_path, "gpt2"), tmp_path / "hf")
    return tmp_path / "hf"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors_torch.load_file(folder / "model.safetensors")


def replace_by_bin(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def replace_by_two_bins(folder: Path) -> None:
    tensors = list(tensors_of(folder).items())
    files = {"a.bin": dict(tensors[:5]), "b.bin": dict(tensors[5:])}
    for file, part in files.items():
        torch.save(part, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    safetensors_torch.save_file(tensors, folder / "model.safetensors")


def drop_the_first_part_of_names(folder: Path) -> None:
    save(folder, {n.removeprefix("transformer."): t for n, t in tensors_of(folder).items()})


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the conversion warned of."""
    said: list[str] = []
    monkeypatch.setattr(
        openwafer.zoo.convert._log, "warning", lambda text, *given: said.append(text % given)
    )
    return said


def test_a_tensor_that_is_not_used_is_said(hf: Path, tmp_path: Path, warnings: list[str]) -> None:
    save(hf, {**tensors_of(hf), "transformer.extra.weight": torch.zeros(3)})
    convert(hf, tmp_path / "again.mdl")
    assert warnings == ["1 tensors are not used: transformer.extra.weight"]


def add_what_holds_nothing(folder: Path) -> None:
    mask = torch.ones(1, 1, 8, 8)
    extra = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": mask.clone()}
    save(folder, {**tensors_of(folder), **extra, "lm_head.weight": torch.ones(30, 12)})


@pytest.mark.parametrize(
    "change",
    [
        replace_by_bin,
        replace_by_two_bins,
        drop_the_first_part_of_names,
        add_what_holds_nothing,
    ],
)
def test_every_form_is_read(
    change: Callable[[Path], None],
    hf: Path,
    model: GPT2,
    tmp_path: Path,
    warnings: list[str],
) -> None:
    change(hf)
    convert(hf, tmp_path / "again.mdl")
    state = torch.load(tmp_path / "again.mdl", weights_only=True)["model"]
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name
    assert not warnings
    loaded = from_pretrained(hf)
    assert isinstance(loaded, GPT2)
    assert loaded.lm_head.weight is loaded.get_parameter("embedding_layer.word_embeddings.weight")


def test_several_files_are_written_and_read(
    model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openwafer.zoo.hf_folder, "MAX_FILE_BYTES", 3000)
    convert(checkpoint(model, tmp_path, "gpt2"), tmp_path / "hf")
    files = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert len(files) > 4
    assert "model.safetensors.index.json" in files
    assert not [file for file in files if file.startswith("part")]
    again = from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_half_precision_becomes_float32(hf: Path, tmp_path: Path) -> None:
    save(hf, {name: tensor.half() for name, tensor in tensors_of(hf).items()})
    convert(hf, tmp_path / "again.mdl")
    state = torch.load(tmp_path / "again.mdl", weights_only=True)["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_names_of_the_first_bert_checkpoints_and_another_head(
    tmp_path: Path, warnings: list[str]
) -> None:
    torch.manual_seed(2)
    model = Bert(BERT)
    convert(checkpoint(model, tmp_path, "bert"), tmp_path / "hf")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors_of(tmp_path / "hf").items()
    }
    assert any("gamma" in name for name in old)
    save(tmp_path / "hf", old)
    ours = model.state_dict()
    again = from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in ours.items())

    result = convert(tmp_path / "hf", tmp_path / "head.mdl", model="bert_classifier/base_sst2")
    assert result.left_out == ("classifier.weight", "classifier.bias")
    assert "to be trained: classifier.weight" in str(result)
    classifier = from_pretrained(tmp_path / "hf", "bert_classifier").state_dict()
    assert [text for text in warnings if "initial values" in text and "classifier.bias" in text]
    shared = [name for name in classifier if name.startswith("backbone.")]
    assert len(shared) > 15
    assert all(torch.equal(classifier[name], ours[name]) for name in shared)


def unknown_architecture(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModle"]}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_without_a_key(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "n_layer"}))


def scaled_differently(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scale_attn_by_inverse_layer_idx": True}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def without_a_tensor(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save(folder, tensors)


def with_a_wrong_shape(folder: Path) -> None:
    save(folder, {**tensors_of(folder), "transformer.wpe.weight": torch.zeros(9, 12)})


def with_an_index_that_leaves_the_folder(folder: Path) -> None:
    index = {"weight_map": {"transformer.wte.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("exploded",)  # type: ignore[return-value]


def with_code_in_it(folder: Path) -> None:
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (unknown_architecture, "did you mean `GPT2LMHeadModel`"),
        (no_config, "there is no config.json"),
        (broken_config, "cannot be read"),
        (config_without_a_key, "'n_layer'"),
        (scaled_differently, "scale_attn_by_inverse_layer_idx"),
        (no_weights, "no weights"),
        (cut_short, "cannot be read"),
        (without_a_tensor, "no `transformer.h.1.mlp.c_fc.bias`"),
        (with_a_wrong_shape, "position_embeddings.weight"),
        (with_an_index_that_leaves_the_folder, "../../secret"),
        (with_code_in_it, "could run code"),
    ],
)
def test_a_broken_folder_is_explained_and_nothing_is_written(
    breaking: Callable[[Path], None],
    message: str,
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    breaking(hf)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OpenWaferError) as caught:
        convert(hf, tmp_path / "again.mdl")
    assert message in str(caught.value)
    assert caught.value.where
    assert sorted(tmp_path.iterdir()) == before


def test_targets_and_sources_that_cannot_be(hf: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.mdl"
    with pytest.raises(CheckpointError, match="there already"):
        convert(ours, hf)
    with pytest.raises(CheckpointError, match="is a file"):
        convert(hf, tmp_path / "again")
    with pytest.raises(CheckpointError, match="no such"):
        convert(tmp_path / "nothing", tmp_path / "again.mdl")
    ours.write_bytes(ours.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        convert(ours, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_which_model_one_of_our_checkpoints_is_of(model: GPT2, tmp_path: Path) -> None:
    ours = checkpoint(model, tmp_path, "gpt2")
    params = tmp_path / "elsewhere.yaml"
    ours.with_suffix(".yaml").rename(params)
    with pytest.raises(ConfigError, match="which model"):
        convert(ours, tmp_path / "hf")
    with pytest.raises(ConfigError, match="no model 'gtp2/small'"):
        convert(ours, tmp_path / "hf", model="gtp2/small")
    with pytest.raises(CheckpointError, match="word_embeddings") as caught:
        convert(ours, tmp_path / "hf", model="gpt2/small")
    assert "[50257, 768]" in caught.value.allowed
    assert convert(ours, tmp_path / "hf", params=params).family == "gpt2"
    # The parameters that a run leaves beside its checkpoints.
    (tmp_path / "train").mkdir()
    params.rename(tmp_path / "train/params_train.yaml")
    assert convert(ours, tmp_path / "hf2").num_tensors == len(tensors_of(tmp_path / "hf"))


def test_a_family_without_a_counterpart(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no counterpart") as caught:
        convert(hf, tmp_path / "x.mdl", model="unet/tiny")
    assert "gpt2" in caught.value.allowed


def test_the_command(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(hf), str(tmp_path / "again.mdl")]) == 0
    said = capsys.readouterr().out
    assert "--is_pretrained_checkpoint" in said
    assert str(tmp_path / "again.yaml") in said
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "x.mdl")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.slow  # trains three times
def test_fine_tuning_from_pre_training_and_from_a_converted_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max_steps", "2", "--batch_size", "4", "--cpu"]
    sizes = [f"model.{key}" for key in ("hidden_size=32", "num_heads=2", "filter_size=64")]
    settings = ["--set", *sizes, "model.max_position_embeddings=96", "runconfig.checkpoint_steps=2"]
    pretrained = ["train", "bert/tiny", *few, "-o", str(tmp_path / "pre"), *settings]
    data = ["train_input.vocab_size=2048", "train_input.max_sequence_length=96"]
    assert main([*pretrained, *data]) == 0
    ours = tmp_path / "pre/checkpoint_2.mdl"
    assert main(["convert", str(ours), str(tmp_path / "hf")]) == 0
    back = tmp_path / "back.mdl"
    command = ["convert", str(tmp_path / "hf"), str(back), "--model", "bert_classifier"]
    assert main(command) == 0
    outputs: list[dict[str, Tensor]] = []
    for number, given in enumerate((ours, back)):
        folder = tmp_path / f"tuned{number}"
        capsys.readouterr()
        tuned = ["train", "bert_classifier/tiny", *few, "-o", str(folder), *settings, *data]
        start = ["--checkpoint_path", str(given), "--is_pretrained_checkpoint"]
        assert main([*tuned[: -len(settings) - len(data)], *start, *settings, *data]) == 0
        said = capsys.readouterr().out
        assert "weights taken over" in said
        outputs.append(torch.load(folder / "checkpoint_2.mdl", weights_only=True)["model"])
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
