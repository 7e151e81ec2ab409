"""U-Net (arXiv:1505.04597): a class for every pixel of an image.

The encoder halves the image from block to block and widens it, the decoder doubles it again; each
decoder block also sees the encoder's output of its own size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwafer.config.schema import limits
from openwafer.errors import ConfigError, nearest
from openwafer.layers import create_initializer
from openwafer.layers.activations import ACTIVATIONS
from openwafer.zoo.losses import weighted_loss
from openwafer.zoo.model import SIZE, Batch, Logits, ModelConfig, ZooModel

__all__ = ["UNetConfig", "UNetModel", "check_config", "nonlinearity_name", "pixel_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig(ModelConfig):
    """The `model` section.

    encoder_filters, decoder_filters: channels of each block; the encoder's last one is the bottom,
        which the decoder has no partner for.
    initial_conv_filters: channels of a 3x3 convolution in front; None for none.
    convs_per_block: the convolutions of a block, each with a nonlinearity; they keep the size.
    skip_connect: join the encoder's output to the decoder's of that size.
    enable_bias: biases of all convolutions.
    downscale_method: how the encoder halves; the decoder doubles by transposed 2x2 convolutions.
    nonlinearity: an activation, or the name of its Keras layer (`ReLU`, `LeakyReLU`).
    image_shape: (channels, height, width).
    eval_metrics: of mIOU (mean intersection over union), DSC (Dice), MPCA (mean accuracy per class)
        and Acc (accuracy); eval_ignore_classes: left out of the means over classes.
    log_image_summaries: has no effect here.
    """

    SHORT: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    encoder_filters: tuple[int, ...] = field(default=(32, 64, 128, 256), metadata=SIZE)
    decoder_filters: tuple[int, ...] = field(default=(128, 64, 32), metadata=SIZE)
    initial_conv_filters: int | None = field(default=None, metadata=SIZE)
    convs_per_block: tuple[Literal["3x3_conv", "1x1_conv"], ...] = ("3x3_conv", "3x3_conv")
    skip_connect: bool = True
    enable_bias: bool = True
    downscale_method: Literal["max_pool", "avg_pool"] = "max_pool"
    data_format: Literal["channels_first"] = "channels_first"
    nonlinearity: str = "ReLU"
    initializer: str = "glorot_uniform"
    bias_initializer: str = "zeros"
    image_shape: tuple[int, ...] = field(default=(1, 256, 256), metadata=SIZE)
    num_classes: int = field(default=2, metadata=limits(minimum=2))
    eval_metrics: tuple[Literal["mIOU", "DSC", "MPCA", "Acc"], ...] = ("mIOU", "DSC", "MPCA", "Acc")
    eval_ignore_classes: tuple[int, ...] = field(default=(), metadata=limits(minimum=0))
    log_image_summaries: bool = False


class UNetModel(ZooModel[UNetConfig]):
    """images [batch, channels, height, width] float32; labels [batch, height, width] int64; logits
    [batch, class, height, width]."""

    def __init__(self, config: UNetConfig) -> None:
        check_config(config)
        super().__init__(config)
        channels = config.image_shape[0]
        self.initial_conv = None
        if config.initial_conv_filters is not None:
            self.initial_conv = Convolution(config, channels, config.initial_conv_filters)
            channels = config.initial_conv_filters
        self.encoder = nn.ModuleList()
        for filters in config.encoder_filters:
            self.encoder.append(Block(config, channels, filters))
            channels = filters
        self.downscale = (nn.MaxPool2d if config.downscale_method == "max_pool" else nn.AvgPool2d)(
            2
        )
        self.decoder = nn.ModuleList()
        beside = reversed(config.encoder_filters[:-1])
        for filters, skipped in zip(config.decoder_filters, beside, strict=True):
            joined = skipped if config.skip_connect else 0
            self.decoder.append(UpBlock(config, channels, joined, filters))
            channels = filters
        self.classes = nn.Conv2d(channels, config.num_classes, 1, bias=config.enable_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: `initializer` and `bias_initializer` for every convolution."""
        weight = create_initializer(self.config.initializer)
        bias = create_initializer(self.config.bias_initializer)
        for name, parameter in self.named_parameters():
            (bias if name.endswith("bias") else weight)(parameter.data)

    def logits(self, **batch: Tensor) -> Tensor:
        hidden = batch["images"]
        if self.initial_conv is not None:
            hidden = self.initial_conv(hidden)
        skipped: list[Tensor] = []
        for block in self.encoder:
            hidden = block(self.downscale(hidden) if skipped else hidden)
            skipped.append(hidden)
        skipped.pop()
        for block in self.decoder:
            hidden = block(hidden, skipped.pop())
        return self.classes(hidden)

    def loss(self, logits: Logits, **batch: Tensor) -> Tensor:
        """Cross entropy, the mean over the pixels."""
        assert isinstance(logits, Tensor)
        weights = pixel_weights(batch)
        if weights is None:
            return F.cross_entropy(logits, batch["labels"]).float()
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")
        return weighted_loss(losses, weights, "num_tokens")

    def predictions(self, logits: Logits, **batch: Tensor) -> Batch:
        assert isinstance(logits, Tensor)
        return {"prediction": logits.argmax(1)}

    def example_batch(self, batch_size: int) -> Batch:
        channels, height, width = self.config.image_shape
        labels = (batch_size, height, width)
        return {
            "images": torch.rand(batch_size, channels, height, width, device=self.device),
            "labels": torch.randint(0, self.config.num_classes, labels, device=self.device),
        }


