"""Linformer and RoBERTa: full attention where the projection changes nothing, padding, sizes."""

from __future__ import annotations

import pytest
import torch
from bert_reference import (
    LENGTH,
    masked_tokens,
    slow,
    small,
    text_batch,
    wider,
    with_filling_rows,
)

import openwafer
from openwafer.zoo import bert, linformer, roberta

STYLES = {
    # style: shapes of the projections of two layers with three heads
    "linformer": [(3, 8, 15)] * 4,
    "linformer-shared-heads": [(8, 15)] * 4,
    "linformer-shared-kv": [(8, 15)] * 2,
    "linformer-shared-layers": [(8, 15)],
}


def projections(model):
    return {name: w for name, w in model.named_parameters() if "projection" in name}


@pytest.mark.parametrize("style", STYLES)
def test_projections_are_shared_as_the_style_says(style):
    model = small(linformer.FAMILY, attention_style=style, projected_dims=8)
    assert [tuple(w.shape) for w in projections(model).values()] == STYLES[style]
    batch, _ = masked_tokens(text_batch())
    model(**batch).backward()
    assert all(weight.grad.abs().max() > 0 for weight in projections(model).values())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pre_normalization", [False, True])
def test_with_identity_projections_it_is_full_attention(style, pre_normalization):
    changes = {"disable_nsp": True, "use_pre_normalization": pre_normalization}
    changes["use_segment_embedding"] = False
    full = small(bert.FAMILY, **changes)
    model = small(linformer.FAMILY, **changes, attention_style=style, projected_dims=LENGTH)
    identity = torch.eye(LENGTH, LENGTH + 3)
    same = {name: identity.expand(w.shape).clone() for name, w in projections(model).items()}
    model.load_state_dict({**full.state_dict(), **same}, strict=True)
    batch, _ = masked_tokens(text_batch())
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    wanted, logits = full.logits(**batch), model.logits(**batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    full.loss(wanted, **batch).backward()
    model.loss(logits, **batch).backward()
    for name, weight in full.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).grad, weight.grad, atol=1e-4, rtol=1e-4
        )


def test_attention_is_the_papers_formula():
    """One head at a time, arXiv:2006.04768 equation 7: softmax(Q Wq (E K Wk)ᵀ / √d) F V Wv."""
    attention = (
        small(linformer.FAMILY, attention_style="linformer", projected_dims=5)
        .backbone.encoder.layers[0]
        .self_attn
    )
    hidden = torch.randn(1, LENGTH, 24, generator=torch.Generator().manual_seed(5))
    heads = []
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        q, k, v = (
            hidden[0] @ layer.weight[part].T + layer.bias[part]
            for layer in (
                attention.proj_q_dense_layer,
                attention.proj_k_dense_layer,
                attention.proj_v_dense_layer,
            )
        )
        mix_keys = attention.key_projection[head, :, :LENGTH]
        mix_values = attention.value_projection[head, :, :LENGTH]
        chances = torch.softmax(q @ (mix_keys @ k).T / 8**0.5, dim=-1)
        heads.append(chances @ (mix_values @ v))
    expected = attention.proj_output_dense_layer(torch.cat(heads, dim=-1))
    is_token = torch.ones(1, LENGTH, 1)
    torch.testing.assert_close(attention(hidden, is_token, None)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((linformer.FAMILY, {"attention_style": style, "projected_dims": 4}) for style in STYLES),
        (roberta.FAMILY, {}),
    ],
)
def test_padding_and_filling_rows_change_nothing(family, changes):
    model = small(family, **changes)
    batch, _ = masked_tokens(text_batch())
    logits = model.logits(**batch)
    torch.testing.assert_close(model.logits(**wider(batch)), logits)
    torch.testing.assert_close(model(**with_filling_rows(batch)), model.loss(logits, **batch))


def test_roberta_begins_after_the_padding_token():
    model = small(roberta.FAMILY, pad_token_id=4)
    assert model.backbone.embeddings.get_parameter("position_embeddings.weight").shape[0] == 15 + 5
    batch, _ = masked_tokens(text_batch())
    model(**batch).backward()
    used = model.backbone.embeddings.get_parameter("position_embeddings.weight").grad
    assert used.abs().sum(1).nonzero().flatten().tolist() == list(range(5, 5 + LENGTH))


# Fact sheet section 7: no pooler, tables of 512 positions; RoBERTa with the published two unused
# positions and one segment (768 · 3 parameters), Linformer without its projections.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("roberta/base", 108.3),
        slow("roberta/large", 333.6),
        ("linformer/base_shared_heads", 109.5),
        slow("linformer/base_shared_kv", 109.5),
        slow("linformer/large_shared_heads", 335.2),
        ("linformer/large_shared_kv", 335.2),
    ],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = openwafer.zoo.build(name)
    mixing = sum(weight.numel() for weight in projections(model).values())
    assert round((model.num_parameters - mixing) / 1e6, 1) == millions
    pairs = 2 if "heads" in name else 1
    layers, dims = (12, 256) if "base" in name else (24, 128)
    assert mixing == (pairs * layers * dims * 512 if "linformer" in name else 0)
