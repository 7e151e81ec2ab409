"""Random numbers that depend on names, not on history.

Decides how seeds are derived from (seed, epoch, batch) and how Python's, NumPy's and torch's
global generators are set aside and put back. Does not decide when. Accelerators' generators are
not touched: data are loaded on the host. The generators belong to the process, so one thread at a
time may set them aside; other threads should not draw from them meanwhile.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = [
    "RandomStream",
    "derive_seed",
    "own_generators",
    "preserved",
    "result_of",
    "seed_all",
]

_T = TypeVar("_T")

_OWN_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

# Two sequences in two threads must not take each other's generators for the caller's.
_set_aside = threading.RLock()
_changed = threading.Condition(_set_aside)


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from names and numbers; equal parts give equal seeds on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def seed_all(seed: int, generators: Iterable[object] = ()) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU), and `generators`.

    Each gets its own number: NumPy's and torch's are the same algorithm, and one seed in both
    gives the same numbers twice.
    """
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") & 0xFFFFFFFF)
    torch.default_generator.manual_seed(derive_seed(seed, "torch"))
    for number, generator in enumerate(generators):
        _seed_one(generator, derive_seed(seed, "own", number))


def own_generators(*owners: object) -> list[object]:
    """The generators that these objects hold as attributes, each once, in a stable order."""
    found: dict[int, object] = {}
    for owner in owners:
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, _OWN_GENERATORS):
                found.setdefault(id(value), value)
    return list(found.values())


def _seed_one(generator: object, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state


@dataclass(frozen=True, slots=True)
class _Snapshot:
    python: Any
    numpy: Any
    torch: torch.Tensor
    own: tuple[Any, ...]


def _snapshot(generators: Iterable[object]) -> _Snapshot:
    return _Snapshot(
        random.getstate(),
        np.random.get_state(legacy=False),
        torch.default_generator.get_state(),
        tuple(_own_state(generator) for generator in generators),
    )


def _install(snapshot: _Snapshot, generators: Iterable[object]) -> None:
    random.setstate(snapshot.python)
    np.random.set_state(snapshot.numpy)
    torch.default_generator.set_state(snapshot.torch)
    for generator, state in zip(generators, snapshot.own, strict=True):
        _set_own_state(generator, state)


def _own_state(generator: object) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    assert isinstance(generator, np.random.Generator)
    return generator.bit_generator.state


def _set_own_state(generator: object, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state


@contextmanager
def preserved() -> Generator[None, None, None]:
    """Put the global generators back as they were, whatever happens inside."""
    with _set_aside:
        before = _snapshot(())
        try:
            yield
        finally:
            _install(before, ())


def result_of(future: Future[_T]) -> _T:
    """What another thread computes. Unlike with `future.result()`, that thread, and those that it
    waits for, may use `preserved()` and `installed()` meanwhile, even if the caller is in one."""

    def tell(_: Future[_T]) -> None:
        with _changed:
            _changed.notify_all()

    with _changed:
        future.add_done_callback(tell)
        _changed.wait_for(future.done)
    return future.result()


class RandomStream:
    """A private state of the global generators (and of `generators`), used a while at a time.

    What runs under `installed()` draws from this stream and from nothing else; the caller's
    numbers go on afterwards as if it had not run.
    """

    def __init__(self, seed: int, generators: Iterable[object] = ()) -> None:
        self._generators = list(generators)
        with _set_aside:
            before = _snapshot(self._generators)
            seed_all(seed, self._generators)
            self._state = _snapshot(self._generators)
            _install(before, self._generators)

    @contextmanager
    def installed(self) -> Generator[None, None, None]:
        with _set_aside:
            before = _snapshot(self._generators)
            _install(self._state, self._generators)
            try:
                yield
            finally:
                self._state = _snapshot(self._generators)
                _install(before, self._generators)