class Convolution(nn.Module):
    """A convolution that keeps the image's size, and the nonlinearity."""

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, kind: str = "3x3_conv"
    ) -> None:
        super().__init__()
        size = int(kind[0])
        self.conv = nn.Conv2d(
            in_channels, out_channels, size, padding=size // 2, bias=config.enable_bias
        )
        self.nonlinearity = ACTIVATIONS[nonlinearity_name(config.nonlinearity)]

    def forward(self, image: Tensor) -> Tensor:
        """[batch, in_channels, height, width] → [batch, out_channels, height, width]."""
        return self.nonlinearity(self.conv(image))


class Block(nn.Sequential):
    """The convolutions of one size."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        inputs = (in_channels, *(out_channels for _ in config.convs_per_block[1:]))
        super().__init__(
            *(
                Convolution(config, channels, out_channels, kind)
                for channels, kind in zip(inputs, config.convs_per_block, strict=True)
            )
        )


class UpBlock(nn.Module):
    """Double the image, join what the encoder had at that size, convolve."""

    def __init__(
        self, config: UNetConfig, in_channels: int, skip_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        self.upscale = nn.ConvTranspose2d(
            in_channels, out_channels, 2, stride=2, bias=config.enable_bias
        )
        self.skip_connect = config.skip_connect
        self.block = Block(config, out_channels + skip_channels, out_channels)

    def forward(self, image: Tensor, skipped: Tensor) -> Tensor:
        """[batch, in_channels, h, w] → [batch, out_channels, 2h, 2w]; `skipped` is
        [batch, skip_channels, 2h, 2w]."""
        image = self.upscale(image)
        return self.block(torch.cat([image, skipped], dim=1) if self.skip_connect else image)


def pixel_weights(batch: Batch) -> Tensor | None:
    """1 for the pixels of samples, 0 for those of rows that only fill the last batch,
    [batch, height, width]; None where no such row can be."""
    if "unique_ids" not in batch:
        return None
    labels = batch["labels"]
    return (batch["unique_ids"] >= 0).float()[:, None, None].expand(labels.shape)


def nonlinearity_name(name: str) -> str:
    """The activation that `nonlinearity` means: `LeakyReLU` is `leaky_relu`.

    Raises:
        ConfigError: there is none.
    """
    plain = {known.replace("_", ""): known for known in ACTIVATIONS}
    wanted = name.lower().replace("_", "")
    if wanted not in plain:
        raise ConfigError(
            f"there is no nonlinearity {name!r}",
            where="model.nonlinearity",
            allowed=", ".join(sorted(ACTIVATIONS)),
            hint=nearest(wanted, ACTIVATIONS),
        )
    return plain[wanted]


def check_config(config: UNetConfig) -> None:
    """Check what no single key shows.

    Raises:
        ConfigError: numbers of blocks or an image that do not fit together.
    """
    num_halvings = len(config.decoder_filters)
    if len(config.encoder_filters) != num_halvings + 1:
        raise ConfigError(
            f"encoder_filters has {len(config.encoder_filters)} entries, decoder_filters "
            f"{num_halvings}",
            where="model.encoder_filters",
            allowed="one more for the encoder than for the decoder",
        )
    if not config.convs_per_block:
        raise ConfigError(
            "convs_per_block is empty",
            where="model.convs_per_block",
            allowed="at least one of 3x3_conv and 1x1_conv",
        )
    shape = config.image_shape
    if len(shape) != 3 or any(size % 2**num_halvings for size in shape[1:]):
        raise ConfigError(
            f"image_shape is {list(shape)}",
            where="model.image_shape",
            allowed="[channels, height, width], the last two divisible by "
            f"{2**num_halvings}, which the {num_halvings} decoder blocks double",
        )
