"""Scores of texts against the packages that others use: rouge-score, seqeval and torchmetrics.

Marked slow for what it takes to import them; quick references are in test_metrics_texts.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.frontends.torch.metrics.entities import entities
from openwafer.frontends.torch.metrics.text_scores import (
    exact_match,
    rouge_l,
    rouge_n,
    rouge_words,
    word_f1,
)

pytestmark = pytest.mark.slow

WORDS = ["the", "a", "An", "cat", "Cat's", "sat.", "on", "mat,", "42", "3.5", "re-run", "thesis"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


@given(candidate=TEXTS, reference=TEXTS)
@settings(max_examples=60, deadline=None)
def test_rouge_is_that_of_rouge_score(candidate: str, reference: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs = scorer.RougeScorer(kinds, use_stemmer=False).score(reference, candidate)
    ours, wanted = rouge_words(candidate), rouge_words(reference)
    assert rouge_n(ours, wanted, 1) == pytest.approx(theirs["rouge1"].fmeasure)
    assert rouge_n(ours, wanted, 2) == pytest.approx(theirs["rouge2"].fmeasure)
    assert rouge_l(ours, wanted) == pytest.approx(theirs["rougeL"].fmeasure)


@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_answers_are_those_of_torchmetrics(prediction: str, references: list[str]) -> None:
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    answers = {"text": references, "answer_start": [0] * len(references)}
    theirs = squad([{"prediction_text": prediction, "id": "1"}], [{"answers": answers, "id": "1"}])
    assert 100 * exact_match(prediction, references) == theirs["exact_match"].item()
    assert 100 * word_f1(prediction, references) == pytest.approx(theirs["f1"].item(), rel=1e-5)


LABELS = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])


@given(pairs=st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_entities_are_those_of_seqeval(pairs: list[tuple[str, str]]) -> None:
    sequence_labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    for names in ([pair[0] for pair in pairs], [pair[1] for pair in pairs]):
        theirs = {
            (kind, first, last + 1) for kind, first, last in sequence_labeling.get_entities(names)
        }
        assert entities(names) == theirs
