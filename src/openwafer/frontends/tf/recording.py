"""What a model_fn did to get its train_op: which gradients it asked for, and who applied them.

Decides what is written down while model_fn runs. Does not decide what of it is understood
(update_rule.py).

A finished graph shows that a variable is assigned to, not why: `AdamOptimizer` on an embedding is
forty operations of which none says Adam. The two calls that every optimizer of `tf.compat.v1.train`
goes through say it: `gradients` and `Optimizer.apply_gradients`. They are watched, and do what they
always do.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = ["ApplyCall", "GradientCall", "Recording", "recording"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCall:
    """`tf.gradients(losses, variables)`; a gradient is a tensor, IndexedSlices or None."""

    losses: tuple[Any, ...]
    gradients: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyCall:
    """`optimizer.apply_gradients(...)`: what was given, and the operations it made."""

    optimizer: Any
    gradients_and_variables: tuple[tuple[Any, Any], ...]
    global_step: Any
    operations: frozenset[str]


@dataclass(slots=True)
class Recording:
    """All calls on one graph, in order."""

    gradients: list[GradientCall] = field(default_factory=list[GradientCall])
    updates: list[ApplyCall] = field(default_factory=list[ApplyCall])


@contextmanager
def recording(graph: Any) -> Generator[Recording]:
    """Watch the calls that concern `graph`."""
    found = Recording()
    # The public functions all end in this one; TensorFlow is pinned to one release.
    gradients_util: Any = importlib.import_module("tensorflow.python.ops.gradients_util")
    optimizer_class: Any = tf.compat.v1.train.Optimizer
    helper, apply = gradients_util._GradientsHelper, optimizer_class.apply_gradients
    gradients_util._GradientsHelper = _watching_gradients(helper, graph, found)
    optimizer_class.apply_gradients = _watching_apply(apply, graph, found)
    try:
        yield found
    finally:
        gradients_util._GradientsHelper = helper
        optimizer_class.apply_gradients = apply


def _watching_gradients(
    helper: Callable[..., Any], graph: Any, found: Recording
) -> Callable[..., Any]:
    @functools.wraps(helper)
    def watching(ys: Any, xs: Any, *args: Any, **kwargs: Any) -> Any:
        result = helper(ys, xs, *args, **kwargs)
        if tf.compat.v1.get_default_graph() is graph:
            losses = tuple(ys) if isinstance(ys, (list, tuple)) else (ys,)
            found.gradients.append(GradientCall(losses=losses, gradients=tuple(result)))
        return result

    return watching


def _watching_apply(apply: Callable[..., Any], graph: Any, found: Recording) -> Callable[..., Any]:
    @functools.wraps(apply)
    def watching(self: Any, grads_and_vars: Any, global_step: Any = None, name: Any = None) -> Any:
        pairs = tuple((gradient, variable) for gradient, variable in grads_and_vars)
        before = len(graph.get_operations())
        result = apply(self, pairs, global_step, name)
        made = graph.get_operations()[before:]
        found.updates.append(
            ApplyCall(
                optimizer=self,
                gradients_and_variables=pairs,
                global_step=global_step,
                operations=frozenset(operation.name for operation in made),
            )
        )
        return result

    return watching
