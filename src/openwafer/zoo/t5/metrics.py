"""Metrics of an evaluation of T5: those of every encoder-decoder."""

from openwafer.zoo.seq2seq import Seq2SeqMetrics as T5Metrics

__all__ = ["T5Metrics"]
