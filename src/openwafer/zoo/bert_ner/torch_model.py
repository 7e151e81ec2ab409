"""BERT with a classifier of each token: named entities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.zoo.bert.torch_model import (
    Backbone,
    BackboneConfig,
    example_tokens,
    initial_linear,
)
from openwafer.zoo.losses import weighted_token_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ZooModel

__all__ = ["BertNer", "BertNerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertNerConfig(BackboneConfig):
    """The `model` section.

    num_classes: labels, as `B-Chemical`, `I-Chemical` and `O`.
    encoder_output_dropout_rate: before the classifier.
    loss_scaling: divide the summed losses by the number of tokens that count, or of samples.
    loss_weight: factor of the loss.
    """

    num_classes: int = field(metadata=SIZE)
    encoder_output_dropout_rate: float = field(default=0.1, metadata=RATE)
    loss_scaling: Literal["num_tokens", "batch_size"] = "num_tokens"
    loss_weight: float = field(default=1.0, metadata=limits(above=0.0))


class BertNer(ZooModel[BertNerConfig]):
    """A label for each token."""

    def __init__(self, config: BertNerConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, with_pooler=False)
        self.dropout = nn.Dropout(config.encoder_output_dropout_rate)
        self.classifier = initial_linear(config, config.hidden_size, config.num_classes)

    def logits(self, **batch: Tensor) -> Logits:
        """[batch, seq, num_classes], from input_ids, attention_mask, token_type_ids."""
        return self.classifier(self.dropout(self.backbone.hidden(batch)))

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """Cross entropy with labels [batch, seq] where loss_mask [batch, seq] is 1."""
        assert isinstance(logits, Tensor)
        config = self.config
        return weighted_token_loss(
            logits, batch["labels"], batch["loss_mask"], config.loss_scaling, config.loss_weight
        )

    def example_batch(self, batch_size: int) -> Batch:
        """Random tokens and labels."""
        batch = example_tokens(self.config, batch_size, self.device)
        shape = batch["input_ids"].shape
        batch["loss_mask"] = torch.ones(shape, dtype=torch.int64, device=self.device)
        batch["labels"] = torch.randint(0, self.config.num_classes, shape, device=self.device)
        return batch
