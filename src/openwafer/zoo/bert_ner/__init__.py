"""BERT fine-tuned to find named entities."""

from openwafer.zoo.bert_ner.metrics import NerMetrics
from openwafer.zoo.bert_ner.torch_model import BertNer, BertNerConfig
from openwafer.zoo.bert_ner.weights import WEIGHTS
from openwafer.zoo.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="bert_ner",
    title="BERT, named entities",
    task="token_classification",
    config=BertNerConfig,
    model=BertNer,
    metrics=NerMetrics,
    from_data={
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_sequence_length",
        "num_classes": "num_classes",
    },
    weights=WEIGHTS,
)
