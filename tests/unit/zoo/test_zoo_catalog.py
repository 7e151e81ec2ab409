"""The catalog: names, merging with places, overrides, building, the listing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import openwafer.zoo as zoo
from openwafer.cli import main
from openwafer.config.params import merge_flags, resolve
from openwafer.config.yaml_file import parse_value
from openwafer.errors import ConfigError
from openwafer.zoo.catalog import (
    Override,
    families,
    family_of,
    full_name,
    load,
    model_config,
    names,
)
from openwafer.zoo.listing import entries
from openwafer.zoo.outline import count_parameters, outline

MODES = ("train", "eval", "predict")


def test_every_name_has_whole_checked_parameters() -> None:
    """All sections, valid keys of every input, an optimizer, and an end of training."""
    for name in names():
        family, loaded = family_of(name), load(name)
        assert family.name == name.partition("/")[0]
        for mode in MODES:
            merged = merge_flags(load(name).raw, loaded.locate, {"mode": mode}, environ={})
            params = resolve(merged.raw, merged.locate)
            assert params.optimizer is not None
            assert params.runconfig.max_steps, name
            assert merged.raw[f"{mode}_input"]["batch_size"] > 0


def test_names_and_aliases() -> None:
    assert len(names()) == len(set(names())) >= 50
    assert full_name("gpt3/1.3b") == "gpt3/xl"
    assert full_name("bert/base") == "bert/base_msl128"
    assert family_of("gpt2").name == "gpt2"
    assert set(families()) >= {"bert", "gpt2", "gpt3", "gptj", "t5", "transformer", "unet"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpt2/smal", "`gpt2/small`"),
        ("gtp2/small", "`gpt2/small`"),
        ("brt/base_msl128", "`bert/base_msl128`"),
        ("nothing/like/it", "`openwafer zoo`"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="no model") as caught:
        zoo.build(name)
    assert hint in caught.value.hint


def test_later_sources_win_and_every_key_has_its_place(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model:\n  layers: 3\n  dropout_rate: 0.3\nrunconfig:\n  log_steps: 7\n")
    loaded = load(
        "gpt2/small",
        ["model.num_heads=6", "train_input.batch_size = 5", "runconfig.eval_steps=null"],
        params_path=own,
    )
    model = loaded.raw["model"]
    assert (model["num_hidden_layers"], model["num_heads"], model["hidden_size"]) == (3, 6, 768)
    assert "layers" not in model
    assert loaded.raw["train_input"]["batch_size"] == 5
    assert loaded.raw["runconfig"]["log_steps"] == 7
    assert loaded.raw["runconfig"]["eval_steps"] is None
    assert loaded.locate(("model", "num_hidden_layers")) == f"{own}:2"
    assert loaded.locate(("model", "num_heads")) == "--set model.num_heads=6"
    assert "gpt2/configs/small.yaml:" in loaded.locate(("model", "hidden_size"))
    assert "gpt2/configs/defaults.yaml:" in loaded.locate(("model", "nonlinearity"))
    assert "gpt2/configs/defaults.yaml:" in loaded.locate(("predict_input", "batch_size"))


def test_loading_twice_gives_dictionaries_of_their_own() -> None:
    load("gpt2/xl").raw["optimizer"]["learning_rate"][0]["steps"] = 1
    assert load("gpt2/xl").raw["optimizer"]["learning_rate"][0]["steps"] == 30838


def test_inside_of_a_key_and_another_optimizer(tmp_path: Path) -> None:
    loaded = load("gpt2/xl", ["optimizer.learning_rate.1.decay_steps=9"])
    assert loaded.raw["optimizer"]["learning_rate"][1]["decay_steps"] == 9
    assert loaded.raw["optimizer"]["learning_rate"][0]["scheduler"] == "Linear"
    own = tmp_path / "own.yaml"
    own.write_text("optimizer: {optimizer_type: SGD, momentum: 0.9, learning_rate: 0.1}")
    optimizer = load("gpt2/small", params_path=own).raw["optimizer"]
    assert optimizer == {"optimizer_type": "SGD", "momentum": 0.9, "learning_rate": 0.1}
    own.write_text("optimizer: {optimizer_type: adamw, learning_rate: 0.1}")
    assert "beta1" in load("gpt2/small", params_path=own).raw["optimizer"]


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("model.layerz=3", "unknown key `model.layerz`", "`layers`"),
        ("modle.layers=3", "unknown section `modle`", "`model`"),
        ("layers=3", "names no key", "`model.layers`"),
        ("model.layers", "sets nothing", ""),
        ("=3", "sets nothing", ""),
        ("model.layers=[", "not valid YAML", ""),
        ("optimizer.learning_rate.9.steps=3", "no `9`", ""),
        ("optimizer.learning_rate.steps=3", "no `steps`", ""),
        ("train_input.batch_sise=3", "unknown key `train_input.batch_sise`", "`batch_size`"),
    ],
)
def test_a_wrong_override(override: str, what: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("gpt2/xl", [override])
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert "--set" in caught.value.where or "command line" in caught.value.where


def test_a_key_that_another_room_checks_is_refused_with_its_place() -> None:
    loaded = load("gpt2/small", ["runconfig.max_step=4", "optimizer.epsilon=1e-6"])
    with pytest.raises(ConfigError) as caught:
        resolve(loaded.raw, loaded.locate)
    assert "--set runconfig.max_step=4" in str(caught.value)
    assert "did you mean `max_steps`?" in str(caught.value)
    assert "--set optimizer.epsilon=1e-6" in str(caught.value)


def test_build_takes_short_and_long_names() -> None:
    with torch.device("meta"):
        model = zoo.build("gpt2/small", layers=1, heads=4, vocab_size=100)
    config = model.config
    assert (config.num_hidden_layers, config.num_heads) == (1, 4)  # type: ignore[attr-defined]
    assert all(weight.is_meta for weight in model.parameters())
    with pytest.raises(ConfigError, match="unknown key") as caught:
        zoo.build("gpt2/small", layer=1)
    assert "build('gpt2/small', layer=1)" in caught.value.where
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        zoo.build("gpt2/small", layers=0)


def test_what_the_files_leave_open_comes_from_the_data() -> None:
    where = Override("train_input.tokenizer", "byte", "a test")
    family = family_of("gpt2")
    loaded = load("gpt2/tiny", [where, "train_input.vocab_size=null"])
    config = model_config(family, loaded.raw, loaded.locate)
    assert 256 <= config.vocab_size < 300  # type: ignore[attr-defined]
    assert config.max_position_embeddings == 128  # type: ignore[attr-defined]
    with torch.device("meta"):
        assert outline(family, config).num_parameters > 0


def test_values_are_yaml() -> None:
    assert parse_value("1e-3") == 0.001
    assert parse_value("[3, 4]") == [3, 4]
    assert parse_value("true") is True
    assert parse_value("") is None
    assert parse_value("gelu") == "gelu"


def test_the_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "gpt2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["name"] == "gpt2/tiny"
    xl = next(entry for entry in found if entry["name"] == "gpt2/xl")
    assert xl == {
        "name": "gpt2/xl",
        "parameters": 1557611200,
        "sequence_length": 1024,
        "execution_mode": "weight_streaming",
        "title": "GPT-2, causal language model",
    }
    assert main(["zoo", "gpt2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(found)
    assert "124,439,808" in next(line for line in lines if line.startswith("gpt2/small"))


DEEP = "bert/base fc_mnist/base gpt2/small gptj/6b linformer/base_shared_kv t5/small"


@pytest.mark.parametrize("name", [*DEEP.split(), "transformer/base", "unet/dagm"])
def test_layers_are_counted_as_if_they_were_built(name: str) -> None:
    family, loaded = family_of(name), load(name)
    config = model_config(family, loaded.raw, loaded.locate)
    depths = {key: depth for depth, key in enumerate(config.SHORT.get("layers", ()), start=3)}
    config = replace(config, **depths)
    assert count_parameters(family, config) == outline(family, config).num_parameters


@pytest.mark.slow  # several seconds
def test_the_listing_counts_what_a_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    listed = {entry.name: entry.parameters for entry in entries()}
    assert set(listed) == set(names())
    for name, count in listed.items():
        with torch.device("meta"):
            assert zoo.build(name).num_parameters == count, name
    assert main(["zoo", "nothing"]) == 2
