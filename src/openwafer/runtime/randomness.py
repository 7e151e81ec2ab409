"""Random numbers that every way of running a model draws alike.

Decides which numbers a random operation gets: a function of (seed, step, microbatch, how many
random operations came before it in the model), and of nothing else (design decision 5). Does not
decide which operations are random in a model.

Layer functions call `keyed_dropout` and `keyed_draw` in place of torch's random operations;
`KeyedDraws` puts the same in the same places in the plain PyTorch loop. Numbers are drawn in row
order whatever the memory layout, since a layer may hold a tensor in another layout than eager code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DrawKey",
    "KeyedDraws",
    "apply_dropout",
    "draw_bernoulli",
    "draw_kept",
    "dropout_backward",
    "has_keyed_draw",
    "keyed_draw",
    "keyed_dropout",
]

_aten = torch.ops.aten


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
    generator.manual_seed(_seed_of(key))
    return generator


def _seed_of(key: DrawKey) -> int:
    """63 bits that differ from key to key."""
    text = f"{key.seed}/{key.step}/{key.microbatch}/{key.ordinal}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def draw_bernoulli(
    key: DrawKey, offset: int, like: torch.Tensor, probability: float
) -> torch.Tensor:
    """Zeros and ones, ones with `probability`: shape, dtype and device of `like`.

    Drawn in float32 whatever the dtype of `like`, so that precision does not change the pattern.
    """
    drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    drawn.bernoulli_(probability, generator=_generator(key.at(key.ordinal + offset), like.device))
    return _laid_out(drawn.to(like.dtype), like)


def draw_kept(
    key: DrawKey, offset: int, shape: Sequence[int], probability: float, device: torch.device
) -> torch.Tensor:
    """Where `draw_bernoulli` gives ones, as booleans [*shape] in row order."""
    generator = _generator(key.at(key.ordinal + offset), device)
    # On a CPU the numbers drawn do not depend on the dtype that they are drawn into.
    dtype = torch.bool if device.type == "cpu" else torch.float32
    drawn = torch.empty(tuple(shape), dtype=dtype, device=device)
    return drawn.bernoulli_(probability, generator=generator).to(torch.bool)


def keyed_dropout(
    key: DrawKey, offset: int, value: torch.Tensor, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What aten.native_dropout gives in training: the scaled result and the boolean keep mask."""
    mask = draw_bernoulli(key, offset, value, 1.0 - probability)
    return apply_dropout(value, mask, probability)


