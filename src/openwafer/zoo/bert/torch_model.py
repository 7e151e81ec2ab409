"""BERT: a transformer encoder, pre-trained to find masked tokens and to tell whether two texts
belong together (arXiv:1810.04805).

Decides the backbone, which the fine-tuning families share under the same parameter names, and the
two heads and losses of pre-training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.errors import ConfigError
from openwafer.layers import EmbeddingLayer, TransformerEncoder, TransformerEncoderLayer
from openwafer.layers.activations import get_activation
from openwafer.layers.initializers import Initializer, create_initializer
from openwafer.layers.masks import MASKED_LOGIT
from openwafer.zoo.losses import weighted_loss, weighted_token_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ModelConfig, ZooModel

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Bert",
    "BertConfig",
    "example_tokens",
    "initial_linear",
    "normal_initializer",
    "rows_that_count",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneConfig(ModelConfig):
    """What BERT and the models fine-tuned from it have in common; the defaults are BERT base.

    vocab_size: tokens.
    hidden_size, num_hidden_layers, num_heads, filter_size: width, depth, attention heads, and the
        width between the two feed-forward layers.
    embedding_size: width of the embeddings where it is not `hidden_size`; a projection follows.
    max_position_embeddings: longest sequence.
    max_sequence_length: length of example batches; null for `max_position_embeddings`.
    num_segments: rows of the segment table.
    use_pre_normalization: normalize before attention and feed-forward, and once at the end.
    initializer_range: standard deviation of the initial weights, cut off at twice that.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("num_hidden_layers",),
        "heads": ("num_heads",),
        "width": ("hidden_size",),
    }

    vocab_size: int = field(metadata=SIZE)
    hidden_size: int = field(default=768, metadata=SIZE)
    embedding_size: int | None = field(default=None, metadata=SIZE)
    num_hidden_layers: int = field(default=12, metadata=SIZE)
    num_heads: int = field(default=12, metadata=SIZE)
    filter_size: int = field(default=3072, metadata=SIZE)
    encoder_nonlinearity: str = "gelu"
    dropout_rate: float = field(default=0.1, metadata=RATE)
    attention_dropout_rate: float = field(default=0.1, metadata=RATE)
    layer_norm_epsilon: float = field(default=1e-5, metadata=limits(above=0.0))
    max_position_embeddings: int = field(default=512, metadata=SIZE)
    max_sequence_length: int | None = field(default=None, metadata=SIZE)
    position_embedding_type: Literal["learned", "fixed"] = "learned"
    use_position_embedding: bool = True
    use_segment_embedding: bool = True
    num_segments: int = field(default=2, metadata=SIZE)
    attention_type: Literal["scaled_dot_product", "dot_product"] = "scaled_dot_product"
    use_projection_bias_in_attention: bool = True
    use_ffn_bias_in_attention: bool = True
    use_ffn_bias: bool = True
    use_pre_normalization: bool = False
    initializer_range: float = field(default=0.02, metadata=limits(above=0.0))

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token takes."""
        return 0

    @property
    def sequence_length(self) -> int:
        """Tokens in a sequence of an example batch."""
        return self.max_sequence_length or self.max_position_embeddings


class Backbone(nn.Module):
    """Embeddings and encoder, and the pooler where a head asks for it.

    Args:
        encoder: takes the place of the transformer encoder.
    """

    def __init__(
        self, config: BackboneConfig, *, with_pooler: bool, encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        width, embedding_size = config.hidden_size, config.embedding_size or config.hidden_size
        initializer = normal_initializer(config)
        self.first_position = config.first_position
        self.num_segments = config.num_segments if config.use_segment_embedding else 0
        self.embeddings = EmbeddingLayer(
            config.vocab_size,
            embedding_size,
            embeddings_initializer=initializer,
            max_position_embeddings=config.max_position_embeddings + config.first_position,
            position_embedding_type=(
                config.position_embedding_type if config.use_position_embedding else None
            ),
            position_embeddings_initializer=initializer,
            num_segments=self.num_segments,
            segment_embeddings_initializer=initializer,
        )
        self.embedding_norm = nn.LayerNorm(embedding_size, eps=config.layer_norm_epsilon)
        self.embedding_dropout = nn.Dropout(config.dropout_rate)
        self.embedding_projection = (
            initial_linear(config, embedding_size, width) if embedding_size != width else None
        )
        self.encoder = _encoder(config, initializer) if encoder is None else encoder
        self.pooler = initial_linear(config, width, width) if with_pooler else None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        """The last hidden states, [batch, seq, hidden].

        Args:
            input_ids, token_type_ids: [batch, seq], integers; no segments stand for the first one.
            attention_mask: [batch, seq], 1 on tokens, 0 on padding, which comes last.
        """
        segments = None
        if self.num_segments:
            # A table of one row has nothing to choose from.
            use_zeros = token_type_ids is None or self.num_segments == 1
            segments = torch.zeros_like(input_ids) if use_zeros else token_type_ids
        hidden = self.embeddings(input_ids, segments, past_length=self.first_position)
        hidden = self.embedding_dropout(self.embedding_norm(hidden))
        if self.embedding_projection is not None:
            hidden = self.embedding_projection(hidden)
        padding = (attention_mask == 0).to(torch.float32) * MASKED_LOGIT
        return self.encoder(hidden, src_key_padding_mask=padding)

    def hidden(self, batch: Batch) -> Tensor:
        """`forward` of a batch's input_ids, attention_mask and, if it has some, token_type_ids."""
        return self(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    def pooled(self, hidden: Tensor) -> Tensor:
        """The sequence as one vector, from its first token: [batch, hidden]."""
        assert self.pooler is not None, "this backbone was built without a pooler"
        return torch.tanh(self.pooler(hidden[:, 0]))


def _encoder(config: BackboneConfig, initializer: Initializer) -> TransformerEncoder:
    layer = TransformerEncoderLayer(
        config.hidden_size,
        config.num_heads,
        config.filter_size,
        dropout=config.dropout_rate,
        activation=config.encoder_nonlinearity,
        layer_norm_eps=config.layer_norm_epsilon,
        norm_first=config.use_pre_normalization,
        attention_dropout_rate=config.attention_dropout_rate,
        attention_type=config.attention_type,
        use_projection_bias_in_attention=config.use_projection_bias_in_attention,
        use_ffn_bias_in_attention=config.use_ffn_bias_in_attention,
        use_ffn_bias=config.use_ffn_bias,
        attention_initializer=initializer,
        ffn_initializer=initializer,
    )
    last_norm = (
        nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        if config.use_pre_normalization
        else None
    )
    return TransformerEncoder(layer, config.num_hidden_layers, norm=last_norm)


def normal_initializer(config: BackboneConfig) -> Initializer:
    """Normally distributed with standard deviation `initializer_range`, cut off at twice that."""
    std = config.initializer_range
    return create_initializer({"name": "truncated_normal", "std": std, "a": -2 * std, "b": 2 * std})


def initial_linear(
    config: BackboneConfig, in_features: int, out_features: int, bias: bool = True
) -> nn.Linear:
    """A linear layer with this configuration's initial weights."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    normal_initializer(config)(layer.weight.data)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rows_that_count(attention_mask: Tensor) -> Tensor:
    """[batch]: 1 for a sample, 0 for a row that only fills the last batch (it has no tokens)."""
    return attention_mask[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig(BackboneConfig):
    """The `model` section of BERT's pre-training.

    disable_nsp: masked tokens only; there is no pooler then.
    num_cls_classes: classes of the next-sentence head.
    share_embedding_weights: the output layer is the token table.
    use_ffn_bias_in_mlm, use_output_bias_in_mlm: biases of the two layers of the masked-token head.
    mlm_loss_scaling: what the sum of the masked tokens' losses is divided by: `num_tokens`, their
        number in the batch; `batch_size`, times `mlm_loss_scale` where the batch has one
        (`dynamic_mlm_scale: True` in the input); `precomputed_num_masked`, the same, and the batch
        must have it.
    mlm_loss_weight: factor of that loss.
    max_predictions_per_seq: masked tokens of a sequence in example batches; 0 for labels at every
        position (`gather_mlm_labels: False` in the input).
    """

    disable_nsp: bool = False
    num_cls_classes: int = field(default=2, metadata=SIZE)
    share_embedding_weights: bool = True
    mlm_nonlinearity: str = "gelu"
    use_ffn_bias_in_mlm: bool = True
    use_output_bias_in_mlm: bool = True
    mlm_loss_scaling: Literal["num_tokens", "batch_size", "precomputed_num_masked"] = "num_tokens"
    mlm_loss_weight: float = field(default=1.0, metadata=limits(minimum=0.0))
    max_predictions_per_seq: int = field(default=20, metadata=limits(minimum=0))


class MaskedTokenHead(nn.Module):
    """Which token stands behind a mask: a layer of its own, then the token table transposed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.dense = initial_linear(config, config.hidden_size, size, config.use_ffn_bias_in_mlm)
        self.nonlinearity = get_activation(config.mlm_nonlinearity)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_epsilon)
        self.table = None
        if not config.share_embedding_weights:
            self.table = nn.Parameter(torch.empty(config.vocab_size, size))
            normal_initializer(config)(self.table.data)
        self.bias = (
            nn.Parameter(torch.zeros(config.vocab_size)) if config.use_output_bias_in_mlm else None
        )

    def forward(self, hidden: Tensor, token_table: Tensor) -> Tensor:
        """[..., hidden] → [..., vocab]; the token table is [vocab, embedding]."""
        hidden = self.norm(self.nonlinearity(self.dense(hidden)))
        return F.linear(hidden, token_table if self.table is None else self.table, self.bias)


