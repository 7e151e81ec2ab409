"""What `openwafer.layers` exports, and the documented signatures."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import openwafer.layers as layers

BOTH_LAYERS = (
    "d_model, nhead, dim_feedforward=2048, dropout=0.1, activation='gelu', layer_norm_eps=1e-05, "
    "batch_first=True, norm_first=False, device=None{}, attention_dropout_rate=None, "
    "attention_type='scaled_dot_product', use_projection_bias_in_attention=False, "
    "use_ffn_bias_in_attention=False, use_ffn_bias=False, "
    "attention_initializer='xavier_uniform', ffn_initializer='xavier_uniform'"
)

# The CS-2 software's documented signatures, release 1.6.
SIGNATURES = {
    "MultiheadAttention": (
        "embed_dim, num_heads, dropout=0.0, batch_first=True, add_bias_kv=False, "
        "add_zero_attn=False, kdim=None, vdim=None, use_projection_bias=None, use_ffn_bias=False, "
        "attention_initializer='xavier_uniform', output_layer_initializer=None, "
        "attention_type='scaled_dot_product', device=None"
    ),
    "MultiheadAttention.forward": (
        "q, k, v, attn_mask=None, key_padding_mask=None, need_weights=False, "
        "average_attn_weights=True, past_kv=None, cache_present_kv=False, position_bias=None, "
        "rotary_position_embedding_helper=None"
    ),
    "EmbeddingLayer": (
        "vocab_size, embedding_size, pad_token_id=None, segment_embedding_size=None, "
        "embeddings_initializer='uniform', max_position_embeddings=None, "
        "position_embedding_type='learned', min_timescale=1.0, max_timescale=10000.0, "
        "position_embeddings_initializer='uniform', num_segments=None, "
        "segment_embeddings_initializer='uniform', device=None"
    ),
    "EmbeddingLayer.forward": "input_ids, segment_ids=None, past_length=0",
    "FeedForwardNetwork": (
        "input_unit, layers_units, layers_activation=None, layers_dropout_rates=None, "
        "use_bias=False, kernel_initializer='xavier_uniform', bias_initializer='zeros', "
        "output_layer_initializer=None, device=None"
    ),
    "SingleFeedForwardLayer": (
        "in_features, out_features, use_bias=False, activation=None, dropout=None, device=None"
    ),
    "RelativePositionEmbeddingLayer": (
        "num_heads, relative_attention_bias=None, num_relative_attention_buckets=32, "
        "bidirectional_relative_attention=False, relative_attn_bias_initializer='xavier_uniform'"
    ),
    "RelativePositionEmbeddingLayer.forward": "seq_length, key_length, past_kv=None",
    "TransformerEncoderLayer": BOTH_LAYERS.format(""),
    "TransformerEncoderLayer.forward": "src, src_mask=None, src_key_padding_mask=None",
    "TransformerEncoder": "encoder_layer, num_layers, norm=None, enable_nested_tensor=False",
    "TransformerEncoder.forward": "src, mask=None, src_key_padding_mask=None",
    "TransformerDecoderLayer": BOTH_LAYERS.format(", add_cross_attention=True"),
    "TransformerDecoderLayer.forward": (
        "tgt, memory=None, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, "
        "memory_key_padding_mask=None, rotary_position_embedding_helper=None"
    ),
    "TransformerDecoder": "decoder_layer, num_layers, norm=None",
    "Transformer": (
        "d_model=512, nhead=8, num_encoder_layers=6, num_decoder_layers=6, dim_feedforward=2048, "
        "dropout=0.1, activation='gelu', custom_encoder=None, custom_decoder=None, "
        "layer_norm_eps=1e-05, batch_first=True, norm_first=False, "
        "attention_type='scaled_dot_product', use_projection_bias_in_attention=False, "
        "use_ffn_bias_in_attention=False, use_ffn_bias=False, "
        "attention_initializer='xavier_uniform', ffn_initializer='xavier_uniform', device=None"
    ),
    "GPTLMHeadModelLoss": "vocab_size, loss_weight",
    "RotaryPositionEmbeddingHelper": "max_position_embeddings, rotary_dim",
    "create_autoregressive_mask": "max_sequence_length, dtype=torch.float16, device=None",
    "create_initializer": "spec",
    "smooth_loss": "prediction_scores, loss, label_smoothing, classes",
}


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures(name: str) -> None:
    value = layers
    for part in name.split("."):
        value = getattr(value, part)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name != "self"
    ]
    assert ", ".join(map(str, parameters)) == SIGNATURES[name]


def test_every_name_is_there() -> None:
    for name in layers.__all__:
        assert getattr(layers, name) is not None
    assert dir(layers) == sorted(layers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Attention'"):
        _ = layers.Attention


def test_the_package_alone_loads_no_torch() -> None:
    code = "import sys, openwafer.layers; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
