"""Weights of transformers' BertForSequenceClassification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openwafer.zoo.bert.weights import (
    backbone_config_from,
    backbone_config_to,
    backbone_rules,
    head_dropout_from,
    linear_rules,
    num_labels_from,
    num_labels_to,
)
from openwafer.zoo.bert_classifier.torch_model import BertClassifierConfig
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap

__all__ = ["WEIGHTS"]


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*backbone_rules("bert", with_pooler=True), *linear_rules("classifier", "classifier"))


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    ours = {**backbone_config_from(theirs), "num_labels": num_labels_from(theirs)}
    return {**ours, "task_dropout": head_dropout_from(theirs)}


def _config_to(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, BertClassifierConfig)
    return {
        **backbone_config_to(config, "bert", "BertForSequenceClassification"),
        **num_labels_to(config.num_labels),
        "classifier_dropout": config.task_dropout,
        "problem_type": config.problem_type,
    }


WEIGHTS = WeightMap(
    architectures=("BertForSequenceClassification",),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    optional=(
        "classifier.weight",
        "classifier.bias",
        # A BERT trained on masked tokens alone has no pooler.
        "backbone.pooler.weight",
        "backbone.pooler.bias",
    ),
    ignored=("bert.embeddings.position_ids", "cls."),
)
