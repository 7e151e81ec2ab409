"""Weights of transformers' RobertaForMaskedLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openwafer.zoo.bert.weights import (
    HEAD_KEYS,
    backbone_config_from,
    backbone_config_to,
    backbone_rules,
    masked_token_rules,
)
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.roberta.torch_model import RobertaConfig
from openwafer.zoo.weights import Rule, WeightMap, require_counterpart

__all__ = ["WEIGHTS"]

_WITHOUT_COUNTERPART = ("disable_nsp", "mlm_nonlinearity", *HEAD_KEYS)


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    assert isinstance(config, RobertaConfig)
    head = masked_token_rules(
        config,
        layer="lm_head.dense",
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
        bias="lm_head.bias",
    )
    return (*backbone_rules("roberta", with_pooler=False), *head)


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    pad_token_id = theirs.get("pad_token_id", 1)
    ours = backbone_config_from(theirs)
    return {
        **ours,
        "pad_token_id": pad_token_id,
        "max_position_embeddings": ours["max_position_embeddings"] - pad_token_id - 1,
        "share_embedding_weights": theirs.get("tie_word_embeddings", True),
    }


def _config_to(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, RobertaConfig)
    plain = RobertaConfig(vocab_size=config.vocab_size)
    require_counterpart(config, plain, _WITHOUT_COUNTERPART, "RobertaForMaskedLM")
    return {
        **backbone_config_to(config, "roberta", "RobertaForMaskedLM"),
        "pad_token_id": config.pad_token_id,
        "max_position_embeddings": config.max_position_embeddings + config.first_position,
        "tie_word_embeddings": config.share_embedding_weights,
    }


WEIGHTS = WeightMap(
    architectures=("RobertaForMaskedLM",),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    ignored=("roberta.embeddings.position_ids", "roberta.pooler.", "lm_head.decoder."),
)
