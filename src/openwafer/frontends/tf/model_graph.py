"""A model_fn called once, with symbolic inputs: the graph, and what the function returned.

Decides what stands for a batch (one placeholder for each tensor of the input function's spec) and
which specs can be compiled. Does not decide what becomes of the graph (importing.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from openwafer.errors import CaptureError, DataError
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.recording import Recording, recording

__all__ = ["CallModelFn", "ModelGraph", "as_batch", "build_model_graph", "seeded", "variables_of"]

CallModelFn = Callable[[Any, Any, str], Any]
"""(features, labels, mode) → EstimatorSpec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph:
    """One form of a model.

    graph: the tf.Graph. spec: what model_fn returned. mode: tf.estimator.ModeKeys.
    inputs: placeholder by its path in the batch, e.g. `['features']['ids']`.
    initializer: sets all variables to their first values. recording: how the train_op came about.
    """

    graph: Any
    spec: Any
    mode: str
    inputs: dict[str, Any]
    global_step: Any
    initializer: Any
    recording: Recording


def build_model_graph(
    call: CallModelFn,
    element_spec: Any,
    mode: str,
    *,
    seed: int | None = None,
    warm_start: Any = None,
) -> ModelGraph:
    """Call model_fn in a graph of its own.

    Args:
        element_spec: of the input function's dataset: `(features, labels)`, or features alone.
        seed: of the graph's initializers, as `RunConfig.tf_random_seed`.
        warm_start: a checkpoint, or tf.estimator.WarmStartSettings: the variables' first values.

    Raises:
        DataError: a tensor of a batch has no fixed shape.
        CaptureError: model_fn does not give an EstimatorSpec.
    """
    graph = tf.Graph()
    with graph.as_default(), recording(graph) as found, seeded(seed):
        if seed is not None:
            tf.compat.v1.set_random_seed(seed)
        global_step = tf.compat.v1.train.get_or_create_global_step()
        batch = as_batch(element_spec)
        leaves, structure = pytree.tree_flatten_with_path(batch)
        placeholders = [_placeholder(pytree.keystr(path), spec) for path, spec in leaves]
        symbolic = pytree.tree_unflatten(placeholders, structure)
        spec = call(symbolic["features"], symbolic.get("labels"), mode)
        _warm_start(warm_start)
        # Made before any session has run: TensorFlow warns about graphs that change later.
        initializer = tf.compat.v1.global_variables_initializer()
    if not isinstance(spec, tf.estimator.EstimatorSpec):
        raise CaptureError(
            f"model_fn gave {type(spec).__name__}",
            allowed="CSEstimatorSpec, or tf.estimator.EstimatorSpec",
        )
    inputs = {pytree.keystr(path): p for (path, _), p in zip(leaves, placeholders, strict=True)}
    return ModelGraph(
        graph=graph,
        spec=spec,
        mode=mode,
        inputs=inputs,
        global_step=global_step,
        initializer=initializer,
        recording=found,
    )


@contextmanager
def seeded(seed: int | None) -> Generator[None]:
    """Keras initializers without a seed of their own ask Python for one."""
    before = random.getstate()
    try:
        if seed is not None:
            random.seed(seed)
        yield
    finally:
        random.setstate(before)


def _warm_start(settings: Any) -> None:
    """As the Estimator does: the initializers of the variables read the checkpoint."""
    if settings is None:
        return
    if isinstance(settings, str):
        tf.compat.v1.train.warm_start(settings)
        return
    tf.compat.v1.train.warm_start(
        settings.ckpt_to_initialize_from,
        settings.vars_to_warm_start,
        settings.var_name_to_vocab_info,
        settings.var_name_to_prev_var_name,
    )


def as_batch(element: Any) -> dict[str, Any]:
    """What an input function's dataset yields, by name: `features`, and `labels` if there are."""
    if isinstance(element, (tuple, list)):
        if len(element) != 2:
            raise DataError(
                f"the input function's dataset has elements of {len(element)} parts",
                allowed="(features, labels), or features alone",
            )
        return {"features": element[0], "labels": element[1]}
    return {"features": element}


def _placeholder(path: str, spec: Any) -> Any:
    shape = spec.shape
    if not shape.is_fully_defined():
        raise DataError(
            f"the batch entry {path} has the shape {shape}, in which a size is not known",
            allowed="batches of one shape: the compiled model is for that shape",
            hint="dataset.batch(batch_size, drop_remainder=True), and pad sequences to one length",
        )
    return tf.compat.v1.placeholder(spec.dtype, shape)


def variables_of(graph: Any) -> list[Any]:
    """What a checkpoint of the graph holds: its global variables, in the order of creation."""
    return list(graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES))
