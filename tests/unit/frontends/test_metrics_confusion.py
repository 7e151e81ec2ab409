"""Metrics of a confusion matrix against scikit-learn and against plain sets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (  # type: ignore[import-untyped]
    balanced_accuracy_score,
    confusion_matrix,
    fbeta_score,
    jaccard_score,
    matthews_corrcoef,
)

from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics import (
    CBMetric,
    DiceMetric,
    EntityF1Metric,
    F1Metric,
    FBetaScoreMetric,
    MatthewsCorrelationMetric,
    MeanIOUMetric,
    MeanPerClassAccuracyMetric,
    compute_confusion_matrix,
    divide_no_nan,
    forget_all_metrics,
)
from openwafer.frontends.torch.metrics.entities import entities


@pytest.fixture(autouse=True)
def no_metrics() -> Iterator[None]:
    forget_all_metrics()
    yield
    forget_all_metrics()


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Classes, labels, predictions, and where the batches are cut."""
    classes = draw(st.integers(2, 5))
    size = draw(st.integers(1, 30))
    numbers = st.lists(st.integers(0, classes - 1), min_size=size, max_size=size)
    return classes, np.array(draw(numbers)), np.array(draw(numbers)), draw(st.integers(0, size))


def filled(metric: Any, labels: Any, predictions: Any, cut: int, weights: Any = None) -> float:
    """The value after two batches of different sizes."""
    for part in (slice(0, cut), slice(cut, None)):
        given_weights = () if weights is None else (torch.from_numpy(weights[part]),)
        metric(torch.from_numpy(labels[part]), torch.from_numpy(predictions[part]), *given_weights)
    return metric.compute()


def quiet(function: Any, *args: Any, **kwargs: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(*args, **kwargs))


@settings(max_examples=25)
@given(case=answers(), beta=st.sampled_from([0.5, 1.0, 2.0]), ignored=st.integers(0, 1))
def test_as_scikit_learn(case: Any, beta: float, ignored: int) -> None:
    classes, labels, predictions, cut = case
    kept = list(range(ignored, classes))
    left_out = list(range(ignored))
    pair = (labels, predictions)
    for average in ("macro", "micro"):
        metric = FBetaScoreMetric(classes, beta, average, left_out)  # type: ignore[arg-type]
        expected = quiet(
            fbeta_score, *pair, beta=beta, labels=kept, average=average, zero_division=0
        )
        assert filled(metric, *pair, cut) == pytest.approx(expected)
    correlation = MatthewsCorrelationMetric(classes)
    assert filled(correlation, *pair, cut) == pytest.approx(quiet(matthews_corrcoef, *pair))
    recall = MeanPerClassAccuracyMetric(classes)
    assert filled(recall, *pair, cut) == pytest.approx(quiet(balanced_accuracy_score, *pair))
    present = sorted({*labels.tolist(), *predictions.tolist()})
    iou = MeanIOUMetric(classes)
    expected = quiet(jaccard_score, *pair, labels=present, average="macro")
    assert filled(iou, *pair, cut) == pytest.approx(expected)
    dice = DiceMetric(classes)
    expected = quiet(fbeta_score, *pair, beta=1, labels=present, average="macro", zero_division=0)
    assert filled(dice, *pair, cut) == pytest.approx(expected)
    matrix = compute_confusion_matrix(torch.tensor(labels), torch.tensor(predictions), classes)
    np.testing.assert_array_equal(matrix, confusion_matrix(*pair, labels=list(range(classes))))


@settings(max_examples=15)
@given(case=answers(), data=st.data())
def test_padding_counts_for_nothing(case: Any, data: st.DataObject) -> None:
    """Entries of weight 0, and labels of -100, as if they were not there."""
    classes, labels, predictions, cut = case
    weights = np.array(
        data.draw(st.lists(st.integers(0, 1), min_size=len(labels), max_size=len(labels)))
    )
    real = weights == 1
    ignored = np.where(real, labels, -100)
    for make in (F1Metric, MatthewsCorrelationMetric, MeanIOUMetric, DiceMetric):
        expected = filled(make(classes), labels[real], predictions[real], 0)
        assert filled(make(classes), labels, predictions, cut, weights) == expected
        assert filled(make(classes), ignored, predictions, cut) == expected


def test_images_and_ignored_classes() -> None:
    labels = torch.tensor([[[0, 0], [1, 2]]])
    predictions = torch.tensor([[[0, 1], [1, 1]]])
    metric = MeanIOUMetric(3, ignore_classes=[2])
    metric(labels, predictions)
    assert metric.compute() == pytest.approx((1 / 2 + 1 / 3) / 2)
    metric.reset()
    assert metric.compute() == 0.0


def test_counts_do_not_round() -> None:
    """More entries in a class than 32-bit floats can count."""
    metric = DiceMetric(2)
    metric.confusion = np.array([[2.0**30, 0], [0, 1]])
    metric(torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert metric.confusion.tolist() == [[2.0**30, 0], [3, 1]]


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(ConfigError, match="predictions from 0 to 7"):
        F1Metric(3)(torch.tensor([0, 1]), torch.tensor([0, 7]))
    with pytest.raises(ConfigError, match="1 classes"):
        F1Metric(1)
    with pytest.raises(ConfigError, match="average_type"):
        FBetaScoreMetric(2, 1.0, "weighted")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="beta"):
        FBetaScoreMetric(2, 0.0)
    assert divide_no_nan([1.0, 1.0], [2.0, 0.0]).tolist() == [0.5, 0.0]


def slow_entities(names: list[str]) -> set[tuple[str, int, int]]:
    """All runs that begin where no run goes on."""
    found = set()
    for first, name in enumerate(names):
        kind = name[2:]
        before = names[first - 1] if first else "O"
        begins = name[0] == "B" or (name[0] == "I" and (before == "O" or before[2:] != kind))
        if begins:
            last = first + 1
            while last < len(names) and names[last] == f"I-{kind}":
                last += 1
            found.add((kind, first, last))
    return found


NAMES = ["O", "B-X", "I-X", "B-Y", "I-Y"]


@given(names=st.lists(st.sampled_from(NAMES), max_size=12))
def test_entities_are_runs(names: list[str]) -> None:
    assert entities(names) == slow_entities(names)


def test_entity_f1() -> None:
    metric: CBMetric = EntityF1Metric(NAMES)
    labels = torch.tensor([[1, 2, 2, 0, 3], [3, 0, 0, 0, 0]])
    predictions = torch.tensor([[1, 0, 2, 0, 4], [3, 4, 1, 0, 0]])
    weights = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    metric(labels, predictions, weights)
    # Wanted: X 0-2, Y 3-4; Y 0-1. Found: X 0-2, Y 3-4; Y 0-2.
    assert metric.compute() == pytest.approx(2 * 2 / 6)
