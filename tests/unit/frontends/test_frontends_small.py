"""PyTorchBaseModel, recordings, the parameter file, and `validate` and `compile` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import openwafer
from openwafer.config.params import resolve
from openwafer.errors import CaptureError, ConfigError, UnsupportedOpError
from openwafer.frontends.torch.base_model import PyTorchBaseModel
from openwafer.frontends.torch.params_file import write_params
from openwafer.frontends.torch.recording import ModuleSummaries, SavedStream

PARAMS: dict[str, Any] = {
    "model": {"mixed_precision": True},
    "optimizer": {"optimizer_type": "Adam", "learning_rate": 0.1},
    "runconfig": {"mode": "train", "max_steps": 1},
}


class Model(PyTorchBaseModel):
    def __init__(self, params: dict[str, Any]) -> None:
        self.loss_fn = nn.MSELoss()
        self.same = model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        model[1].bias.requires_grad_(False)
        super().__init__(params, model)

    def __call__(self, data: Any) -> torch.Tensor:
        return self.loss_fn(self.model(data), data)


# ---------------------------------------------------------------- PyTorchBaseModel


def test_attributes_come_from_the_parameters() -> None:
    model = Model(PARAMS)
    assert model.mode == "train"
    assert model.mixed_precision
    assert model.allow_multireplica
    assert not Model({**PARAMS, "runconfig": {"mode": "eval"}}).allow_multireplica
    assert list(model.modules()) == ["model", "loss_fn"]
    assert model.duplicate_params_map == {"0.weight": ["1.weight"]}
    assert [name for name, _ in model.trainable_named_parameters()] == ["0.weight", "0.bias"]
    assert model.supports_mode("train_and_eval")
    assert model.supports_mode("predict")
    assert not model.supports_mode("train_and_predict")


def test_training_and_evaluation_mode() -> None:
    model = Model(PARAMS)
    model.eval()
    assert not model.model.training
    model.train()
    assert model.model[0].training


@pytest.mark.parametrize("missing", ["model", "runconfig"])
def test_a_section_that_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"no `{missing}` section"):
        Model({key: value for key, value in PARAMS.items() if key != missing})


@pytest.mark.parametrize("section", [{}, {"optimizer": {"optimizer_type": "Adam"}}])
def test_an_optimizer_section_that_is_missing_or_wrong(section: dict[str, Any]) -> None:
    params = {key: value for key, value in PARAMS.items() if key != "optimizer"} | section
    with pytest.raises(ConfigError, match="optimizer"):
        Model(params).get_optimizer()


def test_tying_after_the_move_to_the_device() -> None:
    class Tied(Model):
        def _post_device_transfer(self) -> None:
            self.model[1].bias = self.model[0].bias

    assert Tied(PARAMS).duplicate_params_map == {
        "0.weight": ["1.weight"],
        "0.bias": ["1.bias"],
    }


def test_state_goes_round() -> None:
    first, second = Model(PARAMS), Model(PARAMS)
    assert first.get_state().keys() == {"model"}
    scheduler = first.get_lr_scheduler()
    first(torch.ones(2, 4)).backward()
    first.get_optimizer().step()
    scheduler.step()
    state = first.get_state()
    assert state.keys() == {"model", "optimizer", "lr_scheduler"}
    second.set_state(state)
    again = second.get_state()
    for name, tensor in state["model"].items():
        assert torch.equal(again["model"][name], tensor)
    assert str(again["optimizer"]) == str(state["optimizer"])
    assert again["lr_scheduler"] == state["lr_scheduler"]
    assert first.get_optimizer() is first.get_optimizer()


# ---------------------------------------------------------------- recordings


def test_the_first_batches_are_saved(tmp_path: Path) -> None:
    stream = SavedStream(tmp_path / "train", 2, ordinal=3)
    batches = [{"x": torch.full((2,), float(i)), "more": [torch.tensor(i)]} for i in range(4)]
    for batch in batches:
        assert stream.on_train_batch_start(batch) is batch
    (path,) = (tmp_path / "train").iterdir()
    assert path.name == "streams.3.npz"
    with np.load(path) as arrays:
        assert set(arrays) == {f"{i}/{key}" for i in (0, 1) for key in ("['x']", "['more'][0]")}
        assert arrays["1/['x']"].tolist() == [1.0, 1.0]


def test_fewer_batches_than_asked_for_are_saved_at_the_end(tmp_path: Path) -> None:
    stream = SavedStream(tmp_path, 10, ordinal=0)
    stream.on_eval_batch_start((torch.ones(2, dtype=torch.bfloat16), "name"))
    stream.on_train_end(False)
    with np.load(tmp_path / "streams.0.npz") as arrays:
        assert set(arrays) == {"0/[0]"}
        assert arrays["0/[0]"].dtype == np.float32


def test_module_outputs_and_gradients_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    summaries = ModuleSummaries(model, tmp_path)
    x = torch.randn(4, 3)
    model(x).sum().backward()
    summaries.on_train_end(False)
    with np.load(tmp_path / "summaries" / "summaries.npz") as arrays:
        assert set(arrays) == {
            f"{module}/{what}" for module in ("model", "0", "1") for what in ("forward", "backward")
        }
        hidden = model[0](x)
        np.testing.assert_allclose(arrays["0/forward"], hidden.detach(), rtol=1e-6)
        slope = 1 - hidden.tanh().square()
        np.testing.assert_allclose(arrays["0/backward"], slope.detach(), rtol=1e-5)


# ---------------------------------------------------------------- the parameter file


def test_the_parameter_file_holds_what_was_used(tmp_path: Path) -> None:
    raw = {
        **PARAMS,
        "runconfig": {"mode": "train", "max_steps": 1, "model_dir": str(tmp_path)},
        "train_input": {"sizes": (1, 2), "path": Path("/data"), "none": None, 3: "key"},
    }
    params = resolve(raw, lambda path: ".".join(map(str, path)))
    path = write_params(params, "train")
    assert path == tmp_path / "train" / "params_train.yaml"
    assert list(path.parent.iterdir()) == [path]
    held = yaml.safe_load(path.read_text())
    assert held["optimizer"] == PARAMS["optimizer"]
    assert held["train_input"] == {"sizes": [1, 2], "path": "/data", "none": None, "3": "key"}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "train").touch()
    runconfig = {"mode": "train", "max_steps": 1, "model_dir": str(tmp_path)}
    raw = {**PARAMS, "runconfig": runconfig, "train_input": {}}
    params = resolve(raw, lambda path: ".".join(map(str, path)))
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        write_params(params, "train")
    assert str(tmp_path) in caught.value.where


# ---------------------------------------------------------------- from Python


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(x), y)


BATCH = {"x": torch.randn(4, 6), "y": torch.zeros(4, dtype=torch.int64)}


def test_validate_and_compile_say_what_the_model_is() -> None:
    report = openwafer.validate(Classifier(), BATCH)
    assert report.ok
    assert report.coverage == 1.0
    assert report.num_parameters == 6 * 8 + 8 + 8 * 3 + 3
    plan = openwafer.compile(Classifier(), BATCH, machine="tiny")
    assert plan.num_samples == 4
    assert [layer.name for layer in plan.layers] == ["net.0", "net.3"]


def test_another_batch_size_than_the_examples() -> None:
    plan = openwafer.compile(Classifier(), BATCH, machine="tiny", batch_size=32)
    assert plan.num_samples == 32
    assert BATCH["x"].shape == (4, 6)


def test_mistakes_in_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_pipeline'") as caught:
        openwafer.validate(Classifier(), BATCH, execution_mode="layer_pipeline")  # type: ignore[arg-type]
    assert "layer_pipelined" in caught.value.hint
    with pytest.raises(ConfigError, match="batch_size"):
        openwafer.compile(Classifier(), BATCH, batch_size=0)
    with pytest.raises(CaptureError):
        openwafer.validate(Classifier(), {"x": BATCH["x"]})


def test_an_operation_without_a_kernel() -> None:
    class Singular(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x).mean()

    report = openwafer.validate(Singular(), (torch.randn(2, 6),))
    assert not report.ok
    assert report.coverage < 1.0
    with pytest.raises(UnsupportedOpError):
        openwafer.compile(Singular(), (torch.randn(2, 6),))
