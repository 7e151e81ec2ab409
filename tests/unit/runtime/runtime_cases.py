"""Small models for the tests of the runtime, each with what can go wrong in a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor
Linear, ModuleList, Sequential = nn.Linear, nn.ModuleList, nn.Sequential

__all__ = ["CASES", "SLOW", "Gpt", "Net", "model_of"]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {}
"""Name → (make the model, make a batch)."""


class Net(nn.Module):
    """A forward function with the modules, weights and buffers it uses, by keyword."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
            elif isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            else:
                self.register_buffer(name, member)
        self._forward = (forward,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward[0](self, *args, **kwargs)


def model_of(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model and a batch of a case, the same ones every time."""
    torch.manual_seed(1)
    make, batch = CASES[name]
    return make(), batch()


def _case(
    name: str,
    forward: Callable[..., Any],
    make: Callable[[], dict[str, Any]],
    batch: Callable[[], tuple[Any, ...]] = lambda: (torch.randn(3, 6),),
) -> None:
    CASES[name] = (lambda: Net(forward, **make()), batch)


def _classes(count: int, size: int) -> Tensor:
    return torch.arange(size) % count


def _lin(size_in: int = 6, size_out: int = 6, **options: Any) -> nn.Linear:
    return nn.Linear(size_in, size_out, **options)


def _param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def _two() -> dict[str, Any]:
    return {"a": _lin(), "b": _lin(6, 2)}


def _listed(*sizes: tuple[int, int]) -> Callable[[], dict[str, Any]]:
    return lambda: {"h": ModuleList(_lin(*size) for size in sizes)}


# ---------------------------------------------------------------- ordinary networks

_case(
    "mlp",
    lambda m, x, y: F.cross_entropy(m.net(x), y),
    lambda: {
        "net": Sequential(_lin(8, 16), nn.ReLU(), _lin(16, 16), nn.GELU(), _lin(16, 4)),
    },
    lambda: (torch.randn(5, 8), _classes(4, 5)),
)
_case(
    "conv with batch norm",
    lambda m, x, y: F.cross_entropy(m.net(x).mean((2, 3)), y),
    lambda: {
        "net": Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2),
            nn.BatchNorm2d(6, affine=False), nn.ReLU(),
        )
    },
    lambda: (torch.randn(4, 3, 10, 10), _classes(4, 4)),
)  # fmt: skip
_case(
    "channels last",
    lambda m, x: m.n(x.contiguous(memory_format=torch.channels_last)).flatten(1).square().mean(),
    lambda: {
        "n": Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(
            memory_format=torch.channels_last
        )
    },
    lambda: (torch.randn(2, 3, 8, 8),),
)
_case("lstm", lambda m, x: m.r(x)[0].square().mean(), lambda: {"r": nn.LSTM(4, 5, 2)},
      lambda: (torch.randn(2, 3, 4),))  # fmt: skip
_case("gru with dropout", lambda m, x: m.r(x)[0].square().mean(),
      lambda: {"r": nn.GRU(4, 5, 2, dropout=0.5)}, lambda: (torch.randn(2, 3, 4),))  # fmt: skip


class UNet(nn.Module):
    """Skips: layers with several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down = ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.up = ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)])
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = F.relu(self.down[0](x))
        b = F.relu(self.down[1](F.max_pool2d(a, 2)))
        u = F.relu(self.up[0](torch.cat([F.relu(self.mid(b)), b], 1)))
        u = F.relu(self.up[1](torch.cat([F.interpolate(u, scale_factor=2), a], 1)))
        return F.binary_cross_entropy_with_logits(self.head(u), y)


CASES["unet"] = (UNet, lambda: (torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8).round()))


class Block(nn.Module):
    def __init__(self, dropout: float, fused: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = _lin(8, 24), _lin(8, 8)
        self.ffn1, self.ffn2 = _lin(8, 16), _lin(16, 8)
        self.dropout, self.fused = nn.Dropout(dropout), fused

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.ln1(x)).split(8, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        if self.fused:
            p = self.dropout.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) * 0.5
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            attended = self.dropout(weights) @ v
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ffn2(F.gelu(self.ffn1(self.ln2(x)))))


