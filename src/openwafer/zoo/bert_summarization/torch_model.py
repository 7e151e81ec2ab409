"""BERT that chooses the sentences of a summary (BertSum, arXiv:1903.10318).

Each sentence begins with a token of its own, whose last hidden state says how likely the sentence
belongs to the summary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.zoo.bert.torch_model import (
    Backbone,
    BackboneConfig,
    example_tokens,
    initial_linear,
)
from openwafer.zoo.losses import weighted_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ZooModel

__all__ = ["BertSummarization", "BertSummarizationConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertSummarizationConfig(BackboneConfig):
    """The `model` section.

    encoder_output_dropout_rate: before the classifier.
    loss_scaling: divide the summed losses by the number of sentences, or of samples.
    loss_weight: factor of the loss.
    max_cls_tokens: sentences in an example batch.
    """

    encoder_output_dropout_rate: float = field(default=0.0, metadata=RATE)
    loss_scaling: Literal["num_tokens", "batch_size"] = "num_tokens"
    loss_weight: float = field(default=1.0, metadata=limits(above=0.0))
    max_cls_tokens: int = field(default=50, metadata=SIZE)


class BertSummarization(ZooModel[BertSummarizationConfig]):
    """A score for each sentence."""

    def __init__(self, config: BertSummarizationConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, with_pooler=False)
        self.dropout = nn.Dropout(config.encoder_output_dropout_rate)
        self.classifier = initial_linear(config, config.hidden_size, 1)

    def logits(self, **batch: Tensor) -> Logits:
        """[batch, sentences].

        Batch: input_ids, attention_mask, token_type_ids [batch, seq]; cls_indices
        [batch, sentences], where the sentences begin.
        """
        hidden = self.backbone.hidden(batch)
        places = batch["cls_indices"].long()[..., None].expand(-1, -1, hidden.shape[-1])
        return self.classifier(self.dropout(hidden.gather(1, places)))[..., 0]

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """Binary cross entropy with labels [batch, sentences], 1 in the summary, where cls_weights
        [batch, sentences] is 1."""
        assert isinstance(logits, Tensor)
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), batch["labels"].to(torch.float32), reduction="none"
        )
        config = self.config
        return weighted_loss(losses, batch["cls_weights"], config.loss_scaling, config.loss_weight)

    def predictions(self, logits: Logits, **batch: Tensor) -> Batch:
        """`probability` [batch, sentences] of each sentence; 0 where there is none."""
        assert isinstance(logits, Tensor)
        return {"probability": torch.sigmoid(logits.float()) * batch["cls_weights"]}

    def example_batch(self, batch_size: int) -> Batch:
        """Random tokens, sentences and labels."""
        config, device = self.config, self.device
        shape = (batch_size, config.max_cls_tokens)
        batch = example_tokens(config, batch_size, device)
        batch["labels"] = torch.randint(0, 2, shape, device=device)
        batch["cls_indices"] = torch.randint(0, config.sequence_length, shape, device=device)
        batch["cls_weights"] = torch.ones(shape, device=device)
        return batch
