"""A run goes on in the other framework, from a converted checkpoint.

The reference is ten steps of PyTorch in one go.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from test_zoo_gpt2 import SMALL  # noqa: E402
from training_harness import Losses  # noqa: E402
from zoo_harness import ADAMW, MOMENTUM, Twin, twin  # noqa: E402

from openwafer.errors import CheckpointError  # noqa: E402
from openwafer.optim.build import build_optimizer, set_learning_rate  # noqa: E402
from openwafer.optim.schedule import learning_rate_at  # noqa: E402
from openwafer.optim.state import (  # noqa: E402
    from_torch_state_dict,
    load_optimizer_state,
    optimizer_state,
    to_torch_state_dict,
)
from openwafer.streaming.loader import BatchSequence  # noqa: E402
from openwafer.tf import CerebrasEstimator, CSRunConfig  # noqa: E402
from openwafer.train.checkpoint import from_contents  # noqa: E402
from openwafer.zoo.conversion import ConversionResult, params_path, write_params  # noqa: E402
from openwafer.zoo.convert_tf import convert_tf  # noqa: E402
from openwafer.zoo.model import AnyModel, Batch  # noqa: E402
from openwafer.zoo.tf.functions import input_fn_of  # noqa: E402
from openwafer.zoo.tf.names import counterparts  # noqa: E402

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {
        **ADAMW,
        "learning_rate": [
            {
                "scheduler": "Linear",
                "initial_learning_rate": 0.0,
                "end_learning_rate": 1e-3,
                "steps": 8,
            }
        ],
    },
    "adamw without correction": {**ADAMW, "correct_bias": False},
    "adam": {"optimizer_type": "Adam", "learning_rate": 1e-3},
    "momentum": MOMENTUM,
    "sgd": {"optimizer_type": "SGD", "learning_rate": 0.05},
    "rmsprop": {
        "optimizer_type": "RMSprop",
        "as_tensorflow": True,
        "momentum": 0.5,
        "learning_rate": 1e-3,
    },
}


class TorchRun:
    """A plain loop over a model's batches, from any step on."""

    def __init__(self, of: Twin) -> None:
        self.of, self.step = of, 0
        self.model: AnyModel = of.torch_model().train()
        self.optimizer = build_optimizer(of.optimizer, dict(self.model.named_parameters()))

    def train(self, steps: int) -> list[float]:
        losses: list[float] = []
        for batch in batches(self.of, self.step, steps):
            set_learning_rate(
                self.optimizer, learning_rate_at(self.of.optimizer.learning_rate, self.step)
            )
            self.optimizer.zero_grad()
            loss = self.model(**batch)
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss))
            self.step += 1
        return losses

    @property
    def names(self) -> list[str]:
        return list(dict(self.model.named_parameters()))

    def save(self, path: Path, **more: Any) -> None:
        state = optimizer_state(self.optimizer)
        contents = {
            "model": self.model.state_dict(),
            "optimizer": to_torch_state_dict(self.of.optimizer, self.names, state),
            "global_step": self.step,
            **more,
        }
        torch.save(contents, path)
        write_params(params_path(path), self.of.family, self.of.config)

    def load(self, path: Path) -> None:
        contents = torch.load(path, weights_only=True)
        self.model.load_state_dict(contents["model"])
        self.step = contents["global_step"]
        if next(iter(self.optimizer.state.values())):
            state = from_torch_state_dict(self.of.optimizer, self.names, contents["optimizer"])
            load_optimizer_state(self.optimizer, None, state)


def batches(of: Twin, first: int, count: int) -> list[Batch]:
    sequence, found = BatchSequence(of.train, seed=1), []
    epoch = 0
    while len(found) < first + count:
        found += list(sequence.epoch(epoch))
        epoch += 1
    return found[first : first + count]


def tf_run(of: Twin, folder: Path, steps: int) -> list[float]:
    hook = Losses()
    config = CSRunConfig(tf_random_seed=1)
    CerebrasEstimator(of.model_fn(), model_dir=str(folder), config=config).train(
        input_fn_of(of.train, seed=1, repeats=True), steps=steps, hooks=[hook]
    )
    return hook.values


def weights(of: Twin, folder: Path) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(folder))
    return {
        each.keys[0]: each.to_torch(reader.get_tensor(each.name))
        for each in counterparts(of.torch_model())
    }