class Gpt(nn.Module):
    """A decoder with its loss. ids, labels [batch, 6] int64."""

    def __init__(
        self, *, tied: bool = True, dropout: float = 0.0, fused: bool = True, num_blocks: int = 2
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.h = ModuleList(Block(dropout, fused) for _ in range(num_blocks))
        self.ln, self.head = nn.LayerNorm(8), _lin(8, 11, bias=False)
        self.drop = nn.Dropout(dropout)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), labels.flatten())


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (3, 6)), torch.randint(0, 11, (3, 6))


CASES["gpt, tied head"] = (Gpt, _tokens)
CASES["gpt, four blocks"] = (lambda: Gpt(num_blocks=4), _tokens)
CASES["gpt, fused attention dropout"] = (lambda: Gpt(tied=False, dropout=0.3), _tokens)
CASES["gpt, softmax dropout"] = (lambda: Gpt(dropout=0.2, fused=False), _tokens)
_case(
    "multihead attention",
    lambda m, x: m.h[1](m.h[0](x, x, x)[0], x, x, need_weights=False)[0].square().mean(),
    lambda: {
        "h": ModuleList(nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True) for _ in "ab")
    },
    lambda: (torch.randn(2, 3, 8),),
)

# ---------------------------------------------------------------- sharing and freezing

_case("a module used twice", lambda m, x: m.b(m.a(m.a(x).relu())).square().mean(), _two)
_case(
    "listed modules used twice",
    lambda m, x: m.h[1](m.h[0](m.h[1](m.h[0](x)))).square().mean(),
    _listed((6, 6), (6, 6)),
)
_case(
    "a weight in two layers",
    lambda m, x: F.linear(m.h[0](F.linear(x, m.w)), m.w).square().mean(),
    lambda: {"w": _param(6, 6), "h": ModuleList([_lin()])},
)


def _frozen() -> dict[str, Any]:
    members = _two()
    members["a"].weight.requires_grad_(False)
    members["b"].bias.requires_grad_(False)
    return members


_case("frozen weights", lambda m, x: m.b(m.a(x).relu()).square().mean(), _frozen)
_case("unused weights", lambda m, x: m.b(m.a(x).relu()).square().mean(),
      lambda: {**_two(), "c": _lin()})  # fmt: skip
_case(
    "batch norm used twice",
    lambda m, x: m.h[1](m.bn(m.h[0](m.bn(x)))).square().mean(),
    lambda: {"bn": nn.BatchNorm1d(6), "h": ModuleList([_lin(), _lin()])},
    lambda: (torch.randn(4, 6),),
)

# ---------------------------------------------------------------- where gradients stop

_case("further outputs", lambda m, x: (m.b(m.a(x).relu()).square().mean(), m.c(m.a(x))),
      lambda: {**_two(), "c": _lin()})  # fmt: skip
_case("a later layer compares", lambda m, x: m.b((m.a(x) > 0).float()).square().mean(), _two)
_case("a later layer takes zeros_like",
      lambda m, x: m.b(torch.zeros_like(m.a(x)) + x).square().mean(), _two)  # fmt: skip


