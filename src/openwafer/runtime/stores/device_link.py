"""Between host memory and the device that computes.

Decides how weights and gradients cross: on a CPU they do not, on a GPU by streams of their own, so
that copies overlap the computation, from and to pinned memory. Does not decide when anything
crosses (weight_traffic.py).

What has been run where: `HostLink` is in every test. `CudaLink` has been run on no GPU yet; it is
written to the documented rules of torch's streams, and a run on a GPU says so once.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

__all__ = ["CudaLink", "DeviceLink", "HostLink", "link_to"]

_log = logging.getLogger("openwafer")


class DeviceLink(ABC):
    """host_threads: how many of torch's threads the optimizer may use beside the layers.
    moves: whether anything crosses, so that there is something to overlap."""

    host_threads: int
    moves: bool

    @abstractmethod
    def to_device(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Begin to bring weights over. Called on the store thread."""

    @abstractmethod
    def await_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """What is computed from now on sees these weights. Called on the computing thread."""

    @abstractmethod
    def weights_used(self, weights: Sequence[torch.Tensor]) -> None:
        """Nothing that is computed from now on reads these weights."""

    @abstractmethod
    def to_host(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients on the host, complete. Called on the store thread."""


class HostLink(DeviceLink):
    """The device is the host: nothing moves.

    Beside the layers (a store on disk) the optimizer has one thread, and the layers keep the cores:
    with 4,096 tokens per update, AdamW was 0.6 % of a step of two of GPT-2 XL's layers on two
    cores.
    """

    host_threads = 1
    moves = False

    def to_device(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(weights)

    def await_weights(self, weights: Sequence[torch.Tensor]) -> None:
        return

    def weights_used(self, weights: Sequence[torch.Tensor]) -> None:
        return

    def to_host(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(gradients)


class CudaLink(DeviceLink):
    """A GPU: one stream for weights, one for gradients, an event for each set of weights.

    Device memory comes from torch's caching allocator, which reuses it without a call to the
    driver once a step has been run; `record_stream` keeps it from being reused too early.
    """

    moves = True

    def __init__(self, device: torch.device) -> None:
        self.host_threads = max(1, (os.cpu_count() or 2) - 1)
        self._device = device
        self._incoming = torch.cuda.Stream(device)
        self._outgoing = torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}

    def to_device(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.cuda.stream(self._incoming):
            copies = [weight.to(self._device, non_blocking=True) for weight in weights]
            event = torch.cuda.Event()
            event.record()
        if copies:
            self._arrived[copies[0].data_ptr()] = event
        return copies

    def await_weights(self, weights: Sequence[torch.Tensor]) -> None:
        if weights:
            torch.cuda.current_stream(self._device).wait_event(
                self._arrived.pop(weights[0].data_ptr())
            )

    def weights_used(self, weights: Sequence[torch.Tensor]) -> None:
        for weight in weights:
            weight.record_stream(torch.cuda.current_stream(self._device))

    def to_host(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self._outgoing.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._outgoing):
            for gradient in gradients.values():
                gradient.record_stream(self._outgoing)
            on_host = {
                name: torch.empty_like(gradient, device="cpu", pin_memory=True).copy_(
                    gradient, non_blocking=True
                )
                for name, gradient in gradients.items()
            }
        self._outgoing.synchronize()
        return on_host


def link_to(device: torch.device) -> DeviceLink:
    """The link for a device."""
    if device.type == "cpu":
        return HostLink()
    _log.warning("weight streaming to %s: streams and pinned memory are not tested here", device)
    return CudaLink(device)
