"""Weights of transformers' BertForTokenClassification."""

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
from openwafer.zoo.bert_ner.torch_model import BertNerConfig
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap

__all__ = ["WEIGHTS"]


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*backbone_rules("bert", with_pooler=False), *linear_rules("classifier", "classifier"))


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    ours = {**backbone_config_from(theirs), "num_classes": num_labels_from(theirs)}
    return {**ours, "encoder_output_dropout_rate": head_dropout_from(theirs)}


def _config_to(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, BertNerConfig)
    return {
        **backbone_config_to(config, "bert", "BertForTokenClassification"),
        **num_labels_to(config.num_classes),
        "classifier_dropout": config.encoder_output_dropout_rate,
    }


WEIGHTS = WeightMap(
    architectures=("BertForTokenClassification",),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    optional=("classifier.weight", "classifier.bias"),
    ignored=("bert.embeddings.position_ids", "bert.pooler.", "cls."),
)
