"""GPT-3 (Brown et al. 2020): GPT-2's network in other sizes.

The banded sparse attention of some of the paper's layers is not here; release 1.6 had none either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from openwafer.zoo.gpt2.torch_model import GPT2, GPT2Config
from openwafer.zoo.model import SIZE

__all__ = ["GPT3", "GPT3Config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT3Config(GPT2Config):
    """The `model` section: the keys of GPT-2."""

    max_position_embeddings: int = field(default=2048, metadata=SIZE)


class GPT3(GPT2):
    """See GPT2."""
