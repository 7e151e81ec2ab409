"""The networks of the published plans and training runs, as small torch modules.

Decides their architecture alone, from the sizes that the sources state. They are built on the meta
device: only shapes count. Does not decide which published number belongs to which network
(machine_model_rows.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "Classifier",
    "DecoderLm",
    "EncoderDecoder",
    "Mlp",
    "Network",
    "Unet",
    "decoder_batch",
    "encoder_batch",
    "image_batch",
    "mlp_batch",
    "translation_batch",
]

Network = tuple[nn.Module, Any]
"""A module and an example batch, both without data."""


class Attention(nn.Module):
    """Multi-head attention with projections; `memory` makes it a cross attention."""

    def __init__(self, width: int, heads: int, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        memory = x if memory is None else memory
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(x)),
            self._split(self.key(memory)),
            self._split(self.value(memory)),
            dropout_p=0.1 if self.training else 0.0,
            is_causal=causal,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, heads * size]` to `[batch, heads, seq, size]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, activation: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.relu = activation == "relu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(F.relu(hidden) if self.relu else F.gelu(hidden))


class Block(nn.Module):
    """A transformer layer: attention, cross attention if asked for, feed-forward."""

    def __init__(
        self,
        width: int,
        heads: int,
        ff: int,
        *,
        inner: int | None = None,
        cross: bool = False,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, inner)
        self.cross = Attention(width, heads, inner) if cross else None
        self.feed_forward = FeedForward(width, ff, activation)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width) if cross else None

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        x = x + self._drop(self.attention(self.norm1(x), causal=causal))
        if self.cross is not None and self.norm3 is not None:
            x = x + self._drop(self.cross(self.norm3(x), memory))
        return x + self._drop(self.feed_forward(self.norm2(x)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.1, self.training)


class DecoderLm(nn.Module):
    """GPT: learned positions; the output weight is the embedding's unless `tied` is False."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        *,
        ff: int | None = None,
        vocab: int = 50257,
        positions: int = 2048,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads, ff or 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x, causal=True)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Classifier(nn.Module):
    """BERT fine-tuned to classify: the head is on the first place."""

    def __init__(self, layers: int, width: int, heads: int, *, vocab: int = 30522) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(512, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.h = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 2)

    def forward(
        self, ids: torch.Tensor, segments: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]] + self.segments(segments)
        x = self.norm(x)
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.classifier(torch.tanh(self.pooler(x[:, 0]))), labels)


class EncoderDecoder(nn.Module):
    """The Transformer of translation: ReLU, shared source and target embedding width."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        key_size: int,
        ff: int,
        *,
        vocab: int = 36550,
        length: int = 256,
    ) -> None:
        super().__init__()
        inner = heads * key_size
        self.source = nn.Embedding(vocab, width)
        self.target = nn.Embedding(vocab, width)
        self.register_buffer("positions", torch.empty(length, width), persistent=False)
        self.encoder = nn.ModuleList(
            Block(width, heads, ff, inner=inner, activation="relu") for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            Block(width, heads, ff, inner=inner, cross=True, activation="relu")
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.target.weight

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        memory = F.dropout(self.source(source) + self.positions, 0.1, self.training)
        for block in self.encoder:
            memory = block(memory)
        x = F.dropout(self.target(target) + self.positions, 0.1, self.training)
        for block in self.decoder:
            x = block(x, memory, causal=True)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Mlp(nn.Module):
    """fc_mnist."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.fc_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.fc_layers[:-1]:
            x = F.relu(layer(x))
        return F.cross_entropy(self.fc_layers[-1](x), y)


class Unet(nn.Module):
    """Two convolutions a stage, max pooling down, transposed convolutions up, skips joined."""

    def __init__(self, encoder: tuple[int, ...], decoder: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        for filters in encoder:
            self.down.append(_two_convolutions(channels, filters))
            channels = filters
        self.up, self.join = nn.ModuleList(), nn.ModuleList()
        for filters in decoder:
            self.up.append(nn.ConvTranspose2d(channels, filters, 2, 2))
            self.join.append(_two_convolutions(2 * filters, filters))
            channels = filters
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for index, stage in enumerate(self.down):
            image = stage(image if index == 0 else F.max_pool2d(image, 2))
            skips.append(image)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            image = join(torch.cat([up(image), skips.pop()], 1))
        return F.binary_cross_entropy_with_logits(self.last(image), mask)


def _two_convolutions(channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, filters, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(filters, filters, 3, padding=1),
        nn.ReLU(),
    )


def _integers(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long, device="meta")


def decoder_batch(samples: int, length: int) -> Any:
    return {"ids": _integers(samples, length), "labels": _integers(samples, length)}


def encoder_batch(samples: int, length: int) -> Any:
    """Of `Classifier`."""
    return {
        "ids": _integers(samples, length),
        "segments": _integers(samples, length),
        "labels": _integers(samples),
    }


def translation_batch(samples: int, length: int) -> Any:
    names = ("source", "target", "labels")
    return {name: _integers(samples, length) for name in names}


def mlp_batch(samples: int, width: int = 784) -> Any:
    """Pixels in 16 bits, as the input function of release 1.6 gives them."""
    return {
        "x": torch.zeros(samples, width, dtype=torch.float16, device="meta"),
        "y": _integers(samples),
    }


def image_batch(samples: int, side: int = 256) -> Any:
    image = torch.zeros(samples, 1, side, side, dtype=torch.float16, device="meta")
    return {"image": image, "mask": image}
