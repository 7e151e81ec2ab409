"""What a model_fn did to get its train_op: which gradients it asked for, and who applied them.

Decides what is written down while model_fn runs. Does not decide what of it is understood
(train_op.py).

A finished graph shows that a variable is assigned to, not why: `AdamOptimizer` on an embedding is
forty operations of which none says Adam. The two calls that every optimizer of `tf.compat.v1.train`
goes through say it: `gradients` and `Optimizer.apply_gradients`. They are watched, and do what they
always do.

Optimizers around another one (loss scaling, accumulation of gradients) are told that they are
watched, and say what they do instead of doing it in the graph: the runtime does it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = [
    "Accumulated",
    "ApplyCall",
    "GradientCall",
    "Recording",
    "ScaledLoss",
    "Wrapper",
    "recording",
    "recording_now",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientCall:
    """`tf.gradients(losses, variables)`; a gradient is a tensor, IndexedSlices or None."""

    losses: tuple[Any, ...]
    gradients: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ScaledLoss:
    """An optimizer whose gradients come from a loss times `scale`, a LossScale of TensorFlow."""

    scale: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """An optimizer that updates with the mean of the gradients of `num_batches` batches. `given` is
    what it got of one batch."""

    num_batches: int
    given: tuple[Any, ...]


Wrapper = ScaledLoss | Accumulated


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyCall:
    """`optimizer.apply_gradients(...)`: what was given, the operations it made, and which
    optimizers called it, the outermost first."""

    optimizer: Any
    gradients_and_variables: tuple[tuple[Any, Any], ...]
    global_step: Any
    operations: frozenset[str]
    wrappers: tuple[Wrapper, ...] = ()


@dataclass(slots=True)
class Recording:
    """All calls on one graph, in order. foreign: optimizers of Keras that were called."""

    gradients: list[GradientCall] = field(default_factory=list[GradientCall])
    updates: list[ApplyCall] = field(default_factory=list[ApplyCall])
    foreign: list[Any] = field(default_factory=list[Any])
    _open: list[Wrapper] = field(default_factory=list[Wrapper])

    @contextmanager
    def within(self, wrapper: Wrapper) -> Generator[None]:
        """While the optimizer inside `wrapper` applies gradients."""
        self._open.append(wrapper)
        try:
            yield
        finally:
            self._open.pop()

    @property
    def wrappers(self) -> tuple[Wrapper, ...]:
        """Those that are open, the outermost first."""
        return tuple(self._open)


_watched: list[tuple[Any, Recording]] = []


def recording_now() -> Recording | None:
    """The recording of the graph that is being built; None where nobody watches."""
    graph = tf.compat.v1.get_default_graph()
    return next((found for watched, found in reversed(_watched) if watched is graph), None)


@contextmanager
def recording(graph: Any) -> Generator[Recording]:
    """Watch the calls that concern `graph`."""
    found = Recording()
    # The public functions all end in these; TensorFlow is pinned to one release.
    gradients_util: Any = importlib.import_module("tensorflow.python.ops.gradients_util")
    scaling: Any = tf.compat.v1.mixed_precision.MixedPrecisionLossScaleOptimizer
    with ExitStack() as stack:
        for owner, name, watching in (
            (gradients_util, "_GradientsHelper", _watching_gradients),
            (tf.compat.v1.train.Optimizer, "apply_gradients", _watching_apply),
            (scaling, "compute_gradients", _unscaled),
            (scaling, "apply_gradients", _saying_scale),
            (tf.keras.optimizers.Optimizer, "apply_gradients", _noting_foreign),
            (tf.keras.optimizers.legacy.Optimizer, "apply_gradients", _noting_foreign),
        ):
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, functools.wraps(original)(watching(original, graph, found)))
        _watched.append((graph, found))
        stack.callback(_watched.pop)
        yield found


def _is_built(graph: Any) -> bool:
    return tf.compat.v1.get_default_graph() is graph


def _watching_gradients(
    helper: Callable[..., Any], graph: Any, found: Recording
) -> Callable[..., Any]:
    def watching(ys: Any, xs: Any, *args: Any, **kwargs: Any) -> Any:
        result = helper(ys, xs, *args, **kwargs)
        if _is_built(graph):
            losses = tuple(ys) if isinstance(ys, (list, tuple)) else (ys,)
            found.gradients.append(GradientCall(losses=losses, gradients=tuple(result)))
        return result

    return watching


def _watching_apply(apply: Callable[..., Any], graph: Any, found: Recording) -> Callable[..., Any]:
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
                wrappers=found.wrappers,
            )
        )
        return result

    return watching


def _unscaled(compute: Callable[..., Any], graph: Any, found: Recording) -> Callable[..., Any]:
    """Gradients of the loss as it is: the runtime scales it."""

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_built(graph):
            return compute(self, *args, **kwargs)
        return self._optimizer.compute_gradients(*args, **kwargs)

    return watching


def _saying_scale(apply: Callable[..., Any], graph: Any, found: Recording) -> Callable[..., Any]:
    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_built(graph):
            return apply(self, *args, **kwargs)
        with found.within(ScaledLoss(self._loss_scale)):
            return self._optimizer.apply_gradients(*args, **kwargs)

    return watching


def _noting_foreign(apply: Callable[..., Any], graph: Any, found: Recording) -> Callable[..., Any]:
    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.foreign.append(self)
        return apply(self, *args, **kwargs)

    return watching
