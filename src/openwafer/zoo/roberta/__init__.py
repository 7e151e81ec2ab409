"""RoBERTa's pre-training: masked tokens."""

from openwafer.zoo.bert.metrics import PretrainingMetrics
from openwafer.zoo.family import Family
from openwafer.zoo.roberta.torch_model import Roberta, RobertaConfig
from openwafer.zoo.roberta.weights import WEIGHTS

__all__ = ["FAMILY"]

FAMILY = Family(
    name="roberta",
    title="RoBERTa, pre-training on masked tokens",
    task="masked_lm",
    config=RobertaConfig,
    model=Roberta,
    metrics=PretrainingMetrics,
    from_data={
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_sequence_length",
        "pad_token_id": "pad_id",
    },
    weights=WEIGHTS,
)
