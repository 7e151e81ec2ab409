"""What the TensorFlow models of the zoo are: twins of the PyTorch ones, of the same configuration.

Decides the surface that all of them share, and where their variables are named. Does not decide any
architecture (the folders do), nor how a model is run (tf/run.py).

A family's model is `zoo/<family>/tf_model.py`, whose `MODEL` is the class; the names of its
variables follow tf/names.py, so that checkpoints convert by that rule.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from openwafer.data.dataset import DataInfo
from openwafer.frontends.tf.base_model import TFBaseModel
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.trainer import Trainer
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.tf.names import path_name

__all__ = ["AnyTFModel", "Features", "Outputs", "TFZooModel", "module_scope"]

Features = Mapping[str, Any]
"""A batch by name: the names, shapes and dtypes that the family's data give, labels among them."""
Outputs = dict[str, Any]
"""Logits by the name of their head; a model with one head calls it `logits`."""

C = TypeVar("C", bound=ModelConfig)


class TFZooModel(TFBaseModel, Generic[C]):
    """A network with its loss, in a graph of TensorFlow.

    Args:
        config: that of the PyTorch twin.
        optimizer: the `optimizer` section for `Trainer`, needed for `build_train_ops` only.
        mixed_precision: as of TFBaseModel; Keras layers take `self.policy` as
            their dtype.
        info: the `DataInfo` of the evaluation's dataset; without it, metrics that need it are left
            out.
    """

    def __init__(
        self,
        config: C,
        *,
        optimizer: Mapping[str, Any] | None = None,
        mixed_precision: bool | str = False,
        info: DataInfo | None = None,
    ) -> None:
        super().__init__(mixed_precision)
        self.config, self.info = config, info
        self._optimizer, self._mixed_precision = optimizer, mixed_precision

    @abstractmethod
    def build_model(self, features: Features, mode: str) -> Outputs:
        """Logits before any softmax; reads no labels. Dropout is active in mode TRAIN."""

    @abstractmethod
    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """The scalar loss, float32, as the PyTorch twin computes it.

        Args:
            labels: None; the labels are in `features`, as in PyTorch.
        """

    @abstractmethod
    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """{name: (value, update)}, with the names of the PyTorch twin's metrics."""

    def build_predictions(self, model_outputs: Outputs, features: Features) -> Outputs:
        """What mode predict writes, one row per sample: by default the most likely class."""
        if set(model_outputs) == {"logits"}:
            return {"prediction": tf.argmax(model_outputs["logits"], -1)}
        return {name: tf.argmax(head, -1) for name, head in model_outputs.items()}

    def build_train_ops(self, total_loss: Any) -> Any:
        """The train_op of the `optimizer` section."""
        assert self._optimizer is not None, "a model for training was made without an optimizer"
        trainer = Trainer(self._optimizer, mixed_precision=bool(self._mixed_precision))
        return trainer.build_train_ops(total_loss)


AnyTFModel = TFZooModel[Any]
"""A model of some family."""


@contextmanager
def module_scope(path: str) -> Generator[None]:
    """Inside, variables and operations belong to the module at `path` of the one around.

    It may be entered again: nothing is numbered apart.
    """
    around = tf.get_current_name_scope()
    scopes = path_name(path)
    with tf.name_scope(f"{around}/{scopes}/" if around else f"{scopes}/"):
        yield
