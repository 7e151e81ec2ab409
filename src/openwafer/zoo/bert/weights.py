"""BERT's weights in Hugging Face checkpoints.

Decides the names and the configuration of the backbone, which the fine-tuning families and RoBERTa
take from here, of the pre-training heads, and of a linear classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from openwafer.errors import CheckpointError
from openwafer.zoo.bert.torch_model import BackboneConfig, BertConfig
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap, require_counterpart

__all__ = [
    "HEAD_KEYS",
    "WEIGHTS",
    "backbone_config_from",
    "backbone_config_to",
    "backbone_rules",
    "classifier_weights",
    "linear_rules",
    "masked_token_rules",
]

_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "filter_size": "intermediate_size",
    "encoder_nonlinearity": "hidden_act",
    "dropout_rate": "hidden_dropout_prob",
    "attention_dropout_rate": "attention_probs_dropout_prob",
    "layer_norm_epsilon": "layer_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "num_segments": "type_vocab_size",
    "initializer_range": "initializer_range",
}
"""Our key → theirs."""

_THEIR_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}
"""Of transformers' BertConfig and RobertaConfig, where they are not ours (a config.json may leave
defaults out)."""

_WITHOUT_COUNTERPART = (
    "embedding_size",
    "position_embedding_type",
    "use_position_embedding",
    "use_segment_embedding",
    "attention_type",
    "use_projection_bias_in_attention",
    "use_ffn_bias_in_attention",
    "use_ffn_bias",
    "use_pre_normalization",
)
"""Theirs has only the defaults of these keys."""

HEAD_KEYS = ("use_ffn_bias_in_mlm", "use_output_bias_in_mlm", "num_cls_classes")
"""The same of the pre-training heads."""

_LAYER = {
    "self_attn.proj_q_dense_layer": "attention.self.query",
    "self_attn.proj_k_dense_layer": "attention.self.key",
    "self_attn.proj_v_dense_layer": "attention.self.value",
    "self_attn.proj_output_dense_layer": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "ffn.ffn.0.linear_layer": "intermediate.dense",
    "ffn.ffn.1.linear_layer": "output.dense",
    "norm2": "output.LayerNorm",
}


def linear_rules(ours: str, theirs: str, layers: str = "") -> tuple[Rule, ...]:
    """`weight` and `bias` of one module."""
    return tuple(
        Rule(ours=f"{ours}.{part}", theirs=(f"{theirs}.{part}",), layers=layers)
        for part in ("weight", "bias")
    )


def backbone_rules(prefix: str, *, with_pooler: bool) -> tuple[Rule, ...]:
    """The rules of the backbone; `prefix` is their name of it (`bert`)."""
    tables = {
        "word_embeddings": "word_embeddings",
        "position_embeddings": "position_embeddings",
        "segment_embeddings": "token_type_embeddings",
    }
    rules = [
        Rule(
            ours=f"backbone.embeddings.{ours}.weight",
            theirs=(f"{prefix}.embeddings.{theirs}.weight",),
        )
        for ours, theirs in tables.items()
    ]
    rules += linear_rules("backbone.embedding_norm", f"{prefix}.embeddings.LayerNorm")
    for ours, theirs in _LAYER.items():
        rules += linear_rules(
            f"backbone.encoder.layers.{{layer}}.{ours}",
            f"{prefix}.encoder.layer.{{layer}}.{theirs}",
            layers="num_hidden_layers",
        )
    if with_pooler:
        rules += linear_rules("backbone.pooler", f"{prefix}.pooler.dense")
    return tuple(rules)


def masked_token_rules(
    config: BertConfig, *, layer: str, norm: str, decoder: str, bias: str
) -> tuple[Rule, ...]:
    """The rules of the masked-token head, by their names of its parts."""
    rules = [
        *linear_rules("masked_token_head.dense", layer),
        *linear_rules("masked_token_head.norm", norm),
    ]
    if config.share_embedding_weights:
        return (*rules, Rule(ours="masked_token_head.bias", theirs=(bias,)))
    # Untied, theirs holds the bias under both names and adds the decoder's.
    return (
        *rules,
        Rule(ours="masked_token_head.table", theirs=(f"{decoder}.weight",)),
        Rule(
            ours="masked_token_head.bias",
            theirs=(f"{decoder}.bias", bias),
            join=_first,
            split=_twice,
        ),
    )


def _first(used: Tensor, _: Tensor) -> Tensor:
    return used


def _twice(ours: Tensor) -> tuple[Tensor, ...]:
    return (ours, ours.clone())


def backbone_config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` keys of the backbone from their config.json.

    Raises:
        CheckpointError: a variant that is not BERT's encoder.
    """
    positions = theirs.get("position_embedding_type") or "absolute"
    if positions != "absolute" or theirs.get("is_decoder"):
        raise CheckpointError(
            f"a BERT with {positions} positions" if positions != "absolute" else "a BERT decoder",
            where="config.json",
            allowed="an encoder with absolute positions",
        )
    known = {**_THEIR_DEFAULTS, **theirs}
    return {ours: known[name] for ours, name in _KEYS.items() if known.get(name) is not None}