def apply_dropout(
    value: torch.Tensor, mask: torch.Tensor, probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`keyed_dropout` with its mask, ones where a value is kept, drawn before."""
    keep, mask = 1.0 - probability, mask.to(value.dtype)
    # The mask is scaled first, in the dtype of the value, as torch's own dropout does on a CPU:
    # in 16 bits another order would round otherwise than the plain loop.
    scaled = mask / keep if keep else mask
    return value * scaled, mask.to(torch.bool)


def dropout_backward(grad: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """aten.native_dropout_backward, rounded as eager PyTorch rounds it: on a CPU, where that has no
    fused dropout, the mask is scaled first."""
    if grad.device.type == "cpu":
        return grad * (mask.to(grad.dtype) * scale)
    return _aten.native_dropout_backward.default(grad, mask, scale)


def _laid_out(drawn: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`drawn` in the memory layout that torch would give a tensor like `like`."""
    result = torch.empty_like(like, dtype=drawn.dtype)
    return drawn if result.stride() == drawn.stride() else result.copy_(drawn)


# ---------------------------------------------------------------- operations other than dropout

_FACTORIES: Mapping[Any, Any] = {
    _aten.rand.default: _aten.rand.generator,
    _aten.randn.default: _aten.randn.generator,
    _aten.randint.default: _aten.randint.generator,
    _aten.randint.low: _aten.randint.low_generator,
    _aten.randperm.default: _aten.randperm.generator,
    _aten.normal.float_float: _aten.normal.float_float,
}
"""Operations that make a tensor of a given size → the overload that takes a generator."""

_Fill = Callable[..., torch.Tensor]


def _below(tensor: torch.Tensor, high: int, *, generator: torch.Generator) -> torch.Tensor:
    return tensor.random_(0, high, generator=generator)


_LIKE: Mapping[Any, _Fill] = {
    _aten.rand_like.default: torch.Tensor.uniform_,
    _aten.randn_like.default: torch.Tensor.normal_,
    _aten.randint_like.default: _below,
    _aten.randint_like.low_dtype: torch.Tensor.random_,
}
"""Operations that make a tensor like another one → what fills it."""

_FILLS: Mapping[str, _Fill] = {
    "normal_functional": torch.Tensor.normal_,
    "normal_": torch.Tensor.normal_,
    "uniform": torch.Tensor.uniform_,
    "exponential": torch.Tensor.exponential_,
    "log_normal": torch.Tensor.log_normal_,
    "cauchy": torch.Tensor.cauchy_,
    "geometric": torch.Tensor.geometric_,
    "random": torch.Tensor.random_,
}
"""Operations that overwrite a tensor; their forms in place have an underscore more."""

_READERS: tuple[Any, ...] = (
    _aten.bernoulli.default,
    _aten.bernoulli.Tensor,
    _aten.bernoulli_.Tensor,
    _aten.normal.Tensor_float,
    _aten.normal.float_Tensor,
    _aten.normal.Tensor_Tensor,
    _aten.poisson.default,
)
"""Operations whose distribution is in tensors, element by element."""


def _fills() -> Mapping[Any, _Fill]:
    found: dict[Any, _Fill] = {}
    for name, fill in _FILLS.items():
        for spelling in dict.fromkeys((name, name.rstrip("_") + "_")):
            packet = getattr(_aten, spelling, None)
            for overload in packet.overloads() if packet is not None else ():
                if not overload.endswith("out"):
                    found[getattr(packet, overload)] = fill
    return found


_OVERWRITING = _fills()
_BERNOULLI = (_aten.bernoulli.p, _aten.bernoulli_.float)


def has_keyed_draw(target: Any) -> bool:
    """Whether `keyed_draw` knows a random operation. Dropout has a draw of its own."""
    return (
        target in _BERNOULLI
        or target in _FACTORIES
        or target in _LIKE
        or target in _OVERWRITING
        or target in _READERS
    )


def keyed_draw(key: DrawKey, offset: int, target: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What the random operation `target` gives for these arguments; never changes them."""
    key = key.at(key.ordinal + offset)
    if target in _BERNOULLI:
        value, *rest = args
        return draw_bernoulli(key, 0, value, rest[0] if rest else kwargs.get("p", 0.5))
    if target in _FACTORIES:
        device = torch.device(kwargs.get("device") or "cpu")
        return _FACTORIES[target](*args, **{**kwargs, "generator": _generator(key, device)})
    if target in _READERS:
        return _draw_elements(key, target, *args)
    like: Any = args[0]
    if target in _LIKE:
        like = torch.empty_like(like, **kwargs)
        fill, kwargs = _LIKE[target], {}
    else:
        fill = _OVERWRITING[target]
    drawn = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    fill(drawn, *args[1:], **{**kwargs, "generator": _generator(key, like.device)})
    return _laid_out(drawn, like)


def _draw_elements(key: DrawKey, target: Any, *args: Any) -> torch.Tensor:
    """A draw whose parameters are tensors; they are read row by row."""
    like = next(argument for argument in args if isinstance(argument, torch.Tensor))
    if target is _aten.bernoulli_.Tensor:
        # In place: the tensor's own values do not count, its probabilities' do.
        target = _aten.bernoulli.Tensor
    rows = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    drawn = target(*rows, generator=_generator(key, like.device))
    return _laid_out(drawn, like) if drawn.shape == like.shape else drawn


class KeyedDraws(TorchDispatchMode):
    """While active, ordinary PyTorch code draws by `key`, counting up from its ordinal.

    Activation checkpointing runs parts of a forward pass again within the backward pass;
    `recomputes` says that such a part drew, so that the backward pass needs this to be active too.
    Which draw comes next is kept in the seed of torch's default generator, because that is what
    checkpointing restores before it runs a part again; the generator is put back in the end. Random
    operations without a keyed draw (torch.multinomial, say) use that generator; no kernel takes
    them, so they run in the plain loop alone.
    """

    def __init__(self, key: DrawKey) -> None:
        super().__init__()
        self._key = key
        self._base = _seed_of(key) >> 16
        self._outer: list[torch.Tensor] = []
        self.num_draws = 0
        self.recomputes = False

    def __enter__(self) -> KeyedDraws:
        self._outer.append(torch.default_generator.get_state())
        torch.default_generator.manual_seed(self._base + self.num_draws)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.default_generator.set_state(self._outer.pop())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is _aten.native_dropout.default and args[2] is not False:
            return keyed_dropout(self._key, self._count(), args[0], args[1])
        # A generator of the user's own is the user's to seed.
        if has_keyed_draw(func) and given.get("generator") is None:
            drawn = keyed_draw(self._key, self._count(), func, *args, **given)
            in_place = func._schema.is_mutable
            return args[0].copy_(drawn) if in_place else drawn
        return func(*args, **given)

    def _count(self) -> int:
        """The number of the draw that is due."""
        number = torch.default_generator.initial_seed() - self._base
        if not 0 <= number <= self.num_draws:  # the user's code has seeded the generator
            number = self.num_draws
        self.num_draws = max(self.num_draws, number + 1)
        torch.default_generator.manual_seed(self._base + number + 1)
        self.recomputes |= _inside_checkpoint()
        return number


def _inside_checkpoint() -> bool:
    """Whether what runs may run again: checkpointing either hooks what autograd saves or runs
    without autograd."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore
    return not torch.is_grad_enabled() or hooks(False) is not None
