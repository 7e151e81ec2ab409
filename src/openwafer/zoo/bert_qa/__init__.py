"""BERT fine-tuned to answer questions about a text."""

from openwafer.zoo.bert_qa.metrics import QAMetrics
from openwafer.zoo.bert_qa.torch_model import BertQA, BertQAConfig
from openwafer.zoo.bert_qa.weights import WEIGHTS
from openwafer.zoo.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="bert_qa",
    title="BERT, answers to questions about a text",
    task="question_answering",
    config=BertQAConfig,
    model=BertQA,
    metrics=QAMetrics,
    from_data={"vocab_size": "vocab_size", "max_sequence_length": "max_sequence_length"},
    weights=WEIGHTS,
)
