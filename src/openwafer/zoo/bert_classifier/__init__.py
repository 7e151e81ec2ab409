"""BERT fine-tuned to classify texts."""

from openwafer.zoo.bert_classifier.metrics import ClassifierMetrics
from openwafer.zoo.bert_classifier.torch_model import BertClassifier, BertClassifierConfig
from openwafer.zoo.bert_classifier.weights import WEIGHTS
from openwafer.zoo.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="bert_classifier",
    title="BERT, classification of texts and pairs of texts",
    task="classification",
    config=BertClassifierConfig,
    model=BertClassifier,
    metrics=ClassifierMetrics,
    from_data={
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_sequence_length",
        "num_labels": "num_classes",
    },
    weights=WEIGHTS,
)
