"""What T5 and Transformer share: a source is encoded, a target is predicted token by token.

Decides the batch's names, the loss, greedy decoding and the metrics. Does not decide what an
encoder or a decoder is.

Batches: input_ids, attention_mask [batch, src_seq]; decoder_input_ids, decoder_attention_mask,
labels [batch, tgt_seq], all int64, masks 1 where a token is real; optionally loss_weight
[batch, 1], float32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from openwafer.config.schema import limits
from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics import AccuracyMetric, PerplexityMetric
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.losses import token_losses, weighted_token_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ModelConfig, ZooModel

__all__ = ["Seq2SeqConfig", "Seq2SeqMetrics", "Seq2SeqModel"]

S = TypeVar("S", bound="Seq2SeqConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqConfig(ModelConfig):
    """Keys of both families.

    src_vocab_size, tgt_vocab_size: tokens; None or 0 for a target with the source's vocabulary.
    extra_ids: further tokens (sentinels of span corruption) after them.
    src_max_sequence_length, tgt_max_sequence_length: of the example batch, and so of compilation.
    d_model: features; d_ff: inside the feed-forward network.
    share_encoder_decoder_embedding: one token table for source and target.
    share_embedding_weights: the output layer's weight is the target's token table.
    use_pre_encoder_decoder_dropout: dropout on each stack's input.
    relu_dropout_rate: inside the feed-forward network; attention_dropout_rate: on attention's
        weights; None for dropout_rate.
    label_smoothing: weight of the uniform distribution in the loss.
    loss_scaling: the summed loss of the tokens is divided by their number, or by the batch size as
        in release 1.6. Where a batch brings `loss_weight` it is always the batch size.
    lm_loss_weight: a factor on the loss.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("encoder_num_hidden_layers", "decoder_num_hidden_layers"),
        "heads": ("num_heads",),
        "width": ("d_model",),
    }

    src_vocab_size: int = field(metadata=SIZE)
    tgt_vocab_size: int | None = field(default=None, metadata=limits(minimum=0))
    extra_ids: int = field(default=0, metadata=limits(minimum=0))
    src_max_sequence_length: int = field(default=512, metadata=SIZE)
    tgt_max_sequence_length: int = field(default=512, metadata=SIZE)
    d_model: int = field(default=512, metadata=SIZE)
    d_ff: int = field(default=2048, metadata=SIZE)
    num_heads: int = field(default=8, metadata=SIZE)
    encoder_num_hidden_layers: int = field(default=6, metadata=SIZE)
    decoder_num_hidden_layers: int = field(default=6, metadata=SIZE)
    share_encoder_decoder_embedding: bool = True
    share_embedding_weights: bool = True
    use_pre_encoder_decoder_dropout: bool = True
    dropout_rate: float = field(default=0.1, metadata=RATE)
    relu_dropout_rate: float | None = field(default=None, metadata=RATE)
    attention_dropout_rate: float | None = field(default=None, metadata=RATE)
    label_smoothing: float = field(default=0.0, metadata=RATE)
    loss_scaling: Literal["num_tokens", "batch_size"] = "num_tokens"
    lm_loss_weight: float = field(default=1.0, metadata=limits(above=0.0))

    @property
    def num_src_tokens(self) -> int:
        return self.src_vocab_size + self.extra_ids

    @property
    def num_tgt_tokens(self) -> int:
        return (self.tgt_vocab_size or self.src_vocab_size) + self.extra_ids

    def check_shared_embedding(self) -> None:
        """Raises: ConfigError: one table for two vocabularies."""
        if self.share_encoder_decoder_embedding and self.num_src_tokens != self.num_tgt_tokens:
            raise ConfigError(
                f"source and target share an embedding, but have {self.num_src_tokens} and "
                f"{self.num_tgt_tokens} tokens",
                where="model.share_encoder_decoder_embedding",
                allowed="one vocabulary for both, or share_encoder_decoder_embedding: False",
            )


