"""Architectures written with torch.nn alone, as people write them, and an example batch for each.

Decides their code and sizes. Does not decide what is measured (architectures.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PLAIN_NETWORKS"]

BATCH, SEQ, VOCAB, HIDDEN, HEADS = 2, 16, 96, 32, 4


class _WithLoss(nn.Module):
    """A network and its loss, as one model that takes inputs and targets."""

    def __init__(self, network: nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        *inputs, target = batch
        return self.loss(self.network(*inputs), target)


def _images(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.zeros(BATCH, channels, size, size)


def _classes() -> torch.Tensor:
    return torch.ones(BATCH, dtype=torch.long)


def _tokens() -> torch.Tensor:
    return torch.ones(BATCH, SEQ, dtype=torch.long)


def _classifier(network: nn.Module, images: torch.Tensor) -> tuple[nn.Module, Any]:
    return _WithLoss(network, F.cross_entropy), (images, _classes())


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _head(width: int, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride), nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


class _UNet(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _conv(3, 8), _conv(8, 16), _conv(16, 32)
        self.up2 = (
            nn.ConvTranspose2d(32, 16, 2, 2)
            if transposed
            else nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(32, 16, 1))
        )
        self.up1 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1, self.out = _conv(32, 16), _conv(16, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        deep = self.middle(F.max_pool2d(two, 2))
        two = self.join2(torch.cat([self.up2(deep), two], 1))
        return self.out(self.join1(torch.cat([self.up1(two), one], 1)))


class _ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.scale * self.narrow(F.gelu(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.wide(F.relu(self.narrow(x.mean((2, 3), keepdim=True)))))


class _DenseBlock(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(width + i * growth, growth) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cut(x).flatten(2).transpose(1, 2)


class _MeanTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


class _HandGpt(nn.Module):
    """A decoder with hand-written attention; `positions` is learned, rotary, alibi or relative."""

    def __init__(self, positions: str) -> None:
        super().__init__()
        self.positions = positions
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.learned = nn.Embedding(SEQ, HIDDEN)
        self.relative = nn.Embedding(8, HEADS)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.project = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)
        self.register_buffer("mask", torch.tril(torch.ones(SEQ, SEQ)).view(1, 1, SEQ, SEQ))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.positions == "learned":
            x = x + self.learned(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.attend(self.norm1(x))
        h = self.up(self.norm2(x))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))))
        return F.linear(x + self.down(h), self.embedding.weight)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, width = x.shape
        q, k, v = (
            t.view(batch, seq, HEADS, width // HEADS).transpose(1, 2)
            for t in self.qkv(x).split(width, dim=2)
        )
        if self.positions == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        if self.positions == "alibi":
            slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=x.dtype)
            place = torch.arange(seq)
            scores = scores + slopes[:, None, None] * (place[None, :] - place[:, None])
        if self.positions == "relative":
            place = torch.arange(seq)
            bucket = (place[None, :] - place[:, None]).abs().clamp(max=7)
            scores = scores + self.relative(bucket).permute(2, 0, 1).unsqueeze(0)
        scores = scores.masked_fill(self.mask[:, :, :seq, :seq] == 0, float("-inf"))
        weights = F.dropout(F.softmax(scores, dim=-1), 0.1, self.training)
        return self.project((weights @ v).transpose(1, 2).contiguous().view(batch, seq, width))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        frequency = 1.0 / 10000 ** (torch.arange(half, dtype=x.dtype) / half)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), frequency)
        one, two = x[..., :half], x[..., half:]
        return torch.cat(
            [one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1
        )


class _EinsumAttention(nn.Module):
    """Attention as einsums, with an RMS norm and a gated linear unit by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(HIDDEN, HEADS, 8)) for _ in range(3))
        self.o = nn.Parameter(torch.zeros(HEADS, 8, HIDDEN))
        self.gate, self.up = nn.Linear(HIDDEN, 64, bias=False), nn.Linear(HIDDEN, 64, bias=False)
        self.down, self.head = nn.Linear(64, HIDDEN, bias=False), nn.Linear(HIDDEN, VOCAB)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        h = self.norm(x)
        q, k, v = (torch.einsum("bsd,dhk->bhsk", h, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhqk,bhsk->bhqs", q, k) / math.sqrt(8)
        mask = torch.triu(torch.full((SEQ, SEQ), float("-inf")), diagonal=1)
        weights = torch.softmax(scores + mask, -1)
        x = x + torch.einsum("bhqs,bhsk,hkd->bqd", weights, v, self.o)
        h = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


class _TorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.body = nn.Transformer(HIDDEN, HEADS, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        body = self.body(
            self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True
        )
        return self.head(body)


class _TorchEncoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN, padding_idx=0)
        layer = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, 64, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens), src_key_padding_mask=tokens == 0))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.body = kind(HIDDEN, HIDDEN, 2, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens))[0])


