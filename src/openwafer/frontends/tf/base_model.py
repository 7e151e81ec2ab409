"""`TFBaseModel`: what a user's model class derives from.

Decides the documented surface: the precision policy and the parts that a model has. Does not decide
how they are run.

Source of names: section 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = ["TFBaseModel"]


class TFBaseModel(ABC):
    """A model in parts, which a model_fn puts together.

    Args:
        mixed_precision: 16-bit compute with float32 variables; `policy` is then for Keras layers.
    """

    def __init__(self, mixed_precision: bool = False) -> None:
        name = "mixed_float16" if mixed_precision else "float32"
        self.policy: Any = tf.keras.mixed_precision.Policy(name)

    def __call__(self, features: Any, mode: str) -> Any:
        return self.build_model(features, mode)

    @abstractmethod
    def build_model(self, features: Any, mode: str) -> Any:
        """The model's outputs."""

    @abstractmethod
    def build_total_loss(self, model_outputs: Any, features: Any, labels: Any, mode: str) -> Any:
        """The loss, a scalar."""

    @abstractmethod
    def build_train_ops(self, total_loss: Any) -> Any:
        """The train_op."""

    @abstractmethod
    def build_eval_metric_ops(self, model_outputs: Any, labels: Any, features: Any = None) -> Any:
        """{name: (value, update)}."""
