"""The functions of an Estimator for a model of the zoo: `model_fn` and `input_fn`.

Decides what a model_fn returns in each mode, and how the batches of `openwafer.data` become a
tf.data.Dataset: the same batches in the same order as in a PyTorch run. Does not decide how an
Estimator is run (tf/run.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from openwafer.data.dataloader import EpochSampler
from openwafer.errors import ConfigError
from openwafer.frontends.tf.estimator_spec import CSEstimatorSpec
from openwafer.frontends.tf.library import tf
from openwafer.streaming.randomness import derive_seed
from openwafer.zoo.catalog import families
from openwafer.zoo.family import Family
from openwafer.zoo.model import Batch, ModelConfig
from openwafer.zoo.tf.model import AnyTFModel, Features

__all__ = ["input_fn_of", "model_fn_of", "spec_input_fn", "tf_model_class"]

InputFn = Callable[[], Any]
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
) -> ModelFn:
    """The model_fn of a model.

    Args:
        optimizer: the section for `Trainer`; needed for training alone.
        with_metrics: compute the metrics in an evaluation.
    """
    model_class, modes = tf_model_class(family), tf.estimator.ModeKeys

    def model_fn(features: Features, mode: str) -> Any:
        model = model_class(config, optimizer=optimizer, mixed_precision=mixed_precision)
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


def input_fn_of(loader: DataLoader[Any], *, seed: int, repeats: bool) -> InputFn:
    """The input_fn that gives a loader's batches: one epoch, or one after the other.

    They are those of a BatchSequence with that seed. It cannot be used here: it sets torch's global
    generators aside for itself, tf.data calls this from a thread of its own, and the compiled run,
    which waits for that thread, has set them aside already.
    """

    def epoch(number: int) -> Iterator[Batch]:
        sampler, dataset = loader.batch_sampler, loader.dataset
        assert isinstance(sampler, EpochSampler), "the loaders of openwafer.data have one"
        generator = torch.Generator()
        generator.manual_seed(derive_seed(derive_seed(seed, number, "order"), "torch"))
        for key in sampler.keys(number, generator):
            yield cast("Any", dataset).__getitems__(key)

    first = next(epoch(0))

    def batches() -> Iterator[dict[str, Any]]:
        for number in count() if repeats else range(1):
            for batch in epoch(number):
                yield {name: tensor.numpy() for name, tensor in batch.items()}

    def input_fn() -> Any:
        dataset = tf.data.Dataset.from_generator(batches, output_signature=_spec_of(first))
        return dataset.prefetch(2)

    return input_fn


def spec_input_fn(batch: Batch) -> InputFn:
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
