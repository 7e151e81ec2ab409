"""Independent references for the layer API's tests: torch's own modules with copied weights, and
slow obvious versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from openwafer.layers import (
    MultiheadAttention,
    Transformer,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)


def assert_same(
    ours: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
) -> None:
    """Outputs, gradients of the inputs and of pairs (ours, reference) of weights are equal."""
    results = []
    for function in (ours, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        direction = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
        (output * direction).sum().backward()
        results.append((output, [leaf.grad for leaf in leaves]))
    (output, grads), (expected, expected_grads) = results
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=2e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
    for weight, expected_weight in weights:
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected_weight.grad, rtol=1e-5, atol=2e-5)


def randomize(module: nn.Module) -> None:
    """Weights away from their initial values, so that ones and zeros hide nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def copy_attention(source: MultiheadAttention, target: nn.MultiheadAttention) -> None:
    """torch keeps the three input projections in one matrix."""
    inputs = (source.proj_q_dense_layer, source.proj_k_dense_layer, source.proj_v_dense_layer)
    with torch.no_grad():
        target.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
        target.out_proj.weight.copy_(source.proj_output_dense_layer.weight)
        if target.in_proj_bias is not None:
            target.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
            target.out_proj.bias.copy_(source.proj_output_dense_layer.bias)


def copy_layer(
    source: TransformerEncoderLayer | TransformerDecoderLayer,
    target: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer,
) -> None:
    copy_attention(source.self_attn, target.self_attn)
    pairs = [(source.norm1, target.norm1), (source.norm2, target.norm2)]
    if isinstance(source, TransformerDecoderLayer):
        copy_attention(source.multihead_attn, target.multihead_attn)
        pairs.append((source.norm3, target.norm3))
    linear_layers = [layer.linear_layer for layer in source.ffn.ffn]
    pairs += zip(linear_layers, (target.linear1, target.linear2), strict=True)
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())


def copy_transformer(source: Transformer, target: nn.Transformer) -> None:
    for ours, theirs in ((source.encoder, target.encoder), (source.decoder, target.decoder)):
        theirs.norm.load_state_dict(ours.norm.state_dict())
        for ours_layer, theirs_layer in zip(ours.layers, theirs.layers, strict=True):
            copy_layer(ours_layer, theirs_layer)


def slow_attention(
    layer: MultiheadAttention,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    allowed: Callable[[int, int, int, int], bool] = lambda *_: True,
    added: Callable[[int, int, int, int], torch.Tensor | float] = lambda *_: 0.0,
) -> torch.Tensor:
    """Attention one number at a time. `allowed`, `added`: of (batch, head, query, key)."""
    q, k, v = (
        projection(x)
        for projection, x in zip(
            (layer.proj_q_dense_layer, layer.proj_k_dense_layer, layer.proj_v_dense_layer),
            inputs,
            strict=True,
        )
    )
    size = layer.embed_dim // layer.num_heads
    scale = 1 / math.sqrt(size) if layer.attention_type == "scaled_dot_product" else 1.0
    samples = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(layer.num_heads):
            part = slice(h * size, (h + 1) * size)
            rows = []
            for i in range(q.shape[1]):
                keys = [j for j in range(k.shape[1]) if allowed(b, h, i, j)]
                logits = torch.stack(
                    [q[b, i, part] @ k[b, j, part] * scale + added(b, h, i, j) for j in keys]
                )
                weights = logits.exp() / logits.exp().sum()
                rows.append(sum(w * v[b, j, part] for w, j in zip(weights, keys, strict=True)))
            heads.append(torch.stack(rows))
        samples.append(torch.cat(heads, dim=-1))
    return layer.proj_output_dense_layer(torch.stack(samples))
