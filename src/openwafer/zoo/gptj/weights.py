"""GPT-J checkpoints of Hugging Face: the same layouts, other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from openwafer.errors import CheckpointError
from openwafer.zoo.gptj.torch_model import GPTJConfig
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.weights import Rule, WeightMap, require_counterpart

__all__ = ["WEIGHTS"]

_OUTSIDE = {
    "word_embeddings.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
_INSIDE = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "self_attn.proj_q_dense_layer.weight": "attn.q_proj.weight",
    "self_attn.proj_k_dense_layer.weight": "attn.k_proj.weight",
    "self_attn.proj_v_dense_layer.weight": "attn.v_proj.weight",
    "self_attn.proj_output_dense_layer.weight": "attn.out_proj.weight",
    "ffn.ffn.0.linear_layer.weight": "mlp.fc_in.weight",
    "ffn.ffn.0.linear_layer.bias": "mlp.fc_in.bias",
    "ffn.ffn.1.linear_layer.weight": "mlp.fc_out.weight",
    "ffn.ffn.1.linear_layer.bias": "mlp.fc_out.bias",
}

_WITHOUT_COUNTERPART = (
    "share_embedding_weights",
    "use_bias_in_output",
    "use_ffn_bias",
    "use_ffn_bias_in_attention",
    "use_projection_bias_in_attention",
    "use_untied_layer_norm",
)


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    outside = [Rule(ours=ours, theirs=(theirs,)) for ours, theirs in _OUTSIDE.items()]
    inside = [
        Rule(
            ours=f"layers.{{layer}}.{ours}",
            theirs=(f"transformer.h.{{layer}}.{theirs}",),
            layers="num_hidden_layers",
        )
        for ours, theirs in _INSIDE.items()
    ]
    return (*outside, *inside)


def _config_from(theirs: Mapping[str, Any]) -> dict[str, Any]:
    hidden = theirs["n_embd"]
    if theirs.get("tie_word_embeddings"):
        raise CheckpointError(
            "its configuration has `tie_word_embeddings: true`", allowed="false, as GPT-J has it"
        )
    return {
        "vocab_size": theirs["vocab_size"],
        "max_position_embeddings": theirs["n_positions"],
        "hidden_size": hidden,
        "num_hidden_layers": theirs["n_layer"],
        "num_heads": theirs["n_head"],
        "filter_size": theirs.get("n_inner") or 4 * hidden,
        "rotary_dim": theirs.get("rotary_dim") or hidden // theirs["n_head"],
        "nonlinearity": theirs.get("activation_function", "gelu_new"),
        "embedding_dropout_rate": theirs.get("embd_pdrop", 0.0),
        "residual_dropout_rate": theirs.get("resid_pdrop", 0.0),
        "attention_dropout_rate": theirs.get("attn_pdrop", 0.0),
        "layer_norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "initializer_range": theirs.get("initializer_range", 0.02),
    }


def _config_to(config: ModelConfig) -> dict[str, Any]:
    ours = cast("GPTJConfig", config)
    require_counterpart(ours, GPTJConfig(), _WITHOUT_COUNTERPART, "GPTJForCausalLM")
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "vocab_size": ours.vocab_size,
        "n_positions": ours.max_position_embeddings,
        "n_embd": ours.hidden_size,
        "n_layer": ours.num_hidden_layers,
        "n_head": ours.num_heads,
        "n_inner": ours.filter_size,
        "rotary_dim": ours.rotary_dim,
        "activation_function": ours.nonlinearity,
        "embd_pdrop": ours.embedding_dropout_rate,
        "resid_pdrop": ours.residual_dropout_rate,
        "attn_pdrop": ours.attention_dropout_rate,
        "layer_norm_epsilon": ours.layer_norm_epsilon,
        "initializer_range": ours.initializer_range,
        "tie_word_embeddings": False,
    }


WEIGHTS = WeightMap(
    architectures=("GPTJForCausalLM",),
    rules=_rules,
    config_from=_config_from,
    config_to=_config_to,
    # Causal masks and angles that old files hold.
    ignored=(
        "transformer.h.{layer}.attn.bias",
        "transformer.h.{layer}.attn.masked",
        "transformer.h.{layer}.attn.embed_positions",
    ),
)
