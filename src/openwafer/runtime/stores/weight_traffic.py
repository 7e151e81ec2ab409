"""Weights to the device and gradients back, beside the computation.

Decides that one thread talks to the store, in order, so that what is asked first is done first, and
that it is the computing one where nothing would be waited for (weights in the memory of a CPU that
computes); that backward fetches, which no update of the same step concerns, have a thread of their
own where the store allows it, so that they do not queue behind updates; that a layer's weights are
asked for ahead; and when an update runs: as its gradients arrive, or, where it needs the whole
backward pass (clipping by norm, dynamic loss scaling), just before its shard's next fetch, where it
overlaps the next forward pass. Does not decide what a layer computes (weight_streaming.py), how the
store keeps weights, or how gradients become an update.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from openwafer.runtime.compiled import CompiledLayer
from openwafer.runtime.host_threads import OnCallersThread, background_threads
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.stores.device_link import Delivery, DeviceLink
from openwafer.runtime.stores.store import Fetched, Shard, WeightStore
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder
from openwafer.runtime.update import Decision, UpdateRule

__all__ = ["WeightTraffic"]

_log = logging.getLogger("openwafer")

_T = TypeVar("_T")

_AT_ONCE = Decision(apply=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PendingUpdate:
    """An update that is decided but not applied yet; its gradients are parked in the store."""

    decision: Decision
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnDevice:
    """A layer's weights where it computes."""

    delivery: Delivery
    fetched: Fetched
    num_bytes: int


_Returned = tuple[str, Mapping[str, torch.Tensor], torch.cuda.Event | None]
"""A layer's name, its shard's gradients, and the point after which these are complete."""