class Bert(ZooModel[BertConfig]):
    """BERT with its pre-training heads.

    Args:
        encoder: takes the place of the transformer encoder.
    """

    def __init__(self, config: BertConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, with_pooler=not config.disable_nsp, encoder=encoder)
        self.masked_token_head = MaskedTokenHead(config)
        self.next_sentence_head = None
        if not config.disable_nsp:
            self.next_sentence_head = initial_linear(
                config, config.hidden_size, config.num_cls_classes
            )

    def logits(self, **batch: Tensor) -> Logits:
        """`masked_lm` [batch, masked, vocab] and, with NSP, `next_sentence` [batch, 2].

        Batch: input_ids, attention_mask, token_type_ids [batch, seq]; masked_lm_positions
        [batch, masked], without which every position is predicted.
        """
        hidden = self.backbone.hidden(batch)
        masked = hidden
        if "masked_lm_positions" in batch:
            positions = batch["masked_lm_positions"].long()
            masked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        table = self.backbone.embeddings.get_input_embeddings().get_parameter("weight")
        heads = {"masked_lm": self.masked_token_head(masked, table)}
        if self.next_sentence_head is not None:
            heads["next_sentence"] = self.next_sentence_head(self.backbone.pooled(hidden))
        return heads

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """Masked tokens, plus next sentence.

        Batch: labels, masked_lm_mask [batch, masked], next_sentence_label [batch, 1],
        mlm_loss_scale [batch, 1] (see `mlm_loss_scaling`).
        """
        assert isinstance(logits, dict)
        loss = self._masked_lm_loss(logits["masked_lm"], **batch)
        if "next_sentence" not in logits:
            return loss
        labels = batch["next_sentence_label"].reshape(-1).long()
        losses = F.cross_entropy(logits["next_sentence"], labels, reduction="none")
        return loss + weighted_loss(losses, rows_that_count(batch["attention_mask"]), "num_tokens")

    def _masked_lm_loss(self, logits: Tensor, **batch: Tensor) -> Tensor:
        weights, scaling = batch["masked_lm_mask"], self.config.mlm_loss_scaling
        if scaling != "num_tokens" and "mlm_loss_scale" in batch:
            weights = weights * batch["mlm_loss_scale"]
        elif scaling == "precomputed_num_masked":
            raise ConfigError(
                "mlm_loss_scaling is precomputed_num_masked, and the batch has no mlm_loss_scale",
                where="model.mlm_loss_scaling",
                allowed="num_tokens, batch_size, or an input with dynamic_mlm_scale: True",
            )
        return weighted_token_loss(
            logits, batch["labels"], weights, scaling, self.config.mlm_loss_weight
        )

    def example_batch(self, batch_size: int) -> Batch:
        """Random tokens; the batch of the documented BERT input."""
        config = self.config
        length, device = config.sequence_length, self.device
        num_masked = config.max_predictions_per_seq
        masked_shape = (batch_size, num_masked or length)
        batch = example_tokens(config, batch_size, device, with_segments=not config.disable_nsp)
        if num_masked:
            batch["masked_lm_positions"] = torch.randint(1, length, masked_shape, device=device)
        batch["masked_lm_mask"] = torch.ones(masked_shape, dtype=torch.int64, device=device)
        batch["labels"] = torch.randint(0, config.vocab_size, masked_shape, device=device)
        if not config.disable_nsp:
            batch["next_sentence_label"] = torch.randint(0, 2, (batch_size, 1), device=device)
        if config.mlm_loss_scaling == "precomputed_num_masked":
            batch["mlm_loss_scale"] = torch.ones((batch_size, 1), device=device)
        return batch


def example_tokens(
    config: BackboneConfig, batch_size: int, device: torch.device, *, with_segments: bool = True
) -> Batch:
    """input_ids, attention_mask and token_type_ids [batch, seq], int64, without padding."""
    shape = (batch_size, config.sequence_length)
    batch = {
        "input_ids": torch.randint(0, config.vocab_size, shape, device=device),
        "attention_mask": torch.ones(shape, dtype=torch.int64, device=device),
    }
    if with_segments:
        batch["token_type_ids"] = torch.randint(0, config.num_segments, shape, device=device)
    return batch
