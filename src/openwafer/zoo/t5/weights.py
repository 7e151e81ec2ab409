"""T5 checkpoints of `transformers` and ours.

Decides names and configuration keys; no tensor changes its layout. A shared output layer is stored
once, as `shared.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from openwafer.errors import ConfigError
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.t5.torch_model import T5Config
from openwafer.zoo.weights import Rule, WeightMap, require_counterpart

__all__ = ["WEIGHTS"]

ARCHITECTURES = ("T5ForConditionalGeneration",)

_STACKS = (
    # stack, config key of its layers, [(our part, number and name of theirs)]
    (
        "encoder",
        "encoder_num_hidden_layers",
        (("self_attention", 0, "SelfAttention"), ("feed_forward", 1, "DenseReluDense")),
    ),
    (
        "decoder",
        "decoder_num_hidden_layers",
        (
            ("self_attention", 0, "SelfAttention"),
            ("cross_attention", 1, "EncDecAttention"),
            ("feed_forward", 2, "DenseReluDense"),
        ),
    ),
)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    assert isinstance(config, T5Config)
    found = [Rule(ours="shared.weight", theirs=("shared.weight",))]
    if not config.share_embedding_weights:
        found.append(Rule(ours="lm_head.weight", theirs=("lm_head.weight",)))
    for stack, layers, parts in _STACKS:
        gated = getattr(config, f"{stack}_nonlinearity").startswith("gated-")
        found.append(
            Rule(
                ours=f"{stack}.relative_position.relative_attention_bias.weight",
                theirs=(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
            )
        )
        found.append(
            Rule(ours=f"{stack}.norm.weight", theirs=(f"{stack}.final_layer_norm.weight",))
        )
        for part, number, name in parts:
            ours, theirs = (
                f"{stack}.layers.{{layer}}.{part}",
                f"{stack}.block.{{layer}}.layer.{number}",
            )
            pairs = {f"{ours}_norm": f"{theirs}.layer_norm"}
            for weight, their_weight in _weights_of(part, gated).items():
                pairs[f"{ours}.{weight}"] = f"{theirs}.{name}.{their_weight}"
            found.extend(
                Rule(ours=f"{a}.weight", theirs=(f"{b}.weight",), layers=layers)
                for a, b in pairs.items()
            )
    return tuple(found)


def _weights_of(part: str, gated: bool) -> dict[str, str]:
    if part != "feed_forward":
        return {name: name for name in "qkvo"}
    return {"wi": "wi_0", "wi_gate": "wi_1", "wo": "wo"} if gated else {"wi": "wi", "wo": "wo"}


def config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    if theirs.get("relative_attention_max_distance", 128) != 128:
        raise ConfigError(
            f"relative_attention_max_distance is {theirs['relative_attention_max_distance']}",
            where="config.json",
            allowed="128",
        )
    nonlinearity = theirs.get("feed_forward_proj", "relu")
    if nonlinearity == "gated-gelu":  # what `transformers` computes under this name
        nonlinearity = "gated-gelu_new"
    num_layers = theirs.get("num_layers", 6)
    return {
        "src_vocab_size": theirs.get("vocab_size", 32128),
        "d_model": theirs.get("d_model", 512),
        "d_kv": theirs.get("d_kv", 64),
        "d_ff": theirs.get("d_ff", 2048),
        "num_heads": theirs.get("num_heads", 8),
        "encoder_num_hidden_layers": num_layers,
        "decoder_num_hidden_layers": theirs.get("num_decoder_layers") or num_layers,
        "encoder_nonlinearity": nonlinearity,
        "decoder_nonlinearity": nonlinearity,
        "relative_attention_num_buckets": theirs.get("relative_attention_num_buckets", 32),
        "layer_norm_epsilon": theirs.get("layer_norm_epsilon", 1e-6),
        "dropout_rate": theirs.get("dropout_rate", 0.1),
        "share_embedding_weights": _scales_output(theirs),
        "scale_output": _scales_output(theirs),
        "use_t5_layer_norm": True,
    }


def _scales_output(theirs: Mapping[str, Any]) -> bool:
    """T5 1.1 does not. Releases of transformers before 5 said so by the first key, as part of an
    output layer of its own; later ones say it by the second."""
    tied = theirs.get("tie_word_embeddings") is not False
    return tied and theirs.get("scale_decoder_outputs") is not False


def config_from_names(theirs: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Whether the output layer has weights of its own: releases from 5 on do not say it. Older
    files may hold a shared table under every one of its names."""
    own = any(name.endswith("lm_head.weight") for name in names)
    if own and _scales_output(theirs):
        own = not any("embed_tokens." in name for name in names)
    return {"share_embedding_weights": not own}


def config_to(config: ModelConfig) -> dict[str, Any]:
    assert isinstance(config, T5Config)
    _refuse_what_they_lack(config)
    nonlinearity = config.encoder_nonlinearity
    return {
        "model_type": "t5",
        "architectures": list(ARCHITECTURES[:1]),
        "is_encoder_decoder": True,
        "vocab_size": config.num_src_tokens,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.encoder_num_hidden_layers,
        "num_decoder_layers": config.decoder_num_hidden_layers,
        "feed_forward_proj": "gated-gelu" if nonlinearity == "gated-gelu_new" else nonlinearity,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": config.dropout_rate,
        "tie_word_embeddings": config.scales_output,
        "scale_decoder_outputs": config.scales_output,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _refuse_what_they_lack(config: T5Config) -> None:
    nonlinearity = config.encoder_nonlinearity
    if nonlinearity == "gated-gelu":  # under that name they compute gelu_new
        nonlinearity = "gated-gelu_new"
    plain = replace(
        config,
        use_t5_layer_norm=True,
        share_encoder_decoder_embedding=True,
        encoder_nonlinearity=nonlinearity,
        decoder_nonlinearity=nonlinearity,
    )
    keys = (
        "use_t5_layer_norm",
        "share_encoder_decoder_embedding",
        "encoder_nonlinearity",
        "decoder_nonlinearity",
    )
    require_counterpart(config, plain, keys, ARCHITECTURES[0])


WEIGHTS = WeightMap(
    architectures=ARCHITECTURES,
    rules=rules,
    config_from=config_from,
    config_to=config_to,
    config_from_names=config_from_names,
    # The same table under the names of its other uses.
    ignored=(
        "encoder.embed_tokens.",
        "decoder.embed_tokens.",
        # A table that early checkpoints hold and no release reads.
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.",
    ),
)