class _CellLoop(nn.Module):
    """A recurrent cell in a Python loop, unrolled by the capture."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCAB, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        h = c = x.new_zeros(x.shape[0], HIDDEN)
        states = []
        for step in range(x.shape[1]):
            h, c = self.cell(x[:, step], (h, c))
            states.append(h)
        return self.head(torch.stack(states, 1))


class _Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU())
        self.mean, self.log_var = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        divergence = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
        target = x.flatten(1)
        return F.binary_cross_entropy_with_logits(self.decoder(z), target) + divergence


class _TextCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.convs = nn.ModuleList(nn.Conv1d(HIDDEN, 16, k) for k in (2, 3, 4))
        self.head = nn.Linear(48, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        pooled = [F.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return self.head(F.dropout(torch.cat(pooled, 1), training=self.training))


class _Dlrm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(t(sparse[:, i]) for i, t in enumerate(self.tables))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, offset=-1)
        return self.top(torch.cat([x, products[:, i, j]], 1)).squeeze(1)


class _GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        degree = edges.sum(-1).clamp(min=1).rsqrt()
        edges = edges * degree.unsqueeze(-1) * degree.unsqueeze(-2)
        return (edges @ self.two(F.relu(edges @ self.one(nodes)))).mean(1)


def _tokens_out(network: nn.Module) -> tuple[nn.Module, Any]:
    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.view(-1, VOCAB), target.view(-1))

    return _WithLoss(network, loss), (_tokens(), _tokens())


def _vgg() -> nn.Module:
    pool = nn.MaxPool2d(2, 2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        pool, nn.Flatten(), nn.Linear(16 * 64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10),
    )  # fmt: skip


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 10),
    )  # fmt: skip


def _mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish(), _conv(16, 16, 3, 1, 16),
        _SqueezeExcite(16), nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(), _head(24),
    )  # fmt: skip


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 16, 3, 2, 1),
        nn.InstanceNorm2d(16, affine=True), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1), nn.ELU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def _super_resolution() -> nn.Module:
    return nn.Sequential(
        nn.ReflectionPad2d(2), nn.Conv2d(1, 16, 5), nn.PReLU(), nn.Conv2d(16, 4, 3, padding=1),
        nn.PixelShuffle(2),
    )  # fmt: skip


def _temporal() -> nn.Module:
    return nn.Sequential(
        nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(4, 8, 3, dilation=2), nn.ReLU(),
        nn.ConstantPad1d((8, 0), 0.0), nn.Conv1d(8, 4, 3, dilation=4), nn.GELU(),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(64, 10),
    )  # fmt: skip


def _resnet() -> nn.Module:
    return nn.Sequential(
        _conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), _ResidualBlock(8, 8, 1), _ResidualBlock(8, 16, 2),
        _head(16),
    )  # fmt: skip


def _convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), _ConvNextBlock(16), _ConvNextBlock(16), _head(16))


def _densenet() -> nn.Module:
    return nn.Sequential(
        _conv(3, 8), _DenseBlock(8, 4), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2), _head(10)
    )


def _mixer() -> nn.Module:
    blocks = [_MixerBlock(16, HIDDEN) for _ in range(2)]
    return nn.Sequential(_Patches(HIDDEN), *blocks, _MeanTokens(), nn.Linear(HIDDEN, 10))


def _image_pair(channels: int, size: int, scale: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return _images(channels, size), _images(1, size * scale)


PLAIN_NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "MLP with batch norm": lambda: _classifier(_mlp(), _images()),
    "LeNet": lambda: _classifier(_lenet(), _images(1)),
    "VGG": lambda: _classifier(_vgg(), _images()),
    "ResNet": lambda: _classifier(_resnet(), _images(size=64)),
    "DenseNet": lambda: _classifier(_densenet(), _images()),
    "MobileNetV3": lambda: _classifier(_mobile(), _images()),
    "ConvNeXt": lambda: _classifier(_convnext(), _images()),
    "MLP-Mixer": lambda: _classifier(_mixer(), _images()),
    "U-Net (transposed convolution)": lambda: (
        _WithLoss(_UNet(True), F.binary_cross_entropy_with_logits), _image_pair(3, 32)),
    "U-Net (bilinear)": lambda: (
        _WithLoss(_UNet(False), F.binary_cross_entropy_with_logits), _image_pair(3, 32)),
    "convolutional autoencoder": lambda: (
        _WithLoss(_autoencoder(), F.mse_loss), _image_pair(1, 32)),
    "super resolution (pixel shuffle)": lambda: (
        _WithLoss(_super_resolution(), F.smooth_l1_loss), _image_pair(1, 16, 2)),
    "temporal convolutions": lambda: (
        _WithLoss(_temporal(), F.l1_loss), (torch.zeros(BATCH, 4, 32), torch.zeros(BATCH, 4, 32))),
    "TextCNN": lambda: (_WithLoss(_TextCnn(), F.cross_entropy), (_tokens(), _classes())),
    "variational autoencoder": lambda: (_Vae(), (torch.zeros(BATCH, 1, 16, 16),)),
    "hand-written GPT, learned positions": lambda: _tokens_out(_HandGpt("learned")),
    "hand-written GPT, rotary": lambda: _tokens_out(_HandGpt("rotary")),
    "hand-written GPT, ALiBi": lambda: _tokens_out(_HandGpt("alibi")),
    "hand-written GPT, relative positions": lambda: _tokens_out(_HandGpt("relative")),
    "einsum attention, RMS norm, gated unit": lambda: _tokens_out(_EinsumAttention()),
    "nn.TransformerEncoder": lambda: _tokens_out(_TorchEncoder(False)),
    "nn.TransformerEncoder, norm first": lambda: _tokens_out(_TorchEncoder(True)),
    "nn.Transformer": lambda: (
        _WithLoss(
            _TorchTransformer(), lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten())),
        (_tokens(), _tokens(), _tokens())),
    "nn.LSTM": lambda: _tokens_out(_Recurrent(nn.LSTM)),
    "nn.GRU": lambda: _tokens_out(_Recurrent(nn.GRU)),
    "nn.RNN": lambda: _tokens_out(_Recurrent(nn.RNN)),
    "LSTM cell in a loop": lambda: _tokens_out(_CellLoop()),
    "recommendation (DLRM)": lambda: (
        _WithLoss(_Dlrm(), F.binary_cross_entropy_with_logits),
        (torch.zeros(BATCH, 4), torch.ones(BATCH, 3, 1, dtype=torch.long), torch.ones(BATCH))),
    "graph convolution (dense)": lambda: (
        _WithLoss(_GraphConvolution(), F.cross_entropy),
        (torch.zeros(BATCH, 6, 8), torch.ones(BATCH, 6, 6), _classes())),
}  # fmt: skip
