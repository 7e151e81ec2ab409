"""The architectures that docs/architectures.md tries: small random models, nothing downloaded.

Decides which architectures, of which group, with which sizes and example batch. Does not decide
what is measured (architectures.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.plain_networks import PLAIN_NETWORKS

__all__ = ["ARCHITECTURES", "Architecture"]

BATCH, SEQ, VOCAB, HIDDEN, HEADS, LAYERS = 2, 16, 96, 32, 4, 2

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Architecture:
    """One row of the table. `build` gives the model and an example batch with its labels."""

    name: str
    group: str
    build: Callable[[], Built]


def _config(name: str, **settings: Any) -> Any:
    """A configuration of `transformers`; small sizes under all the names that models use.

    A configuration class refuses nothing: names that it does not know become idle attributes,
    but a few names mean something else in some classes, so `settings` decides what is passed.
    """
    import transformers

    return getattr(transformers, name)(**settings)


_BERT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA = _BERT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS,
         "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "decoder_start_token_id": 2,
} | _SPECIAL  # fmt: skip
_T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS,
           "num_decoder_layers": LAYERS, "num_heads": HEADS, "decoder_start_token_id": 0,
           "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
_VIT = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip
_SIZES = [16, 32, 64, 64]


def _tokens(seq: int = SEQ) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB - 1, (BATCH, seq), generator=generator)


def _text_batch(labels: str, seq: int) -> dict[str, torch.Tensor]:
    batch = {"input_ids": _tokens(seq), "attention_mask": torch.ones(BATCH, seq, dtype=torch.long)}
    if labels == "tokens":
        batch["labels"] = _tokens(seq)
    elif labels == "classes":
        batch["labels"] = torch.ones(BATCH, dtype=torch.long)
    elif labels == "span":
        batch["start_positions"] = batch["end_positions"] = torch.ones(BATCH, dtype=torch.long)
    return batch


def _image_batch(size: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.zeros(BATCH, 3, size, size),
        "labels": torch.ones(BATCH, dtype=torch.long),
    }


def _hf(
    group: str,
    model: str,
    config: str,
    settings: dict[str, Any],
    *,
    labels: str = "tokens",
    seq: int = SEQ,
    image: int = 0,
    name: str = "",
) -> Architecture:
    """A model class of `transformers` with its configuration class."""

    def build() -> Built:
        import transformers

        torch.manual_seed(1)
        module = getattr(transformers, model)(_config(config, **settings))
        return module, _image_batch(image) if image else _text_batch(labels, seq)

    return Architecture(name or model, group, build)


_ENCODER, _DECODER, _BOTH, _VISION = "text encoder", "text decoder", "encoder-decoder", "vision"

_TEXT_ENCODERS = (
    _hf(_ENCODER, "BertForMaskedLM", "BertConfig", _BERT),
    _hf(_ENCODER, "BertForSequenceClassification", "BertConfig", _BERT, labels="classes"),
    _hf(_ENCODER, "BertForQuestionAnswering", "BertConfig", _BERT, labels="span"),
    _hf(_ENCODER, "BertForTokenClassification", "BertConfig", _BERT | {"num_labels": VOCAB}),
    _hf(_ENCODER, "RobertaForMaskedLM", "RobertaConfig", _BERT | _SPECIAL),
    _hf(_ENCODER, "XLMRobertaForMaskedLM", "XLMRobertaConfig", _BERT | _SPECIAL),
    _hf(_ENCODER, "CamembertForMaskedLM", "CamembertConfig", _BERT | _SPECIAL),
    _hf(
        _ENCODER,
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": 64,
        },
    ),
    _hf(_ENCODER, "AlbertForMaskedLM", "AlbertConfig", _BERT | {"embedding_size": 16}),
    _hf(_ENCODER, "ElectraForMaskedLM", "ElectraConfig", _BERT | {"embedding_size": 16}),
    _hf(
        _ENCODER,
        "DebertaForMaskedLM",
        "DebertaConfig",
        _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    _hf(
        _ENCODER,
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    _hf(_ENCODER, "MPNetForMaskedLM", "MPNetConfig", _BERT | _SPECIAL),
    _hf(
        _ENCODER,
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _BERT | _SPECIAL | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    ),
    _hf(_ENCODER, "RoFormerForMaskedLM", "RoFormerConfig", _BERT),
    _hf(_ENCODER, "ErnieForMaskedLM", "ErnieConfig", _BERT),
    _hf(_ENCODER, "MegatronBertForMaskedLM", "MegatronBertConfig", _BERT),
    _hf(_ENCODER, "EsmForMaskedLM", "EsmConfig", _BERT | {"pad_token_id": 0, "mask_token_id": 3}),
    _hf(
        _ENCODER,
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        _BERT | {"embedding_size": 16, "intra_bottleneck_size": 32, "hidden_size": HIDDEN},
    ),
    _hf(
        _ENCODER,
        "SqueezeBertForMaskedLM",
        "SqueezeBertConfig",
        _BERT
        | {
            "embedding_size": HIDDEN,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
    ),
    _hf(_ENCODER, "ConvBertForMaskedLM", "ConvBertConfig", _BERT | {"embedding_size": HIDDEN}),
    _hf(_ENCODER, "FNetForMaskedLM", "FNetConfig", _BERT),
    _hf(
        _ENCODER,
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        _BERT | {"num_landmarks": SEQ, "segment_means_seq_len": SEQ, "max_position_embeddings": 64},
    ),
    _hf(
        _ENCODER,
        "FunnelForMaskedLM",
        "FunnelConfig",
        {
            "vocab_size": VOCAB,
            "block_sizes": [1, 1],
            "d_model": HIDDEN,
            "n_head": HEADS,
            "d_head": 8,
            "d_inner": 64,
        },
    ),
    _hf(
        _ENCODER,
        "RemBertForMaskedLM",
        "RemBertConfig",
        _BERT | {"input_embedding_size": 16, "output_embedding_size": 16},
    ),
    _hf(
        _ENCODER,
        "LongformerForMaskedLM",
        "LongformerConfig",
        _BERT | _SPECIAL | {"attention_window": 8},
    ),
    _hf(
        _ENCODER, "BigBirdForMaskedLM", "BigBirdConfig", _BERT | {"attention_type": "original_full"}
    ),
    _hf(
        _ENCODER,
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 64},
    ),
    _hf(_ENCODER, "IBertForMaskedLM", "IBertConfig", _BERT | _SPECIAL),
    _hf(_ENCODER, "YosoForMaskedLM", "YosoConfig", _BERT | {"use_expectation": True}),
    _hf(_ENCODER, "EuroBertForMaskedLM", "EuroBertConfig", _LLAMA),
)

_TEXT_DECODERS = (
    _hf(_DECODER, "GPT2LMHeadModel", "GPT2Config", _GPT2),
    _hf(
        _DECODER,
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2 | {"attn_implementation": "eager"},
        name="GPT2LMHeadModel (eager attention)",
    ),
    _hf(_DECODER, "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT2),
    _hf(
        _DECODER,
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_layers=2,
            num_heads=HEADS,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            window_size=8,
            **_SPECIAL,
        ),
    ),
    _hf(_DECODER, "GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT | _SPECIAL),
    _hf(_DECODER, "GPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    _hf(_DECODER, "CodeGenForCausalLM", "CodeGenConfig", _GPT2 | {"rotary_dim": 4, "n_ctx": 64}),
    _hf(
        _DECODER,
        "OPTForCausalLM",
        "OPTConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            ffn_dim=64,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
            word_embed_proj_dim=HIDDEN,
            **_SPECIAL,
        ),
    ),
    _hf(
        _DECODER,
        "BloomForCausalLM",
        "BloomConfig",
        dict(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, **_SPECIAL),
    ),
    _hf(_DECODER, "LlamaForCausalLM", "LlamaConfig", _LLAMA),
    _hf(
        _DECODER,
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA | {"attn_implementation": "eager"},
        name="LlamaForCausalLM (eager attention)",
    ),
    _hf(_DECODER, "MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 8}),
    _hf(_DECODER, "MixtralForCausalLM", "MixtralConfig", _LLAMA | {"num_local_experts": 4}),
    _hf(_DECODER, "Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    _hf(_DECODER, "Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 8}),
    _hf(_DECODER, "GemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": 8}),
    _hf(
        _DECODER,
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    _hf(
        _DECODER,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    _hf(_DECODER, "PhiForCausalLM", "PhiConfig", _LLAMA),
    _hf(_DECODER, "Phi3ForCausalLM", "Phi3Config", _LLAMA),
    _hf(
        _DECODER,
        "FalconForCausalLM",
        "FalconConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            alibi=False,
            **_SPECIAL,
        ),
    ),
    _hf(
        _DECODER,
        "FalconForCausalLM",
        "FalconConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            alibi=True,
            **_SPECIAL,
        ),
        name="FalconForCausalLM (ALiBi)",
    ),
    _hf(
        _DECODER,
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "max_seq_len": 64,
        },
    ),
    _hf(_DECODER, "StableLmForCausalLM", "StableLmConfig", _LLAMA),
    _hf(_DECODER, "Starcoder2ForCausalLM", "Starcoder2Config", _LLAMA),
    _hf(_DECODER, "OlmoForCausalLM", "OlmoConfig", _LLAMA),
    _hf(_DECODER, "Olmo2ForCausalLM", "Olmo2Config", _LLAMA),
    _hf(_DECODER, "CohereForCausalLM", "CohereConfig", _LLAMA),
    _hf(_DECODER, "GraniteForCausalLM", "GraniteConfig", _LLAMA),
    _hf(_DECODER, "GlmForCausalLM", "GlmConfig", _LLAMA | {"head_dim": 8}),
    _hf(_DECODER, "NemotronForCausalLM", "NemotronConfig", _LLAMA),
    _hf(_DECODER, "PersimmonForCausalLM", "PersimmonConfig", _LLAMA),
    _hf(_DECODER, "BioGptForCausalLM", "BioGptConfig", _BERT | _SPECIAL),
    _hf(
        _DECODER,
        "XGLMForCausalLM",
        "XGLMConfig",
        dict(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            num_layers=LAYERS,
            attention_heads=HEADS,
            ffn_dim=64,
            max_position_embeddings=64,
            **_SPECIAL,
        ),
    ),
    _hf(
        _DECODER,
        "CTRLLMHeadModel",
        "CTRLConfig",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "dff": 64,
            "n_positions": 64,
        },
    ),
    _hf(
        _DECODER,
        "MambaForCausalLM",
        "MambaConfig",
        dict(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4, **_SPECIAL
        ),
    ),
    _hf(
        _DECODER,
        "RwkvForCausalLM",
        "RwkvConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            attention_hidden_size=HIDDEN,
            **_SPECIAL,
        ),
    ),
    _hf(
        _DECODER,
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _LLAMA
        | {
            "num_key_value_heads": HEADS,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
)

_ENCODER_DECODERS = (
    _hf(_BOTH, "T5ForConditionalGeneration", "T5Config", _T5),
    _hf(
        _BOTH,
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu"},
        name="T5ForConditionalGeneration (v1.1)",
    ),
    _hf(_BOTH, "MT5ForConditionalGeneration", "MT5Config", _T5),
    _hf(_BOTH, "UMT5ForConditionalGeneration", "UMT5Config", _T5),
    _hf(
        _BOTH,
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        _T5 | {"local_radius": 3, "global_block_size": 4},
    ),
    _hf(
        _BOTH,
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        _T5 | {"num_experts": 2},
    ),
    _hf(_BOTH, "BartForConditionalGeneration", "BartConfig", _BART),
    _hf(_BOTH, "MBartForConditionalGeneration", "MBartConfig", _BART),
    _hf(_BOTH, "PegasusForConditionalGeneration", "PegasusConfig", _BART),
    _hf(_BOTH, "MarianMTModel", "MarianConfig", _BART | {"decoder_vocab_size": VOCAB}),
    _hf(_BOTH, "BlenderbotForConditionalGeneration", "BlenderbotConfig", _BART),
    _hf(_BOTH, "BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", _BART),
    _hf(
        _BOTH,
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        _BART | {"encoder_layerdrop": 0, "decoder_layerdrop": 0},
    ),
    _hf(_BOTH, "PLBartForConditionalGeneration", "PLBartConfig", _BART),
    _hf(
        _BOTH,
        "LEDForConditionalGeneration",
        "LEDConfig",
        _BART
        | {
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
            "attention_window": 8,
        },
    ),
    _hf(
        _BOTH,
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_encoder_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_encoder_attention_heads=HEADS,
            num_decoder_attention_heads=HEADS,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            **_SPECIAL,
        ),
    ),
)

_VISION_MODELS = (
    _hf(_VISION, "ViTForImageClassification", "ViTConfig", _VIT, image=32),
    _hf(_VISION, "DeiTForImageClassification", "DeiTConfig", _VIT, image=32),
    _hf(_VISION, "BeitForImageClassification", "BeitConfig", _VIT, image=32),
    _hf(_VISION, "Dinov2ForImageClassification", "Dinov2Config", _VIT, image=32),
    _hf(
        _VISION,
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": _SIZES, "depths": [1, 1, 1, 1]},
        image=64,
    ),
    _hf(
        _VISION,
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": _SIZES, "depths": [1, 1, 1, 1]},
        image=64,
    ),
    _hf(
        _VISION,
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": _SIZES, "depths": [1, 1, 1, 1]},
        image=64,
    ),
    _hf(
        _VISION,
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        image=32,
    ),
    _hf(
        _VISION,
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        image=32,
    ),
    _hf(
        _VISION,
        "MobileNetV1ForImageClassification",
        "MobileNetV1Config",
        {"image_size": 64, "depth_multiplier": 0.25},
        image=64,
    ),
    _hf(
        _VISION,
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"image_size": 64, "depth_multiplier": 0.25},
        image=64,
    ),
    _hf(
        _VISION,
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
        image=64,
    ),
    _hf(
        _VISION,
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 16, "hidden_sizes": _SIZES, "depths": [1, 1, 1, 1], "groups_width": 16},
        image=64,
    ),
    _hf(
        _VISION,
        "BitForImageClassification",
        "BitConfig",
        {"embedding_size": 32, "hidden_sizes": [128, 128, 256, 256], "depths": [1, 1, 1, 1]},
        image=64,
    ),
    _hf(
        _VISION,
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": _SIZES, "depths": [1, 1, 1, 1]},
        image=64,
    ),
    _hf(
        _VISION,
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
            "num_attention_heads": 2,
        },
        image=64,
    ),
    _hf(
        _VISION,
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "hidden_sizes": _SIZES,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
            "num_encoder_blocks": 4,
        },
        image=64,
    ),
    _hf(
        _VISION,
        "PvtForImageClassification",
        "PvtConfig",
        {
            "image_size": 64,
            "hidden_sizes": _SIZES,
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
        },
        image=64,
    ),
    _hf(
        _VISION,
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 64], "depth": [1, 2, 3], "num_heads": [1, 2, 4]},
        image=64,
    ),
    _hf(
        _VISION,
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        image=32,
    ),
    _hf(
        _VISION,
        "LevitForImageClassification",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [1, 2, 3],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        image=64,
    ),
    _hf(_VISION, "SiglipForImageClassification", "SiglipConfig", {"vision_config": _VIT}, image=32),
    _hf(_VISION, "CLIPForImageClassification", "CLIPConfig", {"vision_config": _VIT}, image=32),
)

ARCHITECTURES: tuple[Architecture, ...] = (
    *_TEXT_ENCODERS,
    *_TEXT_DECODERS,
    *_ENCODER_DECODERS,
    *_VISION_MODELS,
    *(Architecture(name, "torch.nn", build) for name, build in PLAIN_NETWORKS.items()),
)
