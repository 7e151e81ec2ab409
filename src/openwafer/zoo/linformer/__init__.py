"""Linformer's pre-training: masked tokens."""

from openwafer.zoo.bert.metrics import PretrainingMetrics
from openwafer.zoo.family import Family
from openwafer.zoo.linformer.torch_model import Linformer, LinformerConfig

__all__ = ["FAMILY"]

FAMILY = Family(
    name="linformer",
    title="Linformer, pre-training on masked tokens with attention of linear cost",
    task="masked_lm",
    config=LinformerConfig,
    model=Linformer,
    metrics=PretrainingMetrics,
    from_data={"vocab_size": "vocab_size", "max_sequence_length": "max_sequence_length"},
)
