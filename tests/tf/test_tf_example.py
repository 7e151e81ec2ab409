"""examples/fc_mnist_tf: every command line of its run.py; its plan is that of the PyTorch twin."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")
pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

import torch  # noqa: E402

from openwafer.tf import run  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
HERE = EXAMPLES / "fc_mnist_tf"
PARAMS = HERE / "configs" / "params.yaml"


def modules_of(folder: Path, *names: str) -> Generator[list[Any]]:
    """The example's modules, which have the names of the other example's."""
    sys.path.insert(0, str(folder))
    for name in ("data", "model", "utils"):
        sys.modules.pop(name, None)
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in ("data", "model", "utils"):
            sys.modules.pop(name, None)


@pytest.fixture
def example() -> Generator[list[Any]]:
    yield from modules_of(HERE, "data", "model")


def call(example: list[Any], folder: Path, *flags: str) -> Any:
    data, model = example
    return run(
        model.model_fn,
        data.train_input_fn,
        data.eval_input_fn,
        data.set_defaults,
        predict_input_fn=data.predict_input_fn,
        argv=["--params", str(PARAMS), "--model_dir", str(folder), *flags],
    )


def test_validate_train_evaluate_predict(example: list[Any], tmp_path: Path) -> None:
    call(example, tmp_path, "--mode", "train", "--validate_only")
    assert json.loads((tmp_path / "validate.json").read_text())["ok"]
    call(example, tmp_path, "--mode", "train", "--cs_ip", "local", "--max_steps", "200")
    on_wafer = call(example, tmp_path, "--mode", "eval", "--cs_ip", "local")
    on_tensorflow = call(example, tmp_path, "--mode", "eval")
    assert on_wafer["accuracy"] > 0.9
    assert on_wafer["accuracy"] == pytest.approx(on_tensorflow["accuracy"])
    assert on_wafer["loss"] == pytest.approx(on_tensorflow["loss"], rel=1e-5)
    found = {}
    for target, flags in {"cs": ("--cs_ip", "local"), "tf": ()}.items():
        path = call(example, tmp_path, "--mode", "predict", *flags)
        assert path.name == f"predictions_{target}_0.npz"
        found[target] = dict(np.load(path))
    assert found["cs"]["logits"].shape == (256, 10)
    np.testing.assert_allclose(found["cs"]["logits"], found["tf"]["logits"], rtol=1e-4, atol=1e-5)
    assert len(call(example, tmp_path, "--mode", "eval_all", "--cs_ip", "local")) == 2


def test_the_plan_has_the_numbers_of_the_pytorch_twin(example: list[Any], tmp_path: Path) -> None:
    call(example, tmp_path / "tf", "--mode", "train", "--compile_only")
    for data, model, utils in modules_of(EXAMPLES / "fc_mnist", "data", "model", "utils"):
        import openwafer

        openwafer.run(
            model.MNISTModel,
            data.train_input_dataloader,
            data.eval_input_dataloader,
            utils.set_defaults,
            argv=[
                *("--params", str(EXAMPLES / "fc_mnist" / "configs" / "params.yaml")),
                *("--model_dir", str(tmp_path / "torch"), "--mode", "train", "--compile_only"),
            ],
        )
    plans = [plan_of(tmp_path / name) for name in ("tf", "torch")]
    assert numbers_of(plans[0]) == numbers_of(plans[1])


def test_the_pytorch_twin_gives_the_same_logits_with_the_same_weights(
    example: list[Any], tmp_path: Path
) -> None:
    flags = ("--cs_ip", "local", "--mode")
    call(example, tmp_path, *flags, "train", "--max_steps", "5")
    logits = np.load(call(example, tmp_path, *flags, "predict"))["logits"]
    weights = tf.train.load_checkpoint(str(tmp_path))
    images, _ = example[0].load(None, "eval")
    for (model,) in modules_of(EXAMPLES / "fc_mnist", "model"):
        twin = model.MNIST(64, [50] * 4, dropout=0.1, activation_fn="relu").eval()
        names = ["fc_layers", *(f"fc_layers_{i}" for i in range(1, 4)), "last_layer"]
        for layer, name in zip([*twin.fc_layers, twin.last_layer], names, strict=True):
            layer.weight.data = torch.from_numpy(weights.get_tensor(f"{name}/kernel").T.copy())
            layer.bias.data = torch.from_numpy(weights.get_tensor(f"{name}/bias"))
        with torch.no_grad():
            expected = twin(torch.from_numpy(images[:256])).numpy()
    found = torch.from_numpy(logits).log_softmax(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def plan_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("cs_*/plan.json")
    return json.loads(path.read_text())


def numbers_of(plan: dict[str, Any]) -> dict[str, Any]:
    """Everything in a plan that is a number, without names, hashes and versions."""

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [numbers(item) for item in value]
        return None if isinstance(value, str) else value

    return {key: numbers(plan[key]) for key in plan if key != "software"}


def test_mistakes_are_said_on_one_line_each(
    example: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = tmp_path / "params.yaml"
    wrong.write_text("runconfig:\n  max_stepz: 3\n  steps: many\n")
    with pytest.raises(SystemExit) as caught:
        run(
            example[1].model_fn,
            argv=["-p", str(wrong), "-o", str(tmp_path), "-m", "train", "--cs_ip", "local"],
        )
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        call(example, tmp_path, "--mode", "train", "--validate_only", "--compile_only")


def test_what_slows_an_input_pipeline(tmp_path: Path) -> None:
    from openwafer.frontends.tf.input_report import slow_spots

    def spots(make: Any) -> list[str]:
        graph = tf.Graph()
        with graph.as_default():
            make()
        return slow_spots(graph)

    def slow() -> Any:
        files = tf.data.TFRecordDataset(["a", "b"])
        return files.map(lambda x: tf.strings.length(x)).batch(2)

    def fast() -> Any:
        files = tf.data.TFRecordDataset(["a", "b"], num_parallel_reads=2)
        lengths = files.batch(2).map(tf.strings.length, num_parallel_calls=tf.data.AUTOTUNE)
        return lengths.prefetch(tf.data.AUTOTUNE)

    found = spots(slow)
    assert len(found) == 4, found
    for part in ("prefetch", "one call", "before the batching", "files"):
        assert any(part in spot for spot in found), part
    assert all(Path(__file__).name in spot for spot in found)
    assert spots(fast) == []
