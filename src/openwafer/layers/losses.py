"""Losses of language models.

Decides how they are reduced. Does not decide which tokens count: that is the mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from openwafer.layers.arguments import argument_error, check_positive

__all__ = ["GPTLMHeadModelLoss", "smooth_loss"]


class GPTLMHeadModelLoss(nn.Module):
    """Cross entropy of the next token, summed over the tokens that count, divided by the batch size
    (not by the number of tokens), times a weight.

    Args:
        vocab_size: number of classes.
        loss_weight: usually 1 / (mean number of tokens that count in a sequence).

    The loss is float32. Release 1.6 rounded it to float16, which ends at 65,504 and keeps three
    digits; `.half()` gives the same number.
    """

    def __init__(self, vocab_size: int, loss_weight: float) -> None:
        check_positive(vocab_size=vocab_size)
        super().__init__()
        self.vocab_size = vocab_size
        self.loss_weight = loss_weight

    def forward(
        self, lm_logits: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """The loss, 0-d.

        Args:
            lm_logits: [batch, seq, vocab_size].
            labels: [batch, seq], any integer type, already shifted by one.
            attention_mask: [batch, seq], 1 where the token counts, 0 where it does not.

        Raises:
            ConfigError: shapes that do not fit.
        """
        fits = lm_logits.shape[-1] == self.vocab_size
        if not fits or not lm_logits.shape[:-1] == labels.shape == attention_mask.shape:
            shapes = (list(x.shape) for x in (lm_logits, labels, attention_mask))
            raise argument_error(
                "lm_logits, labels and attention_mask have the shapes "
                + ", ".join(map(str, shapes)),
                allowed=f"[batch, seq, {self.vocab_size}], [batch, seq], [batch, seq]",
            )
        losses = F.cross_entropy(
            lm_logits.reshape(-1, self.vocab_size), labels.reshape(-1).long(), reduction="none"
        )
        counted = losses.to(torch.float32) * attention_mask.reshape(-1).to(torch.float32)
        return counted.sum() / labels.shape[0] * self.loss_weight


def smooth_loss(
    prediction_scores: torch.Tensor, loss: torch.Tensor, label_smoothing: float, classes: int
) -> torch.Tensor:
    """Label smoothing on top of a loss that was computed without it.

    Args:
        prediction_scores: logits, [..., classes].
        loss: cross entropy per prediction, [prediction], or a scalar.
        label_smoothing: weight of the uniform distribution, 0 to 1.

    Returns:
        (1 - label_smoothing) · loss + label_smoothing · mean over classes of -log p, [prediction].
    """
    log_probabilities = F.log_softmax(prediction_scores.reshape(-1, classes), dim=-1)
    uniform = -log_probabilities.mean(dim=-1)
    return (1.0 - label_smoothing) * loss + label_smoothing * uniform
