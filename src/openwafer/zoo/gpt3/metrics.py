"""Metrics of GPT-3: those of GPT-2."""

from openwafer.zoo.gpt2.metrics import NextTokenMetrics

__all__ = ["NextTokenMetrics"]
