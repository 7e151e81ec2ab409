"""Copies of one layer, as the encoder and the decoder stack them.

Decides that every copy draws weights of its own. Does not decide how the copies are called.
"""

from __future__ import annotations

import copy

from torch import nn

from openwafer.layers.arguments import check_positive

__all__ = ["copies_of"]


def copies_of(layer: nn.Module, num_layers: int) -> nn.ModuleList:
    """`num_layers` copies with new weights: from the layer's `reset_parameters()`, else its
    `_reset_parameters()`. A layer that has neither is copied with its weights."""
    check_positive(num_layers=num_layers)
    copies = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
    for each in copies:
        for name in ("reset_parameters", "_reset_parameters"):
            reset = getattr(each, name, None)
            if callable(reset):
                reset()
                break
    return copies
