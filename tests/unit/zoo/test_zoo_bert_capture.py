"""BERT's families on the kernel library: training, and evaluation with metrics and predictions; and
their example batches beside those of the data."""

from __future__ import annotations

import pytest
import torch
from bert_reference import slow
from torch import nn

import openwafer
from openwafer.data import DataInfo, build_dataset
from openwafer.frontends.torch.capture import capture_module
from openwafer.frontends.torch.metrics import PredictionWriter, forget_all_metrics
from openwafer.pipeline import validate_program
from openwafer.zoo.catalog import family_of, load

LABELS = ("O", "B-X", "I-X")
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "filter_size": 32,
    "max_position_embeddings": 12,
}
FAMILIES = {
    "bert": {"max_predictions_per_seq": 3},
    "bert_classifier": {"num_labels": 3},
    "bert_ner": {"num_classes": 3},
    "bert_qa": {},
    "bert_summarization": {"max_cls_tokens": 4},
    "linformer": {"max_predictions_per_seq": 3, "projected_dims": 4},
    "roberta": {"max_predictions_per_seq": 0},
}
MODES = ("layer_pipelined", "weight_streaming")


class Evaluation(nn.Module):
    """What a run captures in evaluation and in prediction, in one."""

    def __init__(self, model, metrics, writer):
        super().__init__()
        self.model, self.metrics, self.writer = model, metrics, writer

    def forward(self, **batch):
        logits = self.model.logits(**batch)
        self.metrics.update(logits, batch)
        rows = self.model.predictions(logits, **batch)
        self.writer(unique_ids=batch["unique_ids"], **rows)
        return self.model.loss(logits, **batch)


def on_meta(name):
    """A small model, and a batch as evaluations have it."""
    family = family_of(name)
    with torch.device("meta"):
        model = family.model(family.config(**{**SMALL, **FAMILIES[name]}))
        batch = model.example_batch(2)
        batch["unique_ids"] = torch.zeros(2, dtype=torch.int64)
    return family, model, batch


def every_operation_has_a_kernel(module, batch, *, training):
    program = capture_module(module, batch, training=training).program
    for mode in MODES:
        report = validate_program(program, mode)
        assert report.ok, str(report)
        assert report.coverage == 1.0


@pytest.mark.parametrize(
    "name",
    [name if name == "bert" else slow(name) for name in FAMILIES],
)
def test_training_runs_on_kernels_in_both_modes(name):
    _, model, batch = on_meta(name)
    every_operation_has_a_kernel(model, batch, training=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_and_prediction_run_on_kernels_in_both_modes(name, tmp_path):
    family, model, batch = on_meta(name)
    info = DataInfo(source="none", label_names=LABELS, num_classes=3)
    forget_all_metrics()
    metrics = family.metrics(model.config, info)
    evaluation = Evaluation(model, metrics, PredictionWriter(tmp_path / "predictions.jsonl"))
    every_operation_has_a_kernel(evaluation, batch, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_example_batches_are_like_those_of_the_data(name):
    raw, family = load(f"{name}/tiny").raw, family_of(name)
    of_data = build_dataset(family.task, raw["train_input"], "train").example_batch(2)
    example = openwafer.zoo.build(f"{name}/tiny").example_batch(2)
    assert kinds(example) == kinds(of_data)


@pytest.mark.slow
def test_masked_language_data_of_every_form():
    """Labels everywhere, and the documented scale of the loss."""
    options = {
        "gather_mlm_labels": (False, {"max_predictions_per_seq": 0}),
        "dynamic_mlm_scale": (True, {"mlm_loss_scaling": "precomputed_num_masked"}),
    }
    for key, (value, changes) in options.items():
        section = {**load("bert/tiny").raw["train_input"], key: value}
        of_data = build_dataset("masked_lm", section, "train").example_batch(2)
        model = openwafer.zoo.build("bert/tiny", **changes)
        assert kinds(model.example_batch(2)) == kinds(of_data)
        model(**of_data).backward()


def kinds(batch):
    return {name: (tuple(t.shape), t.dtype) for name, t in batch.items()}
