"""Weights of transformers' BertForTokenClassification."""

from __future__ import annotations

from openwafer.zoo.bert.weights import classifier_weights

__all__ = ["WEIGHTS"]

WEIGHTS = classifier_weights(
    "BertForTokenClassification",
    labels="num_classes",
    dropout="encoder_output_dropout_rate",
    with_pooler=False,
)