class WeightTraffic:
    """Fetches, returns and updates of one run (see the module header).

    Args:
        prefetch_depth: how many layers ahead are fetched; 0 fetches when a layer is needed.
        recorder: is told of every fetch, return and update.
    """

    def __init__(
        self,
        store: WeightStore,
        shards: Sequence[Shard],
        *,
        rule: UpdateRule | None,
        link: DeviceLink,
        memory: DeviceMemory,
        prefetch_depth: int,
        recorder: Recorder = NO_RECORDER,
    ) -> None:
        self._store, self._rule, self._link = store, rule, link
        self._memory, self._recorder = memory, recorder
        self._shards = tuple(shards)
        self._shard_of = {name: shard for shard in shards for name in shard.names}
        self._prefetch_depth = prefetch_depth
        self._thread: Executor = (
            background_threads(1, "weight-store", torch_threads=link.host_threads)
            if store.waits or link.moves
            else OnCallersThread()
        )
        self._fetching = (
            background_threads(1, "weight-fetch", torch_threads=link.host_threads)
            if store.fetches_beside_updates
            else self._thread
        )
        # Both are touched by the store thread alone.
        self._parked: dict[int, str] = {}
        self._pending: dict[int, _PendingUpdate] = {}
        self._returning: deque[Future[None]] = deque()
        self._failed: BaseException | None = None
        self._told = False
        self.counters = {"layers fetched": 0, "bytes fetched": 0, "bytes returned": 0}

    # ------------------------------------------------------------------ weights

    def stream(
        self, layers: Sequence[CompiledLayer], *, backward: bool = False
    ) -> Generator[tuple[int, CompiledLayer, list[torch.Tensor]]]:
        """Each layer with its weights on the device, the following ones already on their way."""
        order = list(enumerate(layers))
        if backward:
            order.reverse()
        ahead: deque[Future[_OnDevice]] = deque()
        requested = 0
        try:
            for position, (index, compiled) in enumerate(order):
                while requested < min(position + 1 + self._prefetch_depth, len(order)):
                    ahead.append(self._request(order[requested][1], backward))
                    requested += 1
                arrived = ahead.popleft().result()
                try:
                    self._link.await_weights(arrived.delivery)
                    yield index, compiled, arrived.delivery.tensors
                finally:
                    self._release(arrived)
        finally:
            for future in ahead:
                if future.exception() is None:
                    self._release(future.result())

    def _request(self, compiled: CompiledLayer, backward: bool) -> Future[_OnDevice]:
        """Ask for a layer's weights. A weight is updated after its first reader has run
        backward, so that no weight that is still to be fetched backward has an update before it."""
        if not backward:
            return self._on_store(self._updated_fetch, compiled)
        self._raise_failure()
        return self._noted(self._fetching.submit(self._fetch, compiled, backward))

    def _updated_fetch(self, compiled: CompiledLayer) -> _OnDevice:
        """On the store thread: apply what is pending for these weights, then bring them over."""
        names = compiled.layer.parameters
        for shard in {self._shard_of[name].index: self._shard_of[name] for name in names}.values():
            self._apply_pending(shard)
        return self._fetch(compiled, backward=False)

    def _fetch(self, compiled: CompiledLayer, backward: bool) -> _OnDevice:
        direction = "backward" if backward else "forward"
        with self._recorder.span("fetch", compiled.layer.name, direction):
            fetched = self._store.fetch(compiled.streamed)
            num_bytes = _num_bytes(fetched.tensors)
            self._memory.take("weights", num_bytes)
            delivery = self._link.to_device(fetched.tensors)
        self.counters["layers fetched"] += 1
        self.counters["bytes fetched"] += num_bytes
        return _OnDevice(delivery=delivery, fetched=fetched, num_bytes=num_bytes)

    def _release(self, arrived: _OnDevice) -> None:
        self._link.weights_used(arrived.delivery)
        self._memory.give("weights", arrived.num_bytes)
        if self._link.moves and arrived.fetched.buffer is not None:
            # The device may not have read it yet; the computing thread does not wait for that.
            self._noted(self._fetching.submit(self._release_copied, arrived))
        else:
            self._store.release(arrived.fetched)

    def _release_copied(self, arrived: _OnDevice) -> None:
        self._link.wait_until_copied(arrived.delivery)
        self._store.release(arrived.fetched)

    # ------------------------------------------------------------------ gradients

    def update(
        self, index: int, layer_name: str, gradients: Mapping[str, torch.Tensor], rate: float
    ) -> None:
        """Return a shard's gradients and update it with them."""
        returned = (layer_name, gradients, self._link.gradients_ready())
        self._returning.append(self._on_store(self._update, index, returned, rate))

    def park(self, index: int, layer_name: str, gradients: Mapping[str, torch.Tensor]) -> None:
        """Return a shard's gradients, to wait for `decide`."""
        returned = (layer_name, gradients, self._link.gradients_ready())
        self._returning.append(self._on_store(self._park, index, returned))

    def decide(self, decision: Decision, rate: float) -> None:
        """What becomes of all parked gradients."""
        self._on_store(self._decide, decision, rate)

    def wait_for_returns(self, *, at_most: int) -> None:
        """Until no more than so many shards' gradients wait on the device to be taken over."""
        while len(self._returning) > at_most:
            self._returning.popleft().exception()
        self._raise_failure()

    def _update(self, index: int, returned: _Returned, rate: float) -> None:
        layer_name, gradients, _ = returned
        on_host = self._return(*returned)
        assert self._rule is not None
        with self._recorder.span("update", layer_name):
            rule = self._rule
            self._store.update(
                self._shards[index], on_host, rate, lambda grads: rule.clip_(grads, _AT_ONCE)
            )
        self._memory.give("gradients", _num_bytes(list(gradients.values())))

    def _park(self, index: int, returned: _Returned) -> None:
        layer_name, gradients, _ = returned
        on_host = self._return(*returned)
        with self._recorder.span("return", layer_name, "parked"):
            self._store.park(self._shards[index], on_host)
        self._parked[index] = layer_name
        self._memory.give("gradients", _num_bytes(list(gradients.values())))

    def _return(
        self,
        layer_name: str,
        gradients: Mapping[str, torch.Tensor],
        ready: torch.cuda.Event | None,
    ) -> dict[str, torch.Tensor]:
        with self._recorder.span("return", layer_name):
            on_host = self._link.to_host(gradients, ready)
        self.counters["bytes returned"] += _num_bytes(list(on_host.values()))
        return on_host

    def _decide(self, decision: Decision, rate: float) -> None:
        for index in self._parked if decision.apply else ():
            self._pending[index] = _PendingUpdate(decision=decision, learning_rate=rate)
        if not decision.apply:
            self._parked.clear()

    def _apply_pending(self, shard: Shard) -> None:
        """On the store thread: the update that a shard still waits for, if there is one."""
        update = self._pending.pop(shard.index, None)
        if update is None:
            return
        rule = self._rule
        assert rule is not None
        with self._recorder.span("update", self._parked.pop(shard.index), "put off"):
            self._store.update(
                shard,
                None,
                update.learning_rate,
                lambda grads: rule.clip_(grads, update.decision),
            )

    # ------------------------------------------------------------------ the store thread

    def flush(self) -> None:
        """Apply every pending update; after this the store is as of the last step."""
        self.wait_for_returns(at_most=0)
        for shard in self._shards:
            self._on_store(self._apply_pending, shard).result()

    def _on_store(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Queue work for the store thread; a failure of it surfaces at the next request."""
        self._raise_failure()
        return self._noted(self._thread.submit(function, *arguments))

    def _noted(self, future: Future[_T]) -> Future[_T]:
        future.add_done_callback(self._note_failure)
        return future

    def _raise_failure(self) -> None:
        if self._failed is not None:
            self._told = True
            raise self._failed

    def _note_failure(self, future: Future[Any]) -> None:
        self._failed = self._failed or future.exception()

    def close(self) -> None:
        self._fetching.shutdown(wait=True)
        self._thread.shutdown(wait=True)
        self._memory.give_all("gradients")  # of what could not be returned
        if self._failed is not None and not self._told:
            _log.error("the weight store failed in the last step: %s", self._failed)


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
