"""T5 (arXiv:1910.10683): an encoder-decoder that reads positions from relative distances.

A layer normalizes before attention and feed-forward network, and adds nothing but matrix products:
there are no biases, and attention's logits are not scaled. The bias for each distance is one table
for all layers of a stack, looked up once. With `use_t5_layer_norm` the arithmetic is that of
`transformers`' T5ForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.errors import ConfigError, nearest
from openwafer.layers import RelativePositionEmbeddingLayer, create_autoregressive_mask
from openwafer.layers.activations import ACTIVATIONS, get_activation
from openwafer.layers.masks import MASKED_LOGIT
from openwafer.zoo.model import SIZE
from openwafer.zoo.seq2seq import Seq2SeqConfig, Seq2SeqModel

__all__ = ["T5Config", "T5Model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config(Seq2SeqConfig):
    """The `model` section; see Seq2SeqConfig for the keys that Transformer has too.

    d_kv: features of each head, whatever d_model.
    encoder_nonlinearity, decoder_nonlinearity: an activation, or `gated-` and an activation for two
        products, one through the activation, multiplied (T5 1.1).
    relative_attention_num_buckets: rows of the table of distances.
    use_t5_layer_norm: divide by the root mean square, without mean or bias; else LayerNorm.
    use_dropout_outside_residual_path: dropout on each stack's output too.
    scale_output: multiply the output layer's input by 1/√d_model; None where the weights are
        shared, as T5 does.
    """

    d_kv: int = field(default=64, metadata=SIZE)
    encoder_nonlinearity: str = "relu"
    decoder_nonlinearity: str = "relu"
    relative_attention_num_buckets: int = field(default=32, metadata=limits(minimum=4))
    use_t5_layer_norm: bool = True
    layer_norm_epsilon: float = field(default=1e-6, metadata=limits(above=0.0))
    use_dropout_outside_residual_path: bool = True
    scale_output: bool | None = None

    @property
    def scales_output(self) -> bool:
        return self.share_embedding_weights if self.scale_output is None else self.scale_output


class T5Model(Seq2SeqModel[T5Config]):
    """Token tables, two stacks, and the output layer."""

    def __init__(self, config: T5Config) -> None:
        config.check_shared_embedding()
        super().__init__(config)
        self.shared = nn.Embedding(config.num_src_tokens, config.d_model)
        self.decoder_embedding = None
        if not config.share_encoder_decoder_embedding:
            self.decoder_embedding = nn.Embedding(config.num_tgt_tokens, config.d_model)
        self.encoder = T5Stack(config, decoder=False)
        self.decoder = T5Stack(config, decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.num_tgt_tokens, bias=False)
        if config.share_embedding_weights:
            self.lm_head.weight = (self.decoder_embedding or self.shared).weight
        self._output_scale = config.d_model**-0.5 if config.scales_output else 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as T5 does: embeddings with deviation 1, products so that their results
        keep the deviation of their inputs, queries smaller by √d_kv in place of scaled logits."""
        for table in (self.shared, self.decoder_embedding):
            if table is not None:
                nn.init.normal_(table.weight)
        if not self.config.share_embedding_weights:
            nn.init.normal_(self.lm_head.weight)
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.shared(input_ids), _key_bias(attention_mask))

    def decode(
        self,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
        memory: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        embedding = self.decoder_embedding or self.shared
        length = decoder_input_ids.shape[1]
        future = create_autoregressive_mask(length, dtype=torch.float32, device=memory.device)
        hidden = self.decoder(
            embedding(decoder_input_ids),
            _key_bias(decoder_attention_mask) + future * MASKED_LOGIT,
            memory,
            _key_bias(attention_mask),
        )
        return self.lm_head(hidden * self._output_scale)


class T5Stack(nn.Module):
    """The encoder, or the decoder."""

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        before = config.use_pre_encoder_decoder_dropout
        after = config.use_dropout_outside_residual_path
        self.dropout_before = nn.Dropout(config.dropout_rate if before else 0.0)
        self.relative_position = RelativePositionEmbeddingLayer(
            config.num_heads,
            num_relative_attention_buckets=config.relative_attention_num_buckets,
            bidirectional_relative_attention=not decoder,
            relative_attn_bias_initializer={"name": "normal", "std": config.d_model**-0.5},
        )
        num_layers = (
            config.decoder_num_hidden_layers if decoder else config.encoder_num_hidden_layers
        )
        self.layers = nn.ModuleList(T5Layer(config, decoder=decoder) for _ in range(num_layers))
        self.norm = _norm(config)
        self.dropout_after = nn.Dropout(config.dropout_rate if after else 0.0)

    def reset_parameters(self) -> None:
        self.relative_position.reset_parameters()
        for layer in self.layers:
            assert isinstance(layer, T5Layer)
            layer.reset_parameters()

    def forward(
        self,
        hidden: Tensor,
        mask_bias: Tensor,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
    ) -> Tensor:
        """[batch, seq, d_model] → the same.

        Args:
            mask_bias: added to self-attention's logits, [batch, 1, 1 or seq, seq].
            memory: what the decoder attends to, [batch, src_seq, d_model].
            memory_bias: added to those logits, [batch, 1, 1, src_seq].
        """
        length = hidden.shape[1]
        bias = self.relative_position(length, length) + mask_bias
        hidden = self.dropout_before(hidden)
        for layer in self.layers:
            hidden = layer(hidden, bias, memory, memory_bias)
        return self.dropout_after(self.norm(hidden))


class T5Layer(nn.Module):
    """Self-attention, in the decoder attention to the encoder's output, a feed-forward network."""

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        self.self_attention_norm = _norm(config)
        self.self_attention = T5Attention(config)
        if decoder:
            self.cross_attention_norm = _norm(config)
            self.cross_attention = T5Attention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = T5FeedForward(config, decoder=decoder)
        self.dropout = nn.Dropout(config.dropout_rate)

    def reset_parameters(self) -> None:
        for part in self.children():
            if isinstance(part, (T5Attention, T5FeedForward)):
                part.reset_parameters()

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
    ) -> Tensor:
        """[batch, seq, d_model] → the same; see T5Stack.forward, `bias` with the positions'."""
        normed = self.self_attention_norm(hidden)
        hidden = hidden + self.dropout(self.self_attention(normed, normed, bias))
        if memory is not None:
            assert memory_bias is not None
            normed = self.cross_attention_norm(hidden)
            hidden = hidden + self.dropout(self.cross_attention(normed, memory, memory_bias))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class T5Attention(nn.Module):
    """softmax(q kᵀ + bias) v with `num_heads` heads of `d_kv` features."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        rate = config.attention_dropout_rate
        self.dropout_rate = config.dropout_rate if rate is None else rate

    def reset_parameters(self) -> None:
        d_model, inner = self.q.in_features, self.q.out_features
        nn.init.normal_(self.q.weight, std=(d_model * self.d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=d_model**-0.5)
        nn.init.normal_(self.v.weight, std=d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def forward(self, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        """[batch, query, d_model]; `keys` [batch, key, d_model]; `bias` is added to the logits."""
        query = self._split_heads(self.q(queries))
        attended = F.scaled_dot_product_attention(
            query,
            self._split_heads(self.k(keys)),
            self._split_heads(self.v(keys)),
            attn_mask=bias.to(query.dtype),
            dropout_p=self.dropout_rate if self.training else 0.0,
            scale=1.0,
        )
        return self.o(attended.transpose(1, 2).flatten(-2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.d_kv)).transpose(1, 2)


class T5FeedForward(nn.Module):
    """wo(f(wi x)), or with a gate wo(f(wi x) · wi_gate x)."""

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        name = config.decoder_nonlinearity if decoder else config.encoder_nonlinearity
        self.activation, gated = _activation(name)
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_gate = nn.Linear(config.d_model, config.d_ff, bias=False) if gated else None
        rate = config.relu_dropout_rate
        self.dropout = nn.Dropout(config.dropout_rate if rate is None else rate)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        for layer in (self.wi, self.wi_gate, self.wo):
            if layer is not None:
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, d_model] → the same."""
        inner = self.activation(self.wi(x))
        if self.wi_gate is not None:
            inner = inner * self.wi_gate(x)
        return self.wo(self.dropout(inner))


def _norm(config: T5Config) -> nn.Module:
    kind = nn.RMSNorm if config.use_t5_layer_norm else nn.LayerNorm
    return kind(config.d_model, eps=config.layer_norm_epsilon)


def _activation(name: str) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The function, and whether it gates a second product."""
    gated = name.startswith("gated-")
    plain = name.removeprefix("gated-")
    if plain.lower() not in ACTIVATIONS:
        raise ConfigError(
            f"there is no nonlinearity {name!r}",
            where="model.encoder_nonlinearity, model.decoder_nonlinearity",
            allowed=", ".join(sorted(ACTIVATIONS)) + "; with `gated-` in front",
            hint=nearest(plain, ACTIVATIONS),
        )
    return get_activation(plain), gated


def _key_bias(mask: Tensor) -> Tensor:
    """0 for real tokens, MASKED_LOGIT for padding: [batch, seq] → [batch, 1, 1, seq], float32."""
    return (1.0 - mask.float())[:, None, None, :] * MASKED_LOGIT
