"""What all layers have, and the documented helpers that do nothing off the machine.

Decides the common arguments. Does not decide what a layer computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = [
    "AbstractRecomputeWrapper",
    "BaseLayer",
    "SetupInputTensor",
    "boundary_cast",
    "summarize_tensor",
    "summary_layer",
]


class BaseLayer(tf.keras.layers.Layer):
    """A Keras layer.

    Args:
        boundary_casting, tf_summary: casts and summaries at a layer's boundary on the machine;
            accepted, without effect.
        kwargs: those of tf.keras.layers.Layer, `dtype` with a precision policy among them.
    """

    def __init__(
        self, boundary_casting: bool = False, tf_summary: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.boundary_casting, self.tf_summary = boundary_casting, tf_summary


class AbstractRecomputeWrapper(ABC):
    """A layer whose forward pass is computed again in the backward pass."""

    @abstractmethod
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's result."""


def SetupInputTensor(features: Any, tf_summary: bool = False) -> Any:  # noqa: N802 (documented)
    """The features as they are."""
    return features


def boundary_cast(x: Any, name: str | None = None, back_cast: bool = True) -> Any:
    """The tensor as it is."""
    return x


def summary_layer(x: Any) -> Any:
    """The tensor as it is."""
    return x


def summarize_tensor(x: Any) -> Any:
    """The tensor as it is."""
    return x
