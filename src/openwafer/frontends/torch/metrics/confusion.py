"""Metrics of a confusion matrix that is summed over the whole evaluation.

Decides how labels and predictions are counted and what is made of the counts: F-beta, Matthews
correlation, and the metrics of segmentation. Labels outside 0 .. num_classes - 1 (-100, say) and
entries of weight 0 are left out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs

__all__ = [
    "ConfusionMetric",
    "DiceMetric",
    "F1Metric",
    "FBetaScoreMetric",
    "MatthewsCorrelationMetric",
    "MeanIOUMetric",
    "MeanPerClassAccuracyMetric",
    "compute_confusion_matrix",
    "divide_no_nan",
]

Array = npt.NDArray[np.float64]


def divide_no_nan(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Array:
    """Quotients; 0 where the denominator is 0."""
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def compute_confusion_matrix(
    labels: torch.Tensor,
    predictions: torch.Tensor,
    num_classes: int,
    weights: torch.Tensor | None = None,
) -> Array:
    """[num_classes, num_classes]: entry (i, j) is the weight of label i predicted as j.

    Labels outside the classes are left out.

    Raises:
        ConfigError: a prediction of a counted entry is outside the classes.
    """
    label = labels.detach().cpu().numpy().reshape(-1).astype(np.int64)
    prediction = predictions.detach().cpu().numpy().reshape(-1).astype(np.int64)
    counted = (label >= 0) & (label < num_classes)
    weight: Any = None
    if weights is not None:
        weight = weights.detach().cpu().double().numpy().reshape(-1)
        counted &= weight != 0
        weight = weight[counted]
    label, prediction = label[counted], prediction[counted]
    if len(prediction) and not 0 <= prediction.min() <= prediction.max() < num_classes:
        raise ConfigError(
            f"predictions from {prediction.min()} to {prediction.max()}",
            allowed=f"classes 0 to {num_classes - 1}",
            hint="num_classes of the metric, or argmax over the wrong dimension",
        )
    cells = np.bincount(label * num_classes + prediction, weight, num_classes * num_classes)
    return cells.astype(np.float64).reshape(num_classes, num_classes)


class ConfusionMetric(CBMetric):
    """Call with `labels` and `predictions` of one shape, and `weights` (0 or 1) to leave some out.

    Args:
        num_classes: classes are 0 .. num_classes - 1.
    """

    def __init__(self, num_classes: int, name: str | None = None) -> None:
        if num_classes < 2:
            raise ConfigError(f"a metric of {num_classes} classes", allowed="at least 2")
        self.num_classes = num_classes
        super().__init__(name)

    def init_state(self) -> None:
        self.confusion = np.zeros((self.num_classes, self.num_classes))

    def update_on_device(
        self,
        labels: torch.Tensor,
        predictions: torch.Tensor,
        weights: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeviceOutputs:
        # Counted on the host, where counts are exact under any compute precision.
        given = [labels, predictions]
        return DeviceOutputs(args=given if weights is None else [*given, weights])

    def update_on_host(
        self,
        labels: torch.Tensor,
        predictions: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.confusion += compute_confusion_matrix(labels, predictions, self.num_classes, weights)

    def _true_positives(self) -> Array:
        return np.diagonal(self.confusion)

    def _of_label(self) -> Array:
        """Entries with each label: true positives and false negatives."""
        return self.confusion.sum(axis=1)

    def _predicted(self) -> Array:
        """Entries with each prediction: true positives and false positives."""
        return self.confusion.sum(axis=0)

    @abstractmethod
    def compute(self) -> float: ...


class FBetaScoreMetric(ConfusionMetric):
    """F-beta of all classes but `ignore_labels`.

    Args:
        beta: weight of recall against precision.
        average_type: `macro`: the mean over classes of their scores, 0 for a class that neither
            occurs nor is predicted; `micro`: one score of the classes' summed counts.
    """

    def __init__(
        self,
        num_classes: int,
        beta: float = 1.0,
        average_type: Literal["micro", "macro"] = "micro",
        ignore_labels: Collection[int] | None = None,
        name: str | None = None,
    ) -> None:
        if average_type not in ("micro", "macro"):
            raise ConfigError(f"average_type {average_type!r}", allowed="micro, macro")
        if not beta > 0:
            raise ConfigError(f"beta {beta}", allowed="a positive number")
        ignored = set(ignore_labels or ())
        self._beta_squared, self._average_type = beta * beta, average_type
        self._kept = [c for c in range(num_classes) if c not in ignored]
        super().__init__(num_classes, name)

    def compute(self) -> float:
        right = self._true_positives()[self._kept]
        of_label, predicted = self._of_label()[self._kept], self._predicted()[self._kept]
        if self._average_type == "micro":
            right, of_label, predicted = (
                a.sum(keepdims=True) for a in (right, of_label, predicted)
            )
        # (1 + b²) P R / (b² P + R), with both fractions multiplied out.
        score = divide_no_nan(
            (1 + self._beta_squared) * right, self._beta_squared * of_label + predicted
        )
        return float(score.mean()) if len(score) else 0.0


class F1Metric(FBetaScoreMetric):
    """F-beta with beta 1; for two classes give `ignore_labels=[0]` for the F1 of class 1."""

    def __init__(
        self,
        num_classes: int,
        average_type: Literal["micro", "macro"] = "macro",
        ignore_labels: Collection[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(num_classes, 1.0, average_type, ignore_labels, name)


class MatthewsCorrelationMetric(ConfusionMetric):
    """The correlation of labels and predictions, -1 to 1; of several classes after Gorodkin,
    "Comparing two K-category assignments by a K-category correlation coefficient" (2004)."""

    def __init__(self, num_classes: int = 2, name: str | None = None) -> None:
        super().__init__(num_classes, name)

    def compute(self) -> float:
        of_label, predicted = self._of_label(), self._predicted()
        total, right = float(self.confusion.sum()), float(self._true_positives().sum())
        covariance = right * total - float(of_label @ predicted)
        spread = (total**2 - float(predicted @ predicted)) * (total**2 - float(of_label @ of_label))
        return covariance / math.sqrt(spread) if spread > 0 else 0.0


class _PerClassMean(ConfusionMetric):
    """A mean over the classes that occur, but for `ignore_classes`."""

    def __init__(
        self, num_classes: int, ignore_classes: Collection[int] = (), name: str | None = None
    ) -> None:
        self._kept = np.array([c not in set(ignore_classes) for c in range(num_classes)])
        super().__init__(num_classes, name)

    @abstractmethod
    def _fractions(self) -> tuple[Array, Array]:
        """Numerator and denominator of each class's score; one with denominator 0 is left out."""

    def compute(self) -> float:
        above, below = self._fractions()
        kept = self._kept & (below > 0)
        return float((above[kept] / below[kept]).mean()) if kept.any() else 0.0


class MeanIOUMetric(_PerClassMean):
    """Mean over classes of intersection over union."""

    def _fractions(self) -> tuple[Array, Array]:
        right = self._true_positives()
        return right, self._of_label() + self._predicted() - right


class DiceMetric(_PerClassMean):
    """Mean over classes of the Dice similarity coefficient, 2 |A ∩ B| / (|A| + |B|)."""

    def _fractions(self) -> tuple[Array, Array]:
        return 2 * self._true_positives(), self._of_label() + self._predicted()


class MeanPerClassAccuracyMetric(_PerClassMean):
    """Mean over classes of the share of their entries that are found."""

    def _fractions(self) -> tuple[Array, Array]:
        return self._true_positives(), self._of_label()