def _detached(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    return (m.b(hidden.detach()) + m.c(x)).square().mean()


_case("a later layer detaches", _detached, lambda: {"a": _lin(), "b": _lin(), "c": _lin()})


def _no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.a(x)
        with torch.enable_grad():
            inner = m.b(x * target)
        after = m.a(inner)
    return (m.c(x) + inner + after).square().mean()


_case("no_grad with enable_grad inside", _no_grad,
      lambda: {"a": _lin(), "b": _lin(), "c": _lin()})  # fmt: skip


def _straight_through(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    return m.b(hidden + (hidden.round() - hidden).detach()).square().mean()


_case("straight through rounding", _straight_through, _two)
_case("a weight with and without its gradient",
      lambda m, x: (F.linear(x, m.w.detach()) + F.linear(x.tanh(), m.w)).square().mean(),
      lambda: {"w": _param(6, 6)})  # fmt: skip


def _moving_average(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    with torch.no_grad():
        m.average.mul_(0.9).add_(0.1 * hidden.mean(0))
    return m.b(hidden - m.average).square().mean()


_case("a buffer updated under no_grad", _moving_average,
      lambda: {**_two(), "average": torch.zeros(6)})  # fmt: skip


def _copied_average(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    m.average.copy_(0.9 * m.average + 0.1 * hidden.mean(0))
    return m.b(hidden - m.average).square().mean()


_case("a buffer that carries a gradient", _copied_average,
      lambda: {**_two(), "average": torch.zeros(6)})  # fmt: skip

# ---------------------------------------------------------------- memory and layout


def _in_place(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x) * 1.0
    hidden.relu_()
    hidden = hidden * 2
    hidden[:, 0] = 0
    hidden[:, 1:3].add_(2)
    return m.b(hidden.add_(1)).square().mean()


_case("operations in place", _in_place, _two)
_case("views of the input returned", lambda m, x: (m.a(x).square().mean(), x.t(), x[0]),
      lambda: {"a": _lin()})  # fmt: skip
_case("bias gradients that are one tensor", lambda m, x: (x + m.b + m.c).square().mean(),
      lambda: {"b": _param(3, 6), "c": _param(3, 6)})  # fmt: skip
_case("a bias gradient that is the incoming one",
      lambda m, x: m.h[0](x + m.b).square().mean(),
      lambda: {"b": _param(3, 6), "h": ModuleList([_lin()])})  # fmt: skip
_case("stacked weights", lambda m, x: m.h[0](torch.stack([m.p, m.q, m.p]) + x).square().mean(),
      lambda: {"p": _param(6), "q": _param(6), "h": ModuleList([_lin()])})  # fmt: skip
_case(
    "views of weights",
    lambda m, x: (
        x @ m.w.unbind(0)[1] @ m.w.chunk(2)[0][0] @ m.w.diagonal(dim1=1, dim2=2)[0].diag()
    ).square().mean(),
    lambda: {"w": _param(2, 6, 6)},
)  # fmt: skip
_case("a transposed weight",
      lambda m, x: m.h[0](x @ m.w.t().reshape(6, 6)).square().mean(),
      lambda: {"w": nn.Parameter(torch.randn(6, 6).t()), "h": ModuleList([_lin()])})  # fmt: skip
_case("mean over tokens, then the head", lambda m, x: m.h[1](m.h[0](x).mean(1)).square().mean(),
      _listed((6, 6), (6, 3)), lambda: (torch.randn(2, 5, 6),))  # fmt: skip
_case("transposed between layers",
      lambda m, x: m.h[1](m.h[0](x).transpose(1, 2)).square().mean(),
      _listed((6, 6), (5, 3)), lambda: (torch.randn(2, 5, 6),))  # fmt: skip


class Mixer(nn.Module):
    """Gives its result transposed, so that copies get inputs in other memory layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = _lin()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).transpose(1, 2)


class Reshaper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = _lin()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(-1, 6)).reshape(6, 2, 6).transpose(0, 1)


class Halves(nn.Module):
    """Takes and gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = _lin()

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return self.linear(torch.cat(pair, -1)).chunk(2, -1)


for _name, _kind in (("mixer", Mixer), ("reshaper", Reshaper)):
    _case(f"copies in other layouts: {_name}", lambda m, x: m.h(x).square().mean(),
          lambda kind=_kind: {"h": Sequential(*(kind() for _ in range(3)))},
          lambda: (torch.randn(2, 6, 6),))  # fmt: skip
_case("pairs between layers",
      lambda m, x: sum(t.square().mean() for t in m.h(x.chunk(2, -1))),
      lambda: {"h": Sequential(Halves(), Halves())})  # fmt: skip


def _split_later(m: Any, x: Tensor) -> Tensor:
    left, right = m.h[0](x).split([2, 4], -1)
    return m.h[1](left).square().mean() + m.h[2](right).mean()


_case("parts used by different layers", _split_later, _listed((6, 6), (2, 3), (4, 3)))


def _top_k(m: Any, x: Tensor) -> Tensor:
    values, indices = m.h[0](x).topk(2)
    return m.h[1](values).square().mean() + 0 * indices.sum()


_case("top k and its indices", _top_k, _listed((6, 6), (2, 3)))

# ---------------------------------------------------------------- inputs, constants, sizes

_case("integers in", lambda m, i: m.a(i.float()).square().mean(), lambda: {"a": _lin()},
      lambda: (torch.arange(12).view(2, 6),))  # fmt: skip
_case("a mask in", lambda m, x, mask: m.a(x).masked_fill(mask, 0).square().mean(),
      lambda: {"a": _lin()},
      lambda: (torch.randn(2, 6), torch.rand(2, 6) > 0.5))  # fmt: skip
_case("a strided batch", lambda m, x: m.h[0](x.reshape(4, 9)).square().mean(), _listed((9, 6)),
      lambda: (torch.randn(6, 6).t(),))  # fmt: skip
_case("embedding with padding", lambda m, i: m.b(m.e(i)).square().mean(),
      lambda: {"e": nn.Embedding(7, 5, padding_idx=0), "b": _lin(5, 2)},
      lambda: (torch.tensor([[0, 1, 2], [3, 0, 6]]),))  # fmt: skip
_case("constants made in forward",
      lambda m, x: (m.a(x) * torch.tensor([1.0, 2, 3]) + torch.arange(3)).square().mean()
      + torch.tensor(2.0) * m.a(x).mean(),
      lambda: {"a": _lin(6, 3)})  # fmt: skip
_case("einsum", lambda m, x: torch.einsum("bij,jk->bik", x, m.w).square().mean(),
      lambda: {"w": _param(4, 3)}, lambda: (torch.randn(2, 5, 4),))  # fmt: skip
_case("two losses",
      lambda m, x, y: F.cross_entropy(m.b(m.a(x)), y) + 0.5 * m.c(m.a(x)).square().mean(),
      lambda: {"a": _lin(), "b": _lin(6, 4), "c": _lin(6, 3)},
      lambda: (torch.randn(3, 6), _classes(4, 3)))  # fmt: skip
_case("a 0-d weight", lambda m, x: (m.a(x) * m.g).square().mean(),
      lambda: {"a": _lin(), "g": nn.Parameter(torch.tensor(2.0))})  # fmt: skip
_case("an empty weight",
      lambda m, x: torch.cat([m.a(x), m.g.expand(3, 0)], 1).square().mean(),
      lambda: {"a": _lin(), "g": nn.Parameter(torch.zeros(0))})  # fmt: skip
_case("a double buffer", lambda m, x: (m.a(x) * m.n).square().mean(),
      lambda: {"a": _lin(), "n": torch.tensor(1.5, dtype=torch.float64)})  # fmt: skip
_case("one operation", lambda m, x: (m.w * x).sum(), lambda: {"w": _param(3, 6)})
_case("a loss of shape [1]", lambda m, x: m.a(x).square().mean().reshape(1), lambda: {"a": _lin()})
_case("gather and scatter",
      lambda m, x, i: m.b(torch.zeros(3, 6).scatter(1, i, m.a(x).gather(1, i))).square().mean(),
      _two, lambda: (torch.randn(3, 6), torch.tensor([[0, 1], [2, 3], [4, 5]])))  # fmt: skip
_case("dropout of whole channels",
      lambda m, x: F.alpha_dropout(F.dropout2d(m.a(x), 0.5, m.training), 0.3, m.training)
      .square().mean(),
      lambda: {"a": nn.Conv2d(3, 4, 1)}, lambda: (torch.randn(2, 3, 4, 4),))  # fmt: skip
_case("dropout of everything and of nothing",
      lambda m, x: (F.dropout(m.a(x), 1.0, m.training) + F.dropout(m.b(x), 0.0, m.training))
      .square().mean(),
      lambda: {"a": _lin(), "b": _lin()})  # fmt: skip
_case("weight norm", lambda m, x: m.a(x).square().mean(),
      lambda: {"a": nn.utils.parametrizations.weight_norm(_lin())})  # fmt: skip
_case("spectral norm", lambda m, x: m.a(x).square().mean(),
      lambda: {"a": nn.utils.parametrizations.spectral_norm(_lin())})  # fmt: skip
_case("activation checkpointing",
      lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)).square().mean(), _two)  # fmt: skip

SLOW = frozenset(
    {
        "gpt, tied head",
        "gru with dropout",
        "channels last",
        "listed modules used twice",
        "straight through rounding",
        "copies in other layouts: reshaper",
        "embedding with padding",
        "einsum",
        "two losses",
        "gather and scatter",
        "dropout of whole channels",
        "weight norm",
        "spectral norm",
        "activation checkpointing",
        "views of the input returned",
        "integers in",
        "a mask in",
    }
)
"""Cases whose dangers another case or test has too; `make test-all` runs them."""
