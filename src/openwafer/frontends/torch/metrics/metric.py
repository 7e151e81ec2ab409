"""What a metric is: a graph part, a host part, and a name in the registry.

Decides how a metric's device outputs reach the host: in an ordinary run at once, during a capture
as further outputs of the graph, which the executor hands back after each step. Does not decide when
metrics are reset or written (train/).

Source of names and behaviour: CS-2 software 1.6 documentation, `CBMetric` and friends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from openwafer.errors import ConfigError, nearest

__all__ = [
    "CBMetric",
    "DeviceOutputs",
    "capture_metrics",
    "compute_all_metrics",
    "forget_all_metrics",
    "get_all_metrics",
    "reset_all_metrics",
]

_registry: dict[str, CBMetric] = {}


@dataclass(frozen=True, slots=True)
class DeviceOutputs:
    """What `update_on_device` gives: the tensors for `update_on_host`, by position and by name."""

    args: Sequence[torch.Tensor] = ()
    kwargs: dict[str, torch.Tensor] = field(default_factory=dict)

    def flat(self) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.as_tensor, (*self.args, *self.kwargs.values())))


@dataclass(slots=True)
class _Capture:
    """The metrics called while a model is captured, in call order."""

    calls: list[tuple[CBMetric, tuple[torch.Tensor, ...]]] = field(default_factory=list)


_capture: ContextVar[_Capture | None] = ContextVar("metric_capture", default=None)


@contextmanager
def capture_metrics() -> Generator[list[tuple[CBMetric, tuple[torch.Tensor, ...]]]]:
    """Collect metric calls instead of running their host part; gives the list of calls."""
    capture = _Capture()
    token = _capture.set(capture)
    try:
        yield capture.calls
    finally:
        _capture.reset(token)


class CBMetric(ABC):
    """A metric with state on the host.

    Subclasses override `init_state`, `update_on_host`, `compute`, and `update_on_device` where
    part of the work belongs in the graph. A name that is taken gets a number appended.
    """

    def __init__(self, name: str | None = None) -> None:
        base = name or type(self).__name__
        unique, count = base, 0
        while unique in _registry:
            count += 1
            unique = f"{base}_{count}"
        self._name = unique
        self._num_updates = 0
        self._host_kwargs: tuple[str, ...] | None = None
        _registry[unique] = self
        self.init_state()

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_updates(self) -> int:
        return self._num_updates

    def init_state(self) -> None:
        """Set the state to its initial value."""
        return

    def reset_state(self) -> None:
        self.init_state()

    def set_metric_state(self, state_dict: Mapping[str, Any]) -> None:
        """Replace attributes of the state, such as sums of an earlier evaluation."""
        for name, value in state_dict.items():
            if not hasattr(self, name):
                raise ConfigError(
                    f"metric {self.name} has no state `{name}`",
                    hint=nearest(name, vars(self)),
                )
            setattr(self, name, value)

    def reset(self) -> None:
        """Forget every update."""
        self._num_updates = 0
        self.reset_state()

    def update_on_device(self, *args: Any, **kwargs: Any) -> DeviceOutputs:
        """The part that runs in the graph; by default everything is passed to the host."""
        return DeviceOutputs(args=list(args), kwargs=kwargs)

    @abstractmethod
    def update_on_host(self, *args: Any, **kwargs: Any) -> None:
        """The part that runs on the host, on CPU tensors."""

    @abstractmethod
    def compute(self) -> float:
        """The metric's value over all updates since the last reset."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        outputs = self.update_on_device(*args, **kwargs)
        names = tuple(outputs.kwargs)
        if self._host_kwargs not in (None, names):
            raise ConfigError(
                f"metric {self.name} is called with the keywords {', '.join(names) or 'none'}",
                allowed=f"those of its first call: {', '.join(self._host_kwargs) or 'none'}",
                hint="one metric for each way of calling it",
            )
        self._host_kwargs = names
        capture = _capture.get()
        if capture is not None:
            capture.calls.append((self, outputs.flat()))
            return
        self.update_from_device(outputs.flat())

    def update_from_device(self, tensors: Sequence[torch.Tensor]) -> None:
        """Run the host part on the flat tensors of one step (positional ones first)."""
        host = [tensor.detach().cpu() for tensor in tensors]
        names = self._host_kwargs or ()
        split = len(host) - len(names)
        self.update_on_host(*host[:split], **dict(zip(names, host[split:], strict=True)))
        self._num_updates += 1


def get_all_metrics() -> dict[str, CBMetric]:
    """All metrics made so far, by name."""
    return dict(_registry)


def compute_all_metrics() -> dict[str, float]:
    """The value of every metric that was updated since its last reset."""
    return {name: metric.compute() for name, metric in _registry.items() if metric.num_updates}


def reset_all_metrics() -> None:
    """Reset every metric."""
    for metric in _registry.values():
        metric.reset()


def forget_all_metrics() -> None:
    """Drop every metric, so that a second model in this process gets the plain names again."""
    _registry.clear()
