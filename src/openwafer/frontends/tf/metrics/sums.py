"""What all streaming metrics share: sums over batches, and a number made of them.

Decides where the sums are kept (float64 variables of the host) and how they are added to. Does not
decide what is summed nor what is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf

__all__ = ["Collections", "Place", "host_variable", "placed", "require_graph", "streaming"]

Collections = Sequence[str] | None
"""Names of graph collections that a result is added to."""


class Place(NamedTuple):
    """Collections that value and update are added to, and the name of the scope of the sums."""

    metrics_collections: Collections = None
    updates_collections: Collections = None
    name: str | None = None


def streaming(
    batch: Mapping[str, Any],
    result: Callable[..., Any],
    default_name: str,
    place: Place,
) -> tuple[Any, Any]:
    """A metric of sums: (value, update).

    Args:
        batch: what a batch adds to each sum: tensors of known shapes, by the sums' names.
        result: the metric, float64, from the sums in that order.
        default_name: of the scope, where `place` has none.

    Raises:
        ConfigError: TensorFlow is executing eagerly, where there is no graph to keep sums in.
    """
    require_graph(default_name)
    with tf.compat.v1.variable_scope(place.name, default_name, list(batch.values())):
        sums = {key: _zeros(key, tf.convert_to_tensor(part)) for key, part in batch.items()}
        wide = [_wide(total, batch[key]) for key, total in sums.items()]
        # A part that is a constant must wait for the others: the run that finds the data at their
        # end adds nothing.
        with tf.control_dependencies(wide):
            added = [
                tf.compat.v1.assign_add(total, part)
                for total, part in zip(sums.values(), wide, strict=True)
            ]
        value = tf.identity(result(*(total.read_value() for total in sums.values())), "value")
        update = tf.identity(result(*added), "update_op")
    return placed(value, update, place)


def require_graph(what: str) -> None:
    """Raises: ConfigError: TensorFlow is executing eagerly."""
    if tf.executing_eagerly():
        raise ConfigError(
            f"{what} outside of a graph",
            allowed="within a model_fn, or `with tf.Graph().as_default()`",
        )


def placed(value: Any, update: Any, place: Place) -> tuple[Any, Any]:
    """(value, update), in the collections that they are to be in."""
    for collections, tensor in (
        (place.metrics_collections, value),
        (place.updates_collections, update),
    ):
        if collections:
            tf.compat.v1.add_to_collections(list(collections), tensor)
    return value, update


def host_variable(name: str, initial_value: Any) -> Any:
    """A variable of the host, which no checkpoint holds and each evaluation begins anew."""
    keys = tf.compat.v1.GraphKeys
    return tf.compat.v1.Variable(
        initial_value,
        trainable=False,
        collections=[keys.LOCAL_VARIABLES, keys.METRIC_VARIABLES],
        name=name,
    )


def _zeros(name: str, like: Any) -> Any:
    return host_variable(name, tf.zeros(like.shape, tf.float64))


def _wide(total: Any, part: Any) -> Any:
    """What is added, float64. The cast belongs to the sum: a compiled model gives the part as it
    is, in 32 bits, and only the host computes with 64."""
    with tf.control_dependencies([total.op]):
        return tf.cast(part, tf.float64)
