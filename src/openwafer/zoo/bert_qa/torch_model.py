"""BERT that marks the answer to a question in a text: where it starts and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.zoo.bert.torch_model import (
    Backbone,
    BackboneConfig,
    example_tokens,
    initial_linear,
)
from openwafer.zoo.losses import weighted_loss
from openwafer.zoo.model import SIZE, Batch, Logits, ZooModel

__all__ = ["BertQA", "BertQAConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BertQAConfig(BackboneConfig):
    """The `model` section.

    max_answer_length: tokens of the longest answer that is predicted.
    """

    max_answer_length: int = field(default=30, metadata=SIZE)


class BertQA(ZooModel[BertQAConfig]):
    """A start and an end for each question."""

    def __init__(self, config: BertQAConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config, with_pooler=False)
        self.classifier = initial_linear(config, config.hidden_size, 2)

    def logits(self, **batch: Tensor) -> Logits:
        """`start` and `end` [batch, seq], from input_ids, attention_mask, token_type_ids."""
        both = self.classifier(self.backbone.hidden(batch))
        return {"start": both[..., 0], "end": both[..., 1]}

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """Mean cross entropy of both ends, labels [batch, 2], where label_weights [batch, 2] is 1.

        The softmax is over every position, padding too, as in the published model.
        """
        assert isinstance(logits, dict)
        labels = batch["labels"].long()
        losses = [
            F.cross_entropy(logits[end], labels[:, index], reduction="none")
            for index, end in enumerate(("start", "end"))
        ]
        return weighted_loss(torch.stack(losses, dim=1), batch["label_weights"], "num_tokens")

    def predictions(self, logits: Logits, **batch: Tensor) -> Batch:
        """The likeliest `start` and `end` together, and `score`, the sum of their logits: in the
        second segment, the end at most `max_answer_length` - 1 after the start, or both 0: there is
        no answer."""
        assert isinstance(logits, dict)
        length = logits["start"].shape[1]
        places = torch.arange(length, device=logits["start"].device)
        distance = places[None, :] - places[:, None]
        is_short = (distance >= 0) & (distance < self.config.max_answer_length)
        in_text = (batch["token_type_ids"] == 1) & (batch["attention_mask"] == 1)
        is_answer = in_text[:, :, None] & in_text[:, None, :] & is_short
        is_none = (places[:, None] == 0) & (places[None, :] == 0)
        scores = logits["start"].float()[:, :, None] + logits["end"].float()[:, None, :]
        scores = scores.masked_fill(~(is_answer | is_none), torch.finfo(torch.float32).min)
        score, best = scores.flatten(1).max(dim=-1)
        return {"start": best // length, "end": best % length, "score": score}

    def example_batch(self, batch_size: int) -> Batch:
        """Random tokens and answers."""
        device = self.device
        batch = example_tokens(self.config, batch_size, device)
        shape = (batch_size, 2)
        batch["labels"] = torch.randint(0, self.config.sequence_length, shape, device=device)
        batch["label_weights"] = torch.ones(shape, device=device)
        batch["unique_ids"] = torch.arange(batch_size, device=device)
        return batch
