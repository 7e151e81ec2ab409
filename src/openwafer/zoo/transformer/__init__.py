"""Transformer: translation."""

from openwafer.zoo.family import Family
from openwafer.zoo.transformer.metrics import TransformerMetrics
from openwafer.zoo.transformer.torch_model import TransformerConfig, TransformerModel

__all__ = ["FAMILY", "TransformerConfig", "TransformerMetrics", "TransformerModel"]

FAMILY = Family(
    name="transformer",
    title="Transformer: translation by an encoder and a decoder",
    task="translation",
    config=TransformerConfig,
    model=TransformerModel,
    metrics=TransformerMetrics,
    from_data={"src_vocab_size": "vocab_size", "tgt_vocab_size": "tgt_vocab_size"},
)