class Seq2SeqModel(ZooModel[S]):
    """An encoder and a decoder; subclasses give the two."""

    @abstractmethod
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, src_seq] → [batch, src_seq, d_model]."""

    @abstractmethod
    def decode(
        self,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
        memory: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """The logits of every target position, [batch, tgt_seq, tokens].

        Args:
            decoder_input_ids, decoder_attention_mask: [batch, tgt_seq].
            memory: the encoder's output; attention_mask: of the source.
        """

    def logits(self, **batch: Tensor) -> Tensor:
        memory = self.encode(batch["input_ids"], batch["attention_mask"])
        return self.decode(
            batch["decoder_input_ids"],
            batch["decoder_attention_mask"],
            memory,
            batch["attention_mask"],
        )

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        assert isinstance(logits, Tensor)
        config, weights = self.config, batch["decoder_attention_mask"]
        scaling: str = config.loss_scaling
        if "loss_weight" in batch:
            weights, scaling = weights * batch["loss_weight"], "batch_size"
        return weighted_token_loss(
            logits,
            batch["labels"],
            weights,
            scaling,
            config.lm_loss_weight,
            label_smoothing=config.label_smoothing,
        )

    def predictions(self, logits: Logits, **batch: Tensor) -> Batch:
        """The most likely token at each target position, given the right ones before it (see
        `generate` for decoding without them); 0 behind the target's end."""
        assert isinstance(logits, Tensor)
        return {"prediction": logits.argmax(-1) * batch["decoder_attention_mask"]}

    def example_batch(self, batch_size: int) -> Batch:
        config, device = self.config, self.device
        source = (batch_size, config.src_max_sequence_length)
        target = (batch_size, config.tgt_max_sequence_length)
        return {
            "input_ids": torch.randint(0, config.num_src_tokens, source, device=device),
            "attention_mask": torch.ones(source, dtype=torch.int64, device=device),
            "decoder_input_ids": torch.randint(0, config.num_tgt_tokens, target, device=device),
            "decoder_attention_mask": torch.ones(target, dtype=torch.int64, device=device),
            "labels": torch.randint(0, config.num_tgt_tokens, target, device=device),
        }

    @torch.no_grad()
    def generate(self, batch: Batch, max_length: int, *, eos_id: int | None = None) -> Tensor:
        """Decode greedily, each token from those before it; in plain PyTorch, without a cache.

        Args:
            batch: input_ids, attention_mask, and decoder_input_ids, whose first column starts.
            eos_id: tokens after this one are 0.

        Returns:
            [batch, max_length], int64. The model is left in the mode that it was in.
        """
        was_training = self.training
        self.eval()
        try:
            memory = self.encode(batch["input_ids"], batch["attention_mask"])
            tokens = batch["decoder_input_ids"][:, :1]
            ended = torch.zeros_like(tokens, dtype=torch.bool)
            for _ in range(max_length):
                mask = torch.ones_like(tokens)
                logits = self.decode(tokens, mask, memory, batch["attention_mask"])
                following = logits[:, -1:].argmax(-1).masked_fill(ended, 0)
                tokens = torch.cat([tokens, following], dim=1)
                if eos_id is not None:
                    ended = ended | (following == eos_id)
            return tokens[:, 1:]
        finally:
            self.train(was_training)


class Seq2SeqMetrics(EvalMetrics):
    """`eval/accuracy_lm` and `eval/perplexity_lm` over the real target tokens, each predicted from
    the right ones before it; `eval/accuracy_sequence`: targets with every token right, which is
    what greedy decoding would get right too."""

    def __init__(self, config: ModelConfig, info: Any) -> None:
        self._accuracy = AccuracyMetric(name="eval/accuracy_lm")
        self._perplexity = PerplexityMetric(name="eval/perplexity_lm")
        self._sequence = AccuracyMetric(name="eval/accuracy_sequence")

    def update(self, logits: Logits, batch: Batch) -> None:
        assert isinstance(logits, Tensor)
        labels, mask = batch["labels"], batch["decoder_attention_mask"]
        predicted = logits.argmax(-1)
        self._accuracy(labels=labels, predictions=predicted, weights=mask)
        total = (token_losses(logits, labels) * mask).sum()
        self._perplexity(labels=labels, loss=total, weights=mask)
        mistakes = ((predicted != labels) * mask).sum(-1)
        self._sequence(
            labels=torch.zeros_like(mistakes),
            predictions=mistakes,
            weights=mask.amax(-1),
        )
