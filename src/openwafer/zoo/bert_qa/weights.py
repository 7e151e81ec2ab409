"""Weights of transformers' BertForQuestionAnswering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openwafer.zoo.bert.weights import (
    backbone_config_from,
    backbone_config_to,
    backbone_rules,
    linear_rules,
)
from openwafer.zoo.bert_qa.torch_model import BertQAConfig
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap

__all__ = ["WEIGHTS"]


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*backbone_rules("bert", with_pooler=False), *linear_rules("classifier", "qa_outputs"))


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return backbone_config_from(theirs)


def _config_to(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, BertQAConfig)
    return backbone_config_to(config, "bert", "BertForQuestionAnswering")


WEIGHTS = WeightMap(
    architectures=("BertForQuestionAnswering",),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    optional=("classifier.weight", "classifier.bias"),
    ignored=("bert.embeddings.position_ids", "bert.pooler.", "cls."),
)
