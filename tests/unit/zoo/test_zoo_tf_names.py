"""Names and layouts of TensorFlow variables; no TensorFlow is needed."""

from __future__ import annotations

import pytest
import torch

from openwafer.cli import main
from openwafer.zoo import build
from openwafer.zoo.catalog import families, names
from openwafer.zoo.tf.names import counterparts, to_tf, to_torch

SMALLEST = [next(n for n in names() if n.startswith(f"{family}/")) for family in families()]


@pytest.mark.parametrize("name", SMALLEST)
def test_names_are_unique_and_every_weight_has_one(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    found = counterparts(model)
    assert len({each.name for each in found}) == len(found)
    assert not [each.name for each in found if "." in each.name]
    assert sorted(key for each in found for key in each.keys) == sorted(model.state_dict())


@pytest.mark.parametrize("name", [name for name in names() if name.endswith("/tiny")])
def test_values_come_back(name: str) -> None:
    model = build(name)
    back = to_torch(model, to_tf(model))
    state = model.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_what_the_rule_says() -> None:
    found = {each.keys[0]: each for each in counterparts(build("unet/tiny"))}
    upscale = found["decoder.0.upscale.weight"]
    assert (upscale.name, upscale.axes) == ("decoder/0/upscale/kernel", (2, 3, 1, 0))
    tokens = next(iter(counterparts(build("gpt2/tiny"))))
    assert tokens.name == "embedding_layer/word_embeddings/embeddings"
    assert tokens.keys == ("embedding_layer.word_embeddings.weight", "lm_head.weight")


def test_batch_statistics_are_variables() -> None:
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    found = {each.name: each.trained for each in counterparts(norm)}
    assert found == {"0/gamma": True, "0/beta": True, "0/moving_mean": False} | {
        "0/moving_variance": False
    }


def test_without_tensorflow_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib
    import sys

    for module in [m for m in sys.modules if m.startswith("openwafer.") and ".tf" in m]:
        monkeypatch.delitem(sys.modules, module)
    really = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name == "tensorflow":
            raise ImportError("No module named 'tensorflow'")
        return really(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["train", "gpt2/tiny", "--frontend", "tf"]) == 2
    assert "openwafer[tf]" in capsys.readouterr().err
