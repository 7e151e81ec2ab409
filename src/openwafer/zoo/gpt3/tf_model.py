"""GPT-3 in TensorFlow: GPT-2's network in other sizes."""

from __future__ import annotations

from openwafer.zoo.gpt2.tf_model import GPT2TFModel

__all__ = ["MODEL", "GPT3TFModel"]


class GPT3TFModel(GPT2TFModel):
    """See GPT2TFModel; GPT3Config is a GPT2Config."""


MODEL = GPT3TFModel
