"""What is made of a summed loss: perplexity, bits per byte, and the mean.

Decides that losses and tokens are summed over the whole evaluation and divided once. The loss that
is given is that of a batch, summed over its counted tokens, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from openwafer.errors import ConfigError, nearest
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics.sums import Collections, Place, streaming

__all__ = ["bits_per_x_metric", "ece_loss_metric", "perplexity_metric"]

_TOKENS_PER_BYTE = {"pile": 0.29335, "openwebtext2": 0.2434}
"""With the tokenizer of GPT-2: The Pile (arXiv:2101.00027), table 7."""

_UNITS = ("per_byte", "per_character", "per_word")


def perplexity_metric(
    total_loss_per_batch: Any,
    num_tokens: Any,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """exp(total loss / number of tokens)."""
    place = Place(metrics_collections, updates_collections, name)
    return _of_mean_loss("perplexity_metric", tf.exp, total_loss_per_batch, num_tokens, place)


def ece_loss_metric(
    total_loss_per_batch: Any,
    num_tokens: Any,
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Total loss / number of tokens, of which the perplexity is the exponential."""
    place = Place(metrics_collections, updates_collections, name)
    return _of_mean_loss("ece_loss_metric", tf.identity, total_loss_per_batch, num_tokens, place)


def bits_per_x_metric(
    total_loss_per_batch: Any,
    num_tokens: Any,
    bits_per_type: str = "per_byte",
    dataset: str | float = "pile",
    metrics_collections: Collections = None,
    updates_collections: Collections = None,
    name: str | None = None,
) -> tuple[Any, Any]:
    """Bits per byte, or with another type per token: the tokens are characters or words then.

    Args:
        bits_per_type: per_byte, per_character or per_word.
        dataset: pile or openwebtext2, or another text's tokens per byte; for per_byte only.

    Raises:
        ConfigError: an unknown type, or a dataset whose tokens per byte are not known.
    """
    if bits_per_type not in _UNITS:
        raise ConfigError(
            f"unknown bits_per_type {bits_per_type!r}",
            allowed=", ".join(_UNITS),
            hint=nearest(bits_per_type, _UNITS),
        )
    factor = 1 / math.log(2)
    if bits_per_type == "per_byte":
        factor *= _tokens_per_byte(dataset)
    place = Place(metrics_collections, updates_collections, name)
    return _of_mean_loss(
        "bpb_metric", lambda mean: mean * factor, total_loss_per_batch, num_tokens, place
    )


def _tokens_per_byte(dataset: str | float) -> float:
    if not isinstance(dataset, str):
        return dataset
    if dataset not in _TOKENS_PER_BYTE:
        raise ConfigError(
            f"the tokens per byte of dataset {dataset!r} are not known",
            allowed=f"{', '.join(_TOKENS_PER_BYTE)}, or the number of tokens per byte",
            hint="one over DataInfo.bytes_per_token",
        )
    return _TOKENS_PER_BYTE[dataset]


def _of_mean_loss(
    default_name: str,
    made_of_it: Callable[[Any], Any],
    total_loss_per_batch: Any,
    num_tokens: Any,
    place: Place,
) -> tuple[Any, Any]:
    """A function of the mean loss of a token; 0 where no tokens were counted."""

    def result(loss: Any, tokens: Any) -> Any:
        value = made_of_it(tf.math.divide_no_nan(loss, tokens))
        return tf.where(tokens > 0, value, tf.zeros_like(value))

    return streaming(
        {
            "total_loss": tf.reduce_sum(tf.cast(total_loss_per_batch, tf.float32)),
            "total_tokens": tf.reduce_sum(tf.cast(num_tokens, tf.float32)),
        },
        result,
        default_name,
        place,
    )
