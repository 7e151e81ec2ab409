"""Random numbers that every way of running a model draws alike.

Decides which numbers a random operation gets: a function of (seed, step, microbatch, how many
random operations came before it in the model), and of nothing else (design decision 5). Does not
decide which operations are random in a model.

`draw_bernoulli` is the only draw. Layer functions call it in place of torch's random operations;
`KeyedDraws` puts it in the same place in the plain PyTorch loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DrawKey", "KeyedDraws", "draw_bernoulli", "dropout_backward", "keyed_dropout"]


@dataclass(frozen=True, slots=True)
class DrawKey:
    """Which draw: `ordinal` counts the model's random operations in execution order."""

    seed: int
    step: int
    microbatch: int
    ordinal: int

    def at(self, ordinal: int) -> DrawKey:
        return replace(self, ordinal=ordinal)


_generators: dict[torch.device, torch.Generator] = {}


def _generator(key: DrawKey, device: torch.device) -> torch.Generator:
    """A generator of our own, seeded for this draw; torch's default one is left alone."""
    generator = _generators.get(device)
    if generator is None:
        generator = _generators[device] = torch.Generator(device)
    text = f"{key.seed}/{key.step}/{key.microbatch}/{key.ordinal}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator


def draw_bernoulli(
    key: DrawKey, offset: int, like: torch.Tensor, probability: float
) -> torch.Tensor:
    """Zeros and ones, ones with `probability`: shape, dtype and device of `like`.

    Drawn in float32 whatever the dtype of `like`, so that precision does not change the pattern.
    """
    drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    drawn.bernoulli_(probability, generator=_generator(key.at(key.ordinal + offset), like.device))
    return drawn.to(like.dtype)


def keyed_dropout(
    key: DrawKey, offset: int, value: torch.Tensor, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What aten.native_dropout gives in training: the scaled result and the boolean keep mask."""
    keep = 1.0 - probability
    mask = draw_bernoulli(key, offset, value, keep)
    # The mask is scaled first, in the dtype of the value, as torch's own dropout does on a CPU:
    # in 16 bits another order would round otherwise than the plain loop.
    scaled = mask / keep if keep else mask
    return value * scaled, mask.to(torch.bool)


def dropout_backward(grad: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """aten.native_dropout_backward, rounded as eager PyTorch rounds it: on a CPU, where that has no
    fused dropout, the mask is scaled first."""
    if grad.device.type == "cpu":
        return grad * (mask.to(grad.dtype) * scale)
    return torch.ops.aten.native_dropout_backward.default(grad, mask, scale)


class KeyedDraws(TorchDispatchMode):
    """While active, dropout in ordinary PyTorch code draws by `key`, counting up from its ordinal.

    Other random operations (torch.rand in a model's forward) keep torch's default generator; no
    kernel takes them, so they run in the plain loop alone.
    """

    def __init__(self, key: DrawKey) -> None:
        super().__init__()
        self._key = key
        self.num_draws = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        aten = torch.ops.aten
        if func is aten.bernoulli_.float:
            probability = args[1] if len(args) > 1 else (kwargs or {}).get("p", 0.5)
            return args[0].copy_(self._draw(args[0], probability))
        if func is aten.bernoulli.p:
            return self._draw(args[0], args[1])
        if func is aten.native_dropout.default and args[2] is not False:
            offset = self._count()
            return keyed_dropout(self._key, offset, args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _count(self) -> int:
        self.num_draws += 1
        return self.num_draws - 1

    def _draw(self, like: torch.Tensor, probability: float) -> torch.Tensor:
        return draw_bernoulli(self._key, self._count(), like, probability)
