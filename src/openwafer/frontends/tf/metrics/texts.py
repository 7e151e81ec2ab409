"""Metrics of what a model's numbers stand for: whole entities, summaries, answers.

Decides their arguments. What is counted is decided by the PyTorch metrics, which these run on the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from openwafer.frontends.tf.metrics.of_objects import streaming_object
from openwafer.frontends.tf.metrics.sums import Collections, Place
from openwafer.frontends.torch.metrics import EntityF1Metric, RougeScoreMetric, SquadMetric

__all__ = ["entity_f1_metric", "rouge_score_metric", "squad_metric"]


def entity_f1_metric(
    labels: Any,
    predictions: Any,
    weights: Any,
    label_names: Sequence[str],
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """F1 of whole named entities, as CoNLL-2003 counts them.

    Args:
        labels, predictions, weights: [batch, seq]; weight 0: not a word's first token.
        label_names: the name of each class, such as O, B-PER, I-PER.
    """
    return streaming_object(
        EntityF1Metric(label_names),
        [labels, predictions, weights],
        Place(metrics_collections, updates_collections, name),
    )


def rouge_score_metric(
    labels: Any,
    cls_indices: Any,
    cls_weights: Any,
    input_ids: Any,
    attention_mask: Any,
    logits: Any,
    kind: Literal["rouge1", "rouge2", "rougeL"] = "rouge1",
    num_sentences: int = 3,
    tokenizer: Any = None,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Mean ROUGE F1 of extractive summaries: the sentences with the highest logits, against those
    whose label is 1.

    Args:
        labels, cls_indices, cls_weights, logits: [batch, sentences]; where a sentence begins, and
            0 where there is none.
        input_ids, attention_mask: [batch, seq].
        num_sentences: in a summary.
        tokenizer: its `decode` makes text of tokens; without one the tokens are compared.

    Raises:
        ConfigError: another kind.
    """
    return streaming_object(
        RougeScoreMetric(kind, num_sentences, tokenizer),
        [labels, cls_indices, cls_weights, input_ids, attention_mask, logits],
        Place(metrics_collections, updates_collections, name),
    )


def squad_metric(
    unique_ids: Any,
    start_logits: Any,
    end_logits: Any,
    answers: Any,
    kind: Literal["exact_match", "f1"] = "f1",
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Exact match or F1 of the answers to questions, each question once.

    Args:
        unique_ids: [batch], the windows' numbers; a negative one is of a row that only fills.
        start_logits, end_logits: [batch, seq].
        answers: the data's (`DataInfo.answers`): makes answers of logits, and knows the right ones.

    Raises:
        ConfigError: another kind.
    """
    return streaming_object(
        SquadMetric(answers, kind),
        [unique_ids, start_logits, end_logits],
        Place(metrics_collections, updates_collections, name),
    )
