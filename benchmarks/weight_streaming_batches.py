"""The batches that the models of the weight streaming benchmark are trained on.

Decides them: random tokens, the same every time.
"""

from __future__ import annotations

import torch

__all__ = ["make_batches"]


def make_batches(
    count: int, shape: tuple[int, int], vocab_size: int
) -> list[dict[str, torch.Tensor]]:
    """Random next-token prediction, each [batch_size, sequence]."""
    torch.manual_seed(2)
    return [
        {
            "input_ids": torch.randint(0, vocab_size, shape),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "labels": torch.randint(0, vocab_size, shape),
        }
        for _ in range(count)
    ]
