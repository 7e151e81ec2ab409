"""The U-Net of torch_model.py in TensorFlow, under the same names.

Images come and logits go with the channels first, as in PyTorch; within, the channels are last,
which is what TensorFlow's convolutions take on a CPU.
"""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.zoo.tf.activations import activation
from openwafer.zoo.tf.initializers import initializer
from openwafer.zoo.tf.losses import cross_entropies, weighted_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel, module_scope
from openwafer.zoo.unet.tf_metrics import segmentation_metrics
from openwafer.zoo.unet.torch_model import UNetConfig, check_config, nonlinearity_name

__all__ = ["MODEL", "UNetTFModel"]


class UNetTFModel(TFZooModel[UNetConfig]):
    """images [batch, channels, height, width] float32; labels [batch, height, width] int64; logits
    [batch, class, height, width]."""

    def __init__(self, config: UNetConfig, **options: Any) -> None:
        check_config(config)
        super().__init__(config, **options)
        self._nonlinearity = activation(nonlinearity_name(config.nonlinearity))

    def build_model(self, features: Features, mode: str) -> Outputs:
        config = self.config
        hidden = tf.transpose(features["images"], [0, 2, 3, 1])
        if config.initial_conv_filters is not None:
            with module_scope("initial_conv"):
                hidden = self._convolution(hidden, config.initial_conv_filters, "3x3_conv")
        skipped: list[Any] = []
        for index, filters in enumerate(config.encoder_filters):
            hidden = self._downscale(hidden) if skipped else hidden
            hidden = self._block(hidden, filters, f"encoder.{index}")
            skipped.append(hidden)
        skipped.pop()
        for index, filters in enumerate(config.decoder_filters):
            with module_scope(f"decoder.{index}"):
                hidden = self._doubled(hidden, skipped.pop(), filters)
                hidden = self._block(hidden, filters, "block")
        logits = self._layer(tf.keras.layers.Conv2D, config.num_classes, 1, name="classes")(hidden)
        return {"logits": tf.transpose(logits, [0, 3, 1, 2])}

    def _block(self, image: Any, filters: int, name: str) -> Any:
        """The convolutions of one size."""
        for index, kind in enumerate(self.config.convs_per_block):
            with module_scope(f"{name}.{index}"):
                image = self._convolution(image, filters, kind)
        return image

    def _convolution(self, image: Any, filters: int, kind: str) -> Any:
        convolution = self._layer(
            tf.keras.layers.Conv2D, filters, int(kind[0]), name="conv", padding="same"
        )
        return self._nonlinearity(convolution(image))

    def _downscale(self, image: Any) -> Any:
        pool = tf.nn.max_pool2d if self.config.downscale_method == "max_pool" else tf.nn.avg_pool2d
        return pool(image, 2, 2, "VALID")

    def _doubled(self, image: Any, skipped: Any, filters: int) -> Any:
        """The image at twice the size, joined by what the encoder had at that size."""
        upscale = self._layer(
            tf.keras.layers.Conv2DTranspose, filters, 2, name="upscale", strides=2
        )
        doubled = upscale(image)
        return tf.concat([doubled, skipped], -1) if self.config.skip_connect else doubled

    def _layer(self, kind: Any, filters: int, size: int, *, name: str, **options: Any) -> Any:
        config = self.config
        return kind(
            filters,
            size,
            use_bias=config.enable_bias,
            kernel_initializer=initializer(config.initializer),
            bias_initializer=initializer(config.bias_initializer),
            name=name,
            dtype=self.policy,
            **options,
        )

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """Cross entropy, the mean over the pixels."""
        classes_last = tf.transpose(model_outputs["logits"], [0, 2, 3, 1])
        losses = cross_entropies(classes_last, features["labels"])
        weights = _pixel_weights(features)
        if weights is None:
            return tf.reduce_mean(losses)
        return weighted_loss(losses, weights, "num_tokens")

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        assert features is not None, "the labels are among the features"
        predictions = tf.argmax(model_outputs["logits"], 1)
        weights = _pixel_weights(features)
        return segmentation_metrics(self.config, features["labels"], predictions, weights)

    def build_predictions(self, model_outputs: Outputs, features: Features) -> Outputs:
        return {"prediction": tf.argmax(model_outputs["logits"], 1)}


def _pixel_weights(features: Features) -> Any:
    """1 for the pixels of samples, 0 for those of rows that only fill the last batch,
    [batch, height, width]; None where no such row can be."""
    if "unique_ids" not in features:
        return None
    rows = tf.cast(features["unique_ids"] >= 0, tf.float32)
    return tf.ones(features["labels"].shape) * rows[:, None, None]


MODEL = UNetTFModel
