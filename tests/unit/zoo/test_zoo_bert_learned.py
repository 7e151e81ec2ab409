"""What BERT's tiny configurations learn by one command, and fine-tuning from a pre-trained one."""

from __future__ import annotations

import pytest
import torch

from openwafer.data import build_dataset
from openwafer.zoo.catalog import load
from openwafer.zoo.run_model import run_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def metrics_of(name, model_dir):
    result = run_model("train_and_eval", [name, "--model_dir", str(model_dir)])
    assert result is not None
    assert result.evaluation is not None
    return result.evaluation.metrics


def test_classifier_beats_the_majority_by_25_points(tmp_path):
    section = load("bert_classifier/tiny").raw["eval_input"]
    majority = build_dataset("classification", section, "eval").info.majority_share
    assert 0.2 < majority < 0.4
    assert metrics_of("bert_classifier/tiny", tmp_path)["eval/accuracy"] > majority + 0.25


def test_named_entities_are_found(tmp_path):
    assert metrics_of("bert_ner/tiny", tmp_path)["eval/f1_entities"] > 0.98


@pytest.mark.parametrize("form", [[], ["--cs_ip", "local", "--execution_mode", "weight_streaming"]])
def test_fine_tuning_begins_with_the_pretrained_backbone(form, tmp_path):
    sizes = ["model.vocab_size=2048", "model.max_position_embeddings=96", "model.num_heads=4"]
    shared = ["--max_steps", "2", "--cpu", *form, "--set", *sizes, "runconfig.checkpoint_steps=2"]
    before, after = tmp_path / "bert", tmp_path / "classifier"
    run_model("train", ["bert/tiny", "-o", str(before), *shared])
    pretrained = before / "checkpoint_2.mdl"
    start = ["--checkpoint_path", str(pretrained), "--is_pretrained_checkpoint"]
    unchanged = ["optimizer.learning_rate=0.0"]
    run_model("train", ["bert_classifier/tiny", "-o", str(after), *start, *shared, *unchanged])
    first, second = (
        torch.load(path, weights_only=True)["model"]
        for path in (pretrained, after / "checkpoint_2.mdl")
    )
    backbone = [name for name in second if "backbone" in name]
    assert len(backbone) == len(second) - 2
    assert all(torch.equal(first[name], second[name]) for name in backbone)
