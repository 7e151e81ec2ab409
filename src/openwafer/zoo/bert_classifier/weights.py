"""Weights of transformers' BertForSequenceClassification."""

from __future__ import annotations

from openwafer.zoo.bert.weights import classifier_weights

__all__ = ["WEIGHTS"]

WEIGHTS = classifier_weights(
    "BertForSequenceClassification",
    labels="num_labels",
    dropout="task_dropout",
    with_pooler=True,
    also={"problem_type": "single_label_classification"},
)
