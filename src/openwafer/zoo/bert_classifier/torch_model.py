"""BERT with a classifier of whole texts or pairs of texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.zoo.bert.torch_model import (
    Backbone,
    BackboneConfig,
    example_tokens,
    initial_linear,
    rows_that_count,
)
from openwafer.zoo.losses import weighted_loss
from openwafer.zoo.model import RATE, SIZE, Batch, Logits, ZooModel

__all__ = ["BertClassifier", "BertClassifierConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertClassifierConfig(BackboneConfig):
    """The `model` section.

    num_labels: classes.
    task_dropout: rate before the classifier.
    problem_type: one of the classes is right for each text.
    """

    num_labels: int = field(metadata=SIZE)
    task_dropout: float = field(default=0.1, metadata=RATE)
    problem_type: Literal["single_label_classification"] = "single_label_classification"


class BertClassifier(ZooModel[BertClassifierConfig]):
    """A class for each text, from its pooled first token."""

    def __init__(self, config: BertClassifierConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, with_pooler=True)
        self.dropout = nn.Dropout(config.task_dropout)
        self.classifier = initial_linear(config, config.hidden_size, config.num_labels)

    def logits(self, **batch: Tensor) -> Logits:
        """[batch, num_labels], from input_ids, attention_mask, token_type_ids [batch, seq]."""
        hidden = self.backbone.hidden(batch)
        return self.classifier(self.dropout(self.backbone.pooled(hidden)))

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """Mean cross entropy with labels [batch]."""
        assert isinstance(logits, Tensor)
        losses = F.cross_entropy(logits, batch["labels"].long(), reduction="none")
        return weighted_loss(losses, rows_that_count(batch["attention_mask"]), "num_tokens")

    def example_batch(self, batch_size: int) -> Batch:
        """Random tokens and labels."""
        batch = example_tokens(self.config, batch_size, self.device)
        batch["labels"] = torch.randint(0, self.config.num_labels, (batch_size,)).to(self.device)
        return batch
