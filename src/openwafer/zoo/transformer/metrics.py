"""Metrics of an evaluation of Transformer: those of every encoder-decoder."""

from openwafer.zoo.seq2seq import Seq2SeqMetrics as TransformerMetrics

__all__ = ["TransformerMetrics"]
