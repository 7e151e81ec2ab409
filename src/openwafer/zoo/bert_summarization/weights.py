"""Weights that summarization takes from a pre-trained BERT of transformers; it has no such head."""

from __future__ import annotations

from typing import Any

from openwafer.errors import CheckpointError
from openwafer.zoo.bert.weights import backbone_config_from, backbone_rules
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap

__all__ = ["WEIGHTS"]


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return backbone_rules("bert", with_pooler=False)


def _config_to(config: ModelConfig) -> dict[str, Any]:
    raise CheckpointError(
        "transformers has no BERT for extractive summarization",
        allowed="a conversion from transformers, to fine-tune a pre-trained BERT",
    )


WEIGHTS = WeightMap(
    architectures=(),
    rules=_rules,
    config_from=backbone_config_from,
    config_to=_config_to,
    ignored=("bert.embeddings.position_ids", "bert.pooler.", "cls."),
)
