"""GPT-2 checkpoints of Hugging Face: names, and their transposed and fused weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from openwafer.errors import CheckpointError
from openwafer.zoo.gpt2.torch_model import GPT2Config
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap, require_counterpart

__all__ = ["WEIGHTS"]

_OURS = "transformer_decoder.layers.{layer}."
_THEIRS = "transformer.h.{layer}."
_WITHOUT_COUNTERPART = (
    "attention_type",
    "position_embedding_type",
    "use_bias_in_output",
    "use_ffn_bias",
    "use_ffn_bias_in_attention",
    "use_position_embedding",
    "use_projection_bias_in_attention",
)


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    tied = cast("GPT2Config", config).share_embedding_weights
    fused = ("proj_q_dense_layer", "proj_k_dense_layer", "proj_v_dense_layer")
    rules = [
        Rule(ours="embedding_layer.word_embeddings.weight", theirs=("transformer.wte.weight",)),
        Rule(ours="embedding_layer.position_embeddings.weight", theirs=("transformer.wpe.weight",)),
        Rule(ours="transformer_decoder.norm.weight", theirs=("transformer.ln_f.weight",)),
        Rule(ours="transformer_decoder.norm.bias", theirs=("transformer.ln_f.bias",)),
    ]
    if not tied:
        rules.append(Rule(ours="lm_head.weight", theirs=("lm_head.weight",)))
    for kind, join, split in (("weight", _thirds_t, _fused_t), ("bias", _thirds, _fused)):
        rules += [
            Rule(
                ours=tuple(f"{_OURS}self_attn.{name}.{kind}" for name in fused),
                theirs=(f"{_THEIRS}attn.c_attn.{kind}",),
                join=join,
                split=split,
                layers="num_hidden_layers",
            ),
            _of_layer("norm1", "ln_1", kind),
            _of_layer("norm3", "ln_2", kind),
            _of_layer("self_attn.proj_output_dense_layer", "attn.c_proj", kind, turned=True),
            _of_layer("ffn.ffn.0.linear_layer", "mlp.c_fc", kind, turned=True),
            _of_layer("ffn.ffn.1.linear_layer", "mlp.c_proj", kind, turned=True),
        ]
    return tuple(rules)


def _of_layer(ours: str, theirs: str, kind: str, *, turned: bool = False) -> Rule:
    """`turned`: they keep a weight as [in, out] (`Conv1D`), we as [out, in]."""
    transposed = turned and kind == "weight"
    return Rule(
        ours=f"{_OURS}{ours}.{kind}",
        theirs=(f"{_THEIRS}{theirs}.{kind}",),
        join=_turn if transposed else None,
        split=_turned if transposed else None,
        layers="num_hidden_layers",
    )


def _turn(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


def _turned(weight: Tensor) -> tuple[Tensor, ...]:
    return (_turn(weight),)


def _thirds(fused: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in fused.chunk(3))


def _fused(*parts: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat(parts),)


def _thirds_t(fused: Tensor) -> tuple[Tensor, ...]:
    return tuple(_turn(part) for part in fused.chunk(3, dim=1))


def _fused_t(*parts: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([_turn(part) for part in parts], dim=1),)


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if theirs.get(key, value) is not value:
            raise CheckpointError(
                f"its configuration has `{key}: {theirs[key]}`", allowed=f"{key}: {value}"
            )
    hidden = theirs["n_embd"]
    rate, residual_rate = theirs.get("embd_pdrop", 0.1), theirs.get("resid_pdrop", 0.1)
    return {
        "vocab_size": theirs["vocab_size"],
        "max_position_embeddings": theirs["n_positions"],
        "hidden_size": hidden,
        "num_hidden_layers": theirs["n_layer"],
        "num_heads": theirs["n_head"],
        "filter_size": theirs.get("n_inner") or 4 * hidden,
        "nonlinearity": theirs.get("activation_function", "gelu_new"),
        "dropout_rate": residual_rate,
        "embedding_dropout_rate": None if rate == residual_rate else rate,
        "attention_dropout_rate": theirs.get("attn_pdrop", 0.1),
        "layer_norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "initializer_range": theirs.get("initializer_range", 0.02),
        "share_embedding_weights": theirs.get("tie_word_embeddings", True),
    }


def _config_to(config: ModelConfig) -> dict[str, Any]:
    ours = cast("GPT2Config", config)
    require_counterpart(ours, GPT2Config(), _WITHOUT_COUNTERPART, "GPT2LMHeadModel")
    rate = ours.embedding_dropout_rate
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": ours.vocab_size,
        "n_positions": ours.max_position_embeddings,
        "n_embd": ours.hidden_size,
        "n_layer": ours.num_hidden_layers,
        "n_head": ours.num_heads,
        "n_inner": ours.filter_size,
        "activation_function": ours.nonlinearity,
        "resid_pdrop": ours.dropout_rate,
        "embd_pdrop": ours.dropout_rate if rate is None else rate,
        "attn_pdrop": ours.attention_dropout_rate,
        "layer_norm_epsilon": ours.layer_norm_epsilon,
        "initializer_range": ours.initializer_range,
        "tie_word_embeddings": ours.share_embedding_weights,
    }


WEIGHTS = WeightMap(
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    # Causal masks that old files hold, and the output layer's weight where it is tied.
    ignored=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked", "lm_head"),
)
