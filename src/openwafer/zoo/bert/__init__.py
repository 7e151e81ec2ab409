"""BERT's pre-training: masked tokens and next sentences."""

from openwafer.zoo.bert.metrics import PretrainingMetrics
from openwafer.zoo.bert.torch_model import Bert, BertConfig
from openwafer.zoo.bert.weights import WEIGHTS
from openwafer.zoo.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="bert",
    title="BERT, pre-training on masked tokens and next sentences",
    task="masked_lm",
    config=BertConfig,
    model=Bert,
    metrics=PretrainingMetrics,
    from_data={"vocab_size": "vocab_size", "max_sequence_length": "max_sequence_length"},
    weights=WEIGHTS,
)
