"""The functions of an Estimator for a model of the zoo: `model_fn` and `input_fn`.

Decides what a model_fn returns in each mode, and how the batches of `openwafer.data` become a
tf.data.Dataset: the same batches in the same order as in a PyTorch run. Does not decide how an
Estimator is run (tf/run.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import count, islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from openwafer.data.dataloader import EpochSampler
from openwafer.data.dataset import DataInfo
from openwafer.errors import ConfigError
from openwafer.frontends.tf.estimator_spec import CSEstimatorSpec
from openwafer.frontends.tf.input_data import NumberedInput, place_of
from openwafer.frontends.tf.library import tf
from openwafer.streaming.randomness import derive_seed
from openwafer.zoo.catalog import families
from openwafer.zoo.family import Family
from openwafer.zoo.model import Batch, ModelConfig
from openwafer.zoo.tf.model import AnyTFModel, Features

__all__ = ["input_fn_of", "model_fn_of", "spec_input_fn", "tf_model_class"]

ModelFn = Callable[..., Any]


def tf_model_class(family: Family) -> type[AnyTFModel]:
    """The family's TensorFlow model.

    Raises:
        ConfigError: it has none.
    """
    having = [name for name in families() if find_spec(f"openwafer.zoo.{name}.tf_model")]
    if family.name not in having:
        raise ConfigError(
            f"{family.name} has no TensorFlow model",
            where="command line: --frontend",
            allowed=f"of these: {', '.join(having)}",
            hint="--frontend torch",
        )
    return import_module(f"openwafer.zoo.{family.name}.tf_model").MODEL


def model_fn_of(
    family: Family,
    config: ModelConfig,
    *,
    optimizer: Mapping[str, Any] | None = None,
    mixed_precision: bool | str = False,
    with_metrics: bool = True,
    info: DataInfo | None = None,
) -> ModelFn:
    """The model_fn of a model.

    Args:
        optimizer: the section for `Trainer`; needed for training alone.
        with_metrics: compute the metrics in an evaluation.
        info: of the evaluation's dataset, for the metrics.
    """
    model_class, modes = tf_model_class(family), tf.estimator.ModeKeys

    def model_fn(features: Features, mode: str) -> Any:
        model = model_class(config, optimizer=optimizer, mixed_precision=mixed_precision, info=info)
        outputs = model(features, mode)
        if mode == modes.PREDICT:
            predictions = model.build_predictions(outputs, features)
            return CSEstimatorSpec(
                mode, predictions={"unique_ids": features["unique_ids"], **predictions}
            )
        loss = model.build_total_loss(outputs, features, None, mode)
        if mode == modes.TRAIN:
            return CSEstimatorSpec(mode, loss=loss, train_op=model.build_train_ops(loss))
        metrics = model.build_eval_metric_ops(outputs, None, features) if with_metrics else {}
        return CSEstimatorSpec(mode, loss=loss, eval_metric_ops=metrics)

    model_fn.__name__ = family.name
    return model_fn


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoaderInput:
    """See `input_fn_of`. first_step: where the dataset begins."""

    loader: DataLoader[Any]
    seed: int
    repeats: bool
    batches_per_step: int = 1
    first_step: int = 0

    def __call__(self) -> Any:
        """The tf.data.Dataset."""
        signature = _spec_of(next(self._epoch(0, 0)))
        dataset = tf.data.Dataset.from_generator(self._arrays, output_signature=signature)
        return dataset.prefetch(2)

    def from_step(self, step: int) -> _LoaderInput:
        """The same batches, from those of global step `step` on."""
        return replace(self, first_step=step)

    def _arrays(self) -> Iterator[dict[str, Any]]:
        epoch, start = place_of(
            self.first_step, num_batches=len(self.loader), batches_per_step=self.batches_per_step
        )
        for number in count(epoch) if self.repeats else range(1):
            for batch in self._epoch(number, start):
                yield {name: tensor.numpy() for name, tensor in batch.items()}
            start = 0

    def _epoch(self, number: int, start: int) -> Iterator[Batch]:
        """Those of a BatchSequence with that seed. It cannot be used here: it sets torch's global
        generators aside for itself, and tf.data calls this from a thread of its own."""
        sampler, dataset = self.loader.batch_sampler, self.loader.dataset
        assert isinstance(sampler, EpochSampler), "the loaders of openwafer.data have one"
        generator = torch.Generator()
        generator.manual_seed(derive_seed(derive_seed(self.seed, number, "order"), "torch"))
        usable = len(sampler) - len(sampler) % self.batches_per_step
        for key in islice(sampler.keys(number, generator), start, usable):
            yield cast("Any", dataset).__getitems__(key)


def input_fn_of(
    loader: DataLoader[Any], *, seed: int, repeats: bool, batches_per_step: int = 1
) -> NumberedInput:
    """The input_fn that gives a loader's batches as a PyTorch run has them.

    Args:
        loader: one of openwafer.data.
        repeats: one epoch after the other, as for training; or a single one.
        batches_per_step: what is left over at the end of an epoch is in no step, and not given.
    """
    return _LoaderInput(
        loader=loader, seed=seed, repeats=repeats, batches_per_step=batches_per_step
    )


def spec_input_fn(batch: Batch) -> Callable[[], Any]:
    """An input_fn of batches like this one, for compiling: it has their spec and no data.

    Args:
        batch: may be on "meta".
    """
    return lambda: tf.data.Dataset.from_generator(
        lambda: iter(()), output_signature=_spec_of(batch)
    )


def _spec_of(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: tf.TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in batch.items()
    }
