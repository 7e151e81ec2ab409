"""RoBERTa in TensorFlow: BERT on masked tokens alone; where positions begin is in its
configuration."""

from __future__ import annotations

from openwafer.zoo.bert.tf_model import BertTF

__all__ = ["MODEL"]

MODEL = BertTF
