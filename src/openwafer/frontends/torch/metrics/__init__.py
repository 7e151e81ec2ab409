"""Metrics of the documented PyTorch API, over the whole evaluation.

Each keeps sums and divides once, so that padding (weight 0) and a smaller last batch count as what
they are. What a metric is stands in metric.py.

Source of names and behaviour: CS-2 software 1.6 documentation, `CBMetric` and friends.
"""

from openwafer.frontends.torch.metrics.accuracy import AccuracyMetric
from openwafer.frontends.torch.metrics.confusion import (
    ConfusionMetric,
    DiceMetric,
    F1Metric,
    FBetaScoreMetric,
    MatthewsCorrelationMetric,
    MeanIOUMetric,
    MeanPerClassAccuracyMetric,
    compute_confusion_matrix,
    divide_no_nan,
)
from openwafer.frontends.torch.metrics.entities import EntityF1Metric
from openwafer.frontends.torch.metrics.likelihood import (
    BitsPerByteMetric,
    BitsPerTokenMetric,
    PerplexityMetric,
)
from openwafer.frontends.torch.metrics.metric import (
    CBMetric,
    DeviceOutputs,
    capture_metrics,
    compute_all_metrics,
    forget_all_metrics,
    get_all_metrics,
    reset_all_metrics,
)
from openwafer.frontends.torch.metrics.predictions import PredictionWriter
from openwafer.frontends.torch.metrics.rouge import RougeScoreMetric
from openwafer.frontends.torch.metrics.squad import SquadMetric

__all__ = [
    "AccuracyMetric",
    "BitsPerByteMetric",
    "BitsPerTokenMetric",
    "CBMetric",
    "ConfusionMetric",
    "DeviceOutputs",
    "DiceMetric",
    "EntityF1Metric",
    "F1Metric",
    "FBetaScoreMetric",
    "MatthewsCorrelationMetric",
    "MeanIOUMetric",
    "MeanPerClassAccuracyMetric",
    "PerplexityMetric",
    "PredictionWriter",
    "RougeScoreMetric",
    "SquadMetric",
    "capture_metrics",
    "compute_all_metrics",
    "compute_confusion_matrix",
    "divide_no_nan",
    "forget_all_metrics",
    "get_all_metrics",
    "reset_all_metrics",
]