def check_there_and_back(of: Twin, folder: Path) -> None:
    """Ten steps in one go; five in PyTorch and five in TensorFlow; and two more in PyTorch."""
    whole = TorchRun(of)
    expected = whole.train(12)
    begun = TorchRun(of)
    begun.train(5)
    begun.save(folder / "five.mdl")
    result = convert_tf(folder / "five.mdl", folder / "tf" / "model.ckpt-5", None, None)
    assert result.has_optimizer, result
    np.testing.assert_allclose(tf_run(of, folder / "tf", 5), expected[5:10], rtol=1e-5)
    result = convert_tf(
        folder / "tf" / "model.ckpt-10", folder / "ten.mdl", None, params_path(folder / "five.mdl")
    )
    ended = TorchRun(of)
    ended.load(folder / "ten.mdl")
    assert ended.step == 10
    np.testing.assert_allclose(ended.train(2), expected[10:], rtol=1e-5)
    for name, value in whole.model.state_dict().items():
        np.testing.assert_allclose(
            ended.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_in_tensorflow_and_back(tmp_path: Path, name: str) -> None:
    check_there_and_back(twin("fc_mnist/tiny", optimizer=OPTIMIZERS[name]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"), [("gpt2/tiny", SMALL), ("unet/tiny", ()), ("t5/tiny", ())]
)
def test_other_layouts_of_weights(tmp_path: Path, name: str, overrides: list[str]) -> None:
    """Tied ones, and those of convolutions."""
    check_there_and_back(twin(name, overrides), tmp_path)


def converted(of: Twin, folder: Path, step: int = 1, **more: Any) -> ConversionResult:
    run = TorchRun(of)
    run.train(1)
    run.save(folder / "one.mdl", **more)
    return convert_tf(folder / "one.mdl", folder / "tf" / f"model.ckpt-{step}", None, None)


def names_in(folder: Path) -> set[str]:
    return set(tf.train.load_checkpoint(str(folder)).get_variable_to_shape_map())


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer_type": "Lamb", "learning_rate": 1e-3},
        {"optimizer_type": "Adafactor", "learning_rate": 1e-3},
        {"optimizer_type": "RMSprop", "momentum": 0.5, "learning_rate": 1e-3},
        {"optimizer_type": "Adam", "amsgrad": True, "learning_rate": 1e-3},
        {"optimizer_type": "RAdam", "learning_rate": 1e-3},
    ],
    ids=lambda options: options["optimizer_type"] + ("+" if "amsgrad" in options else ""),
)
def test_state_without_a_counterpart_is_said(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    of = twin("fc_mnist/tiny", optimizer=optimizer)
    result = converted(of, tmp_path)
    assert not result.has_optimizer
    (said,) = [line for line in str(result).splitlines() if "begins anew" in line]
    assert "no counterpart" in said
    assert "--is_pretrained_checkpoint" in str(result)
    variables = {each.name for each in counterparts(of.torch_model())}
    assert names_in(tmp_path / "tf") == {*variables, "global_step"}


def test_state_of_another_step_is_left_out(tmp_path: Path) -> None:
    result = converted(twin("fc_mnist/tiny"), tmp_path, step=7)
    assert "of step 1, and the target's name says 7" in str(result)


def test_a_loss_scale_is_converted_both_ways(tmp_path: Path) -> None:
    scale = {"scale": 2.0**20, "num_steps": 17.0, "num_overflows": 3.0}
    assert converted(twin("fc_mnist/tiny"), tmp_path, amp=scale).has_optimizer
    reader = tf.train.load_checkpoint(str(tmp_path / "tf"))
    found = {
        name: reader.get_tensor(name)
        for name in ("current_loss_scale", "good_steps", "overflow_steps")
    }
    assert [float(value) for value in found.values()] == list(scale.values())
    assert [value.dtype for value in found.values()] == [np.float32, np.int64, np.int64]
    back = tmp_path / "back.mdl"
    convert_tf(tmp_path / "tf" / "model.ckpt-1", back, "fc_mnist/tiny", None)
    contents = torch.load(back, weights_only=True)
    assert from_contents(contents, None, where="back.mdl").state.loss_scale == scale


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    converted(twin("fc_mnist/tiny"), tmp_path)
    params_path(tmp_path / "tf" / "model.ckpt-1").unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        convert_tf(tmp_path / "tf" / "model.ckpt-1", tmp_path / "x.mdl", "t5/tiny", None)
    assert not (tmp_path / "x.mdl").exists()
