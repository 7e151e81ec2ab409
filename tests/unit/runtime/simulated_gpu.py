"""A GPU for tests: streams whose work runs late, in any order that their events allow.

Decides what torch.cuda's streams, events and allocator promise, and no more: work queued on a
stream runs when somebody waits for it, or at random; a wait holds up its own stream alone; memory
that is given back is given to the next one who asks on the same stream, at once, whatever still
reads it. So a missing wait gives other numbers. It has no matrix units: tests queue functions.

Device memory is host memory; `installed` puts the simulation in the place of torch.cuda in the
modules that move weights.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from openwafer.runtime.stores import device_link, pinned_memory

__all__ = ["SimulatedGpu", "installed", "kernels_waiting", "names_of"]

DEVICE = 1
"""The number of the GPU: not the one that a new thread begins with."""

_Work = Callable[[], None]


@dataclass(eq=False)
class _Block:
    memory: np.ndarray
    stream: SimulatedStream


@dataclass(eq=False)
class SimulatedStream:
    gpu: SimulatedGpu
    name: str
    at_once: bool = False
    queue: deque[tuple[str, Any]] = field(default_factory=deque)
    free: list[_Block] = field(default_factory=list)

    def push(self, kind: str, what: Any) -> None:
        with self.gpu.lock:
            self.queue.append((kind, what))
            if self.at_once:
                while self.queue:
                    self.gpu.run_head(self)
            self.gpu.some_progress()

    def wait_event(self, event: SimulatedEvent) -> None:
        assert event.stream is not None, (
            "a wait for an event that is not recorded waits for nothing"
        )
        self.push("wait", event)


@dataclass(eq=False)
class SimulatedEvent:
    gpu: SimulatedGpu
    stream: SimulatedStream | None = None
    done: bool = False

    def record(self, stream: SimulatedStream) -> None:
        self.stream = stream
        stream.push("record", self)

    def synchronize(self) -> None:
        with self.gpu.lock:
            self.gpu.host_waits.append(threading.current_thread().name)
            self.gpu.run_until(self)


class SimulatedGpu:
    """One device.

    Args:
        seed: of the order in which streams run; None runs only what is waited for, and as late as
            can be.
        at_once: the computing stream runs what it is given at once, for layers that really compute.
    """

    def __init__(self, seed: int | None = None, *, at_once: bool = False) -> None:
        self.lock = threading.RLock()
        self._random = None if seed is None else random.Random(seed)
        self._here = threading.local()
        self.computing = SimulatedStream(self, "computing", at_once)
        self.streams = [self.computing]
        self.host_waits: list[str] = []
        self.num_blocks = 0
        self.pageable_copies = 0
        self.registered: dict[int, int] = {}
        self._blocks: list[_Block] = []
        self._copy = torch.Tensor.copy_
        self._here.device = DEVICE

    # ------------------------------------------------------------------ progress

    def run_head(self, stream: SimulatedStream) -> None:
        """The next work of a stream, after what it waits for."""
        head = kind, what = stream.queue[0]
        if kind == "wait" and not what.done:
            self.run_until(what)
        if not stream.queue or stream.queue[0] is not head:
            return  # others have run it meanwhile
        stream.queue.popleft()
        if kind == "run":
            what()
        elif kind == "record":
            what.done = True

    def run_until(self, event: SimulatedEvent) -> None:
        assert event.stream is not None
        while not event.done:
            self.some_progress()
            if not event.done:
                self.run_head(event.stream)

    def some_progress(self) -> None:
        """As much as a GPU may have done by now."""
        while self._random and self._random.random() < 0.5:
            ready = [s for s in self.streams if s.queue and self._can_run(s)]
            if not ready:
                return
            self.run_head(self._random.choice(ready))

    @staticmethod
    def _can_run(stream: SimulatedStream) -> bool:
        kind, what = stream.queue[0]
        return kind != "wait" or what.done

    def finish(self) -> None:
        with self.lock:
            for stream in self.streams:
                while stream.queue:
                    self.run_head(stream)

    # ------------------------------------------------------------------ memory and work

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the calling thread's stream: the first free block that is large enough."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        with self.lock:
            stream = self.current_stream()
            block = next((b for b in stream.free if b.memory.nbytes >= num_bytes), None)
            if block is None:
                self.num_blocks += 1
                block = _Block(np.full(max(num_bytes, 1), 0xFF, dtype=np.uint8), stream)
                self._blocks.append(block)
            else:
                stream.free.remove(block)
            shown = block.memory[:num_bytes]
            weakref.finalize(shown, self._give_back, block)
        return torch.from_numpy(shown).view(dtype).view(shape)

    def _give_back(self, block: _Block) -> None:
        with self.lock:
            block.stream.free.append(block)

    def _in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory, without keeping it from being given back, as a queued kernel has it."""
        for block in self._blocks:
            whole = torch.from_numpy(block.memory)
            start = tensor.data_ptr() - whole.data_ptr()
            if 0 <= start < whole.numel():
                part = whole[start : start + tensor.nbytes].view(tensor.dtype)
                return part.as_strided(tensor.shape, tensor.stride())
        return tensor

    def compute(self, kernel: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Queue `kernel(*tensors)` on the computing stream."""
        places = [self._in_place(tensor) for tensor in tensors]
        self.computing.push("run", lambda: kernel(*places))

    def copy_(self, target: torch.Tensor, source: torch.Tensor, **options: Any) -> torch.Tensor:
        stream = getattr(self._here, "stream", None)
        if stream is None or not options.get("non_blocking"):
            return self._copy(target, source, **options)
        to, of = self._in_place(target), self._in_place(source)
        if to is not target and not self._is_registered(source):
            self.pageable_copies += 1
        stream.push("run", lambda: self._copy(to, of))
        return target

    # ------------------------------------------------------------------ what torch.cuda has

    def namespace(self) -> SimpleNamespace:
        return SimpleNamespace(
            Stream=self._stream,
            Event=lambda blocking=False: SimulatedEvent(self),
            stream=self._on_stream,
            device=self._on_device,
            current_stream=lambda device: self.current_stream(),
            current_device=self._current_device,
            cudart=lambda: self,
            check_error=_check_error,
        )

    def _stream(self, device: torch.device) -> SimulatedStream:
        assert device.index == DEVICE
        stream = SimulatedStream(self, f"stream {len(self.streams)}")
        self.streams.append(stream)
        return stream

    def current_stream(self) -> SimulatedStream:
        return getattr(self._here, "stream", None) or self.computing

    def _current_device(self) -> int:
        return getattr(self._here, "device", 0)

    @contextmanager
    def _on_stream(self, stream: SimulatedStream) -> Iterator[None]:
        assert self._current_device() == DEVICE, "a thread works on another GPU than its stream"
        before = getattr(self._here, "stream", None)
        self._here.stream = stream
        yield
        self._here.stream = before

    @contextmanager
    def _on_device(self, device: torch.device) -> Iterator[None]:
        before = self._current_device()
        self._here.device = device.index
        yield
        self._here.device = before

    def cudaHostRegister(self, place: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        overlaps = any(p < place + num_bytes and place < p + n for p, n in self.registered.items())
        if overlaps or place % 4096 or num_bytes % 4096:
            return 1
        self.registered[place] = num_bytes
        return 0

    def cudaHostUnregister(self, place: int) -> int:  # noqa: N802
        return 0 if self.registered.pop(place, None) else 1

    def _is_registered(self, tensor: torch.Tensor) -> bool:
        place = tensor.data_ptr()
        return any(
            p <= place and place + tensor.nbytes <= p + n for p, n in self.registered.items()
        )


def _check_error(code: int) -> None:
    if code:
        raise RuntimeError("CUDA error: out of memory")


class _Torch:
    """torch, with memory and streams of the simulation."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        self.cuda, self._gpu = gpu.namespace(), gpu

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        assert torch.device(device).index == DEVICE
        return self._gpu.empty(*shape, dtype=dtype)

    @staticmethod
    def empty_like(tensor: torch.Tensor, *, device: Any, pin_memory: bool = False) -> torch.Tensor:
        return torch.empty_like(tensor, device=device)


@contextmanager
def installed(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    """While it lasts, `CudaLink` and pinned memory are the simulation's."""
    with monkeypatch.context() as patch:
        for module in (device_link, pinned_memory):
            patch.setattr(module, "torch", _Torch(gpu))
        patch.setattr(device_link, "cuda_number", lambda device: DEVICE)
        patch.setattr(torch.Tensor, "copy_", lambda *given, **options: gpu.copy_(*given, **options))
        yield gpu


def kernels_waiting(stream: SimulatedStream) -> int:
    return sum(kind == "run" for kind, _ in stream.queue)


def names_of(threads: Sequence[str]) -> set[str]:
    """Of pools, without the number of the thread."""
    return {name.rpartition("_")[0] or name for name in threads}
