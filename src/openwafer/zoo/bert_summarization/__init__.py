"""BERT fine-tuned to choose the sentences of a summary."""

from openwafer.zoo.bert_summarization.metrics import SummarizationMetrics
from openwafer.zoo.bert_summarization.torch_model import BertSummarization, BertSummarizationConfig
from openwafer.zoo.bert_summarization.weights import WEIGHTS
from openwafer.zoo.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="bert_summarization",
    title="BERT, extractive summarization (BertSum)",
    task="summarization",
    config=BertSummarizationConfig,
    model=BertSummarization,
    metrics=SummarizationMetrics,
    from_data={"vocab_size": "vocab_size", "max_sequence_length": "max_sequence_length"},
    weights=WEIGHTS,
)