def backbone_config_to(
    config: BackboneConfig, model_type: str, architecture: str
) -> dict[str, Any]:
    """Their config.json.

    Raises:
        CheckpointError: theirs has no such variant.
    """
    plain = BackboneConfig(vocab_size=config.vocab_size)
    require_counterpart(config, plain, _WITHOUT_COUNTERPART, architecture)
    values = {name: getattr(config, ours) for ours, name in _KEYS.items()}
    return {
        "model_type": model_type,
        "architectures": [architecture],
        **values,
        "tie_word_embeddings": True,
    }


def classifier_weights(
    architecture: str,
    *,
    labels: str,
    dropout: str,
    with_pooler: bool,
    also: Mapping[str, Any] | None = None,
) -> WeightMap:
    """The weights of a BERT with one linear classifier, of texts or of tokens.

    Args:
        architecture: their class.
        labels, dropout: our `model` keys for the number of classes and the rate before them.
        with_pooler: whether the classifier reads the pooled first token.
        also: what their config.json says besides.
    """

    def rules(config: ModelConfig) -> tuple[Rule, ...]:
        backbone = backbone_rules("bert", with_pooler=with_pooler)
        return (*backbone, *linear_rules("classifier", "classifier"))

    def config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
        backbone = backbone_config_from(theirs)
        return {**backbone, labels: _num_labels(theirs), dropout: _head_dropout(theirs)}

    def config_to(config: ModelConfig) -> dict[str, Any]:
        assert isinstance(config, BackboneConfig)
        names = {str(index): f"LABEL_{index}" for index in range(getattr(config, labels))}
        return {
            **backbone_config_to(config, "bert", architecture),
            "id2label": names,
            "label2id": {name: int(index) for index, name in names.items()},
            "classifier_dropout": getattr(config, dropout),
            **(also or {}),
        }

    # A BERT trained on masked tokens alone has neither classifier nor pooler.
    pooler = ("backbone.pooler.weight", "backbone.pooler.bias") if with_pooler else ()
    return WeightMap(
        architectures=(architecture,),
        rules=rules,
        config_from=config_from,
        config_to=config_to,
        optional=("classifier.weight", "classifier.bias", *pooler),
        ignored=(
            "bert.embeddings.position_ids",
            *(() if with_pooler else ("bert.pooler.",)),
            "cls.",
        ),
    )


def _head_dropout(theirs: Mapping[str, Any]) -> float:
    """The rate before a classifier; the encoder's where it has none of its own."""
    rate = theirs.get("classifier_dropout")
    return backbone_config_from(theirs).get("dropout_rate", 0.1) if rate is None else rate


def _num_labels(theirs: Mapping[str, Any]) -> int:
    """Classes of a classifier in their config.json, which names them or, of old, counts them."""
    return len(theirs["id2label"]) if theirs.get("id2label") else int(theirs.get("num_labels", 2))


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    assert isinstance(config, BertConfig)
    rules = (
        *backbone_rules("bert", with_pooler=not config.disable_nsp),
        *masked_token_rules(
            config,
            layer="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            decoder="cls.predictions.decoder",
            bias="cls.predictions.bias",
        ),
    )
    if config.disable_nsp:
        return rules
    return (*rules, *linear_rules("next_sentence_head", "cls.seq_relationship"))


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    ours = backbone_config_from(theirs)
    return {
        **ours,
        "mlm_nonlinearity": ours["encoder_nonlinearity"],
        "disable_nsp": "BertForPreTraining" not in (theirs.get("architectures") or ()),
        "share_embedding_weights": theirs.get("tie_word_embeddings", True),
    }


def _config_to(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, BertConfig)
    architecture = "BertForMaskedLM" if config.disable_nsp else "BertForPreTraining"
    plain = BertConfig(vocab_size=config.vocab_size, mlm_nonlinearity=config.encoder_nonlinearity)
    require_counterpart(config, plain, ("mlm_nonlinearity", *HEAD_KEYS), architecture)
    theirs = backbone_config_to(config, "bert", architecture)
    return {**theirs, "tie_word_embeddings": config.share_embedding_weights}


WEIGHTS = WeightMap(
    architectures=("BertForPreTraining", "BertForMaskedLM"),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    # A checkpoint of BertForPreTraining holds the pooler that masked tokens alone do not need.
    ignored=(
        "bert.embeddings.position_ids",
        "cls.predictions.decoder.",
        "bert.pooler.",
        "cls.seq_relationship.",
    ),
)
