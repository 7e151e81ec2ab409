"""A converted checkpoint measures and predicts in TensorFlow as in PyTorch.

The reference is the PyTorch twin in a plain loop over the same batches; its metrics are compared
with published implementations elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from test_zoo_gpt2 import SMALL  # noqa: E402
from training_harness import MODES  # noqa: E402
from zoo_harness import Twin, twin  # noqa: E402

from openwafer.frontends.torch.metrics import (  # noqa: E402
    compute_all_metrics,
    forget_all_metrics,
)
from openwafer.streaming.loader import BatchSequence  # noqa: E402
from openwafer.tf import CerebrasEstimator, CSRunConfig  # noqa: E402
from openwafer.zoo.catalog import data_info, load  # noqa: E402
from openwafer.zoo.conversion import params_path, write_params  # noqa: E402
from openwafer.zoo.convert_tf import convert_tf  # noqa: E402
from openwafer.zoo.model import AnyModel, Batch  # noqa: E402
from openwafer.zoo.tf.functions import input_fn_of, model_fn_of  # noqa: E402

BATCHES = 4
WITH_TEXT = {
    "bert_ner/tiny": {"eval/f1_labels", "eval/f1_entities"},
    "bert_qa/tiny": {"eval/f1"},
    "bert_summarization/tiny": {"eval/rouge1", "eval/rouge2", "eval/rougeL"},
    "gpt2/tiny": {"eval/bits_per_byte", "eval/gzip_bits_per_byte"},
}
"""Metrics that need the data's words, and are not 0 of a model that guesses."""

OVERRIDES = {
    "gpt2/tiny": SMALL,
    "gpt3/tiny": SMALL,
    "gptj/tiny": [*SMALL, "model.rotary_dim=4"],
}
LONG = ("bert/tiny", "roberta/tiny", "linformer/tiny", "gpt3/tiny", "bert_classifier/tiny")
"""Of these, what differs from the families that are always tested is compared elsewhere too."""

NAMES = [
    *("bert_ner/tiny", "bert_qa/tiny", "bert_summarization/tiny", "fc_mnist/tiny", "gpt2/tiny"),
    *("gptj/tiny", "t5/tiny", "transformer/tiny", "unet/tiny"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in LONG),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A model with weights of no training, and the folder with its TensorFlow checkpoint."""

    name: str
    of: Twin
    model: AnyModel
    info: Any
    checkpoint: Path

    def batches(self) -> list[Batch]:
        return list(islice(BatchSequence(self.of.evaluation, seed=1).epoch(0), BATCHES))

    def estimator(self, folder: Path, **config: Any) -> Any:
        model_fn = model_fn_of(self.of.family, self.of.config, info=self.info)
        return CerebrasEstimator(model_fn, model_dir=str(folder), config=CSRunConfig(**config))

    def input_fn(self) -> Any:
        return input_fn_of(self.of.evaluation, seed=1, repeats=False)


@pytest.fixture(scope="module", params=NAMES)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    name, folder = request.param, tmp_path_factory.mktemp("converted")
    overrides = OVERRIDES.get(name, [])
    of = twin(name, overrides)
    model = of.torch_model()
    with torch.no_grad():  # so that what it predicts is not one class
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    source = folder / "model.mdl"
    torch.save({"model": model.state_dict()}, source)
    write_params(params_path(source), of.family, of.config)
    checkpoint = folder / "tf" / "model.ckpt-0"
    convert_tf(source, checkpoint, None, None)
    info = data_info(of.family, load(name, overrides).raw, "eval_input")
    return Converted(name=name, of=of, model=model, info=info, checkpoint=checkpoint)


def torch_metrics(of: Converted) -> Mapping[str, float]:
    forget_all_metrics()
    metrics, losses = of.of.family.metrics(of.of.config, of.info), []
    with torch.no_grad():
        for batch in of.batches():
            logits = of.model.logits(**batch)
            metrics.update(logits, batch)
            losses.append(float(of.model.loss(logits, **batch)))
    return {**compute_all_metrics(), "loss": float(np.mean(losses))}


def check_metrics(of: Converted, found: Mapping[str, Any]) -> None:
    expected = torch_metrics(of)
    assert found.keys() - {"global_step"} == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-9, err_msg=key)
    for key in WITH_TEXT.get(of.name, set()):
        assert expected[key] > 0, key


def test_metrics_are_those_of_pytorch(converted: Converted, tmp_path: Path) -> None:
    estimator = converted.estimator(tmp_path)
    # Twice: each evaluation begins anew.
    for _ in range(2):
        found = estimator.evaluate(
            converted.input_fn(), BATCHES, checkpoint_path=str(converted.checkpoint)
        )
        check_metrics(converted, found)


def test_predictions_are_those_of_pytorch(converted: Converted, tmp_path: Path) -> None:
    batches = converted.batches()
    found = converted.estimator(tmp_path).predict(
        converted.input_fn(),
        checkpoint_path=str(converted.checkpoint),
        yield_single_examples=False,
    )
    for batch, ours in zip(batches, islice(found, BATCHES), strict=True):
        with torch.no_grad():
            theirs = converted.model.predictions(converted.model.logits(**batch), **batch)
        np.testing.assert_array_equal(ours.pop("unique_ids"), batch["unique_ids"])
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].shape == value.shape
            if value.is_floating_point():
                np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
            else:
                np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_runs_measure_the_same(converted: Converted, tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(converted.checkpoint.parent, folder)
    found = converted.estimator(folder, **MODES[mode]).evaluate(
        converted.input_fn(), BATCHES, use_cs=True
    )
    check_metrics(converted, found)
