"""Between host memory and the device that computes.

Decides how weights and gradients cross: on a CPU they do not, on a GPU by streams of their own, so
that copies overlap the computation, from and to pinned memory. Does not decide when anything
crosses (weight_traffic.py), or how host memory is pinned (pinned_memory.py).

What has been run where: `HostLink` is in every test. `CudaLink` has been run on no GPU yet, only on
a simulated one whose streams run late and in any order that their events allow; a run on a GPU says
so once.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from openwafer.runtime.memory.account import cuda_number
from openwafer.runtime.stores.one_block import in_one_block

__all__ = ["CudaLink", "Delivery", "DeviceLink", "HostLink", "link_to"]

_log = logging.getLogger("openwafer")

_ALIGNMENT_BYTES = 512
"""Of each weight in its layer's memory, as torch's allocator aligns what it gives."""


@dataclass(slots=True, eq=False)
class Delivery:
    """Weights of a layer on the device, or on their way to it.

    tensors: in the order that was asked for; the list is emptied once they are used, so that no
        other frame that still knows it keeps their memory.
    arrived: after it they are there; None where nothing moves.
    """

    tensors: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    arrived: torch.cuda.Event | None = None


class DeviceLink(ABC):
    """host_threads: how many of torch's threads the optimizer may use beside the layers.
    moves: whether anything crosses, so that there is something to overlap."""

    host_threads: int
    moves: bool

    @abstractmethod
    def to_device(self, weights: Sequence[torch.Tensor]) -> Delivery:
        """Begin to bring weights over. Called on a thread beside the computing one."""

    @abstractmethod
    def await_weights(self, delivery: Delivery) -> None:
        """What is computed from now on sees these weights. Called on the computing thread."""

    @abstractmethod
    def weights_used(self, delivery: Delivery) -> None:
        """Nothing that is computed from now on reads these weights: their memory is free for
        others. Called on the computing thread."""

    @abstractmethod
    def wait_until_copied(self, delivery: Delivery) -> None:
        """Until the host memory that the weights came from may be written to."""

    @abstractmethod
    def gradients_ready(self) -> torch.cuda.Event | None:
        """A point after all that is computed so far, for `to_host`. Called on the computing
        thread."""

    @abstractmethod
    def to_host(
        self, gradients: Mapping[str, torch.Tensor], ready: torch.cuda.Event | None
    ) -> dict[str, torch.Tensor]:
        """Gradients on the host, complete: as they are at the point `ready`. Called on a thread
        beside the computing one."""


class HostLink(DeviceLink):
    """The device is the host: nothing moves.

    Beside the layers (a store on disk) the optimizer has one thread, and the layers keep the cores:
    with 4,096 tokens per update, AdamW was 0.6 % of a step of two of GPT-2 XL's layers on two
    cores.
    """

    host_threads = 1
    moves = False

    def to_device(self, weights: Sequence[torch.Tensor]) -> Delivery:
        return Delivery(tensors=list(weights))

    def await_weights(self, delivery: Delivery) -> None:
        return

    def weights_used(self, delivery: Delivery) -> None:
        delivery.tensors.clear()

    def wait_until_copied(self, delivery: Delivery) -> None:
        return

    def gradients_ready(self) -> None:
        return None

    def to_host(
        self, gradients: Mapping[str, torch.Tensor], ready: torch.cuda.Event | None
    ) -> dict[str, torch.Tensor]:
        return dict(gradients)


class CudaLink(DeviceLink):
    """A GPU: a stream for weights, one for gradients, and events between them and the computation.

    The computing thread queues work far ahead of the GPU, and waits for nothing here. Memory is
    reused in the order of streams: a layer's weights are one block of the weights' stream, and that
    stream is made to wait for the layer before the block is given back, so that whatever is copied
    into it next comes after. `record_stream` would keep the block until the *host* sees that the
    layer has run, and a host that is ahead would take new memory for every layer. Gradients are
    kept until the thread that copies them has waited for the copy, so that they need neither.

    The host's side: torch keeps pinned blocks that are given back and reuses them, by powers of two
    of bytes, so that only the first step makes any. Events that a thread waits for are blocking
    ones: a spinning wait would take a core from the optimizer.
    """

    moves = True

    def __init__(self, device: torch.device) -> None:
        self.host_threads = max(1, (os.cpu_count() or 2) - 1)
        # By number: "cuda" would be another device on a thread whose current one is another.
        self._device = torch.device(device.type, cuda_number(device))
        self._incoming = torch.cuda.Stream(self._device)
        self._outgoing = torch.cuda.Stream(self._device)

    def to_device(self, weights: Sequence[torch.Tensor]) -> Delivery:
        # A thread begins with device 0, which need not be this process's.
        with torch.cuda.device(self._device), torch.cuda.stream(self._incoming):
            _, tensors = in_one_block(weights, self._room, alignment_bytes=_ALIGNMENT_BYTES)
            for target, weight in zip(tensors, weights, strict=True):
                target.copy_(weight, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(self._incoming)
        return Delivery(tensors=tensors, arrived=arrived)

    def await_weights(self, delivery: Delivery) -> None:
        assert delivery.arrived is not None
        self._computing().wait_event(delivery.arrived)

    def weights_used(self, delivery: Delivery) -> None:
        used = torch.cuda.Event()
        used.record(self._computing())
        self._incoming.wait_event(used)
        delivery.tensors.clear()  # only now may the block be given to another layer

    def wait_until_copied(self, delivery: Delivery) -> None:
        assert delivery.arrived is not None
        delivery.arrived.synchronize()

    def gradients_ready(self) -> torch.cuda.Event:
        ready = torch.cuda.Event()
        ready.record(self._computing())
        return ready

    def to_host(
        self, gradients: Mapping[str, torch.Tensor], ready: torch.cuda.Event | None
    ) -> dict[str, torch.Tensor]:
        assert ready is not None
        with torch.cuda.device(self._device), torch.cuda.stream(self._outgoing):
            self._outgoing.wait_event(ready)
            on_host: dict[str, torch.Tensor] = {}
            for name, gradient in gradients.items():
                target = torch.empty_like(gradient, device="cpu", pin_memory=True)
                on_host[name] = target.copy_(gradient, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._outgoing)
        copied.synchronize()
        return on_host

    def _room(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


def link_to(device: torch.device) -> DeviceLink:
    """The link for a device."""
    if device.type == "cpu":
        return HostLink()
    _log.warning("weight streaming to %s: tested on a simulated GPU, run on none yet", device)
    return CudaLink(device)
