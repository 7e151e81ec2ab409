"""`TFBaseModel`: what a user's model class derives from.

Decides the documented surface: the precision policy and the parts that a model has. Does not decide
how they are run.

Source of names: section 4.4 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf

__all__ = ["TFBaseModel"]


class TFBaseModel(ABC):
    """A model in parts, which a model_fn puts together.

    Args:
        mixed_precision: 16-bit compute with float32 variables: True is `mixed_float16`, as
            documented; "mixed_bfloat16" is what a CPU computes fast. `policy` is for Keras layers:
            `Dense(8, dtype=self.policy)`.

    Raises:
        ConfigError: another name.
    """

    def __init__(self, mixed_precision: bool | str = False) -> None:
        names = {True: "mixed_float16", False: "float32"}
        name = names.get(mixed_precision, mixed_precision)  # type: ignore[call-overload]
        if name not in (*names.values(), "mixed_bfloat16"):
            raise ConfigError(
                f"mixed_precision is {mixed_precision!r}",
                allowed='True (mixed_float16), False, "mixed_bfloat16"',
            )
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
