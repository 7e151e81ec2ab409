"""Layers that are a Keras layer each.

Decides how the documented arguments reach Keras. What the layers compute is Keras' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openwafer.frontends.tf.layers.base import BaseLayer
from openwafer.frontends.tf.library import tf

__all__ = [
    "ActivationLayer",
    "AddLayer",
    "Conv2DLayer",
    "Conv2DTransposeLayer",
    "DenseLayer",
    "DropoutLayer",
    "LayerNormalizationLayer",
    "MaxPool2DLayer",
    "ReshapeLayer",
    "SoftmaxLayer",
    "activation_function",
]

Activation = str | Callable[[Any], Any] | None
Pair = int | Sequence[int]

_OWN: dict[str, Callable[[Any], Any]] = {
    "gelu": tf.nn.gelu,
    "lrelu": tf.nn.leaky_relu,
    "relu6": tf.nn.relu6,
    "hard_swish": lambda x: x * tf.nn.relu6(x + 3.0) / 6.0,
}


def activation_function(activation: Activation) -> Any:
    """A function, by the names of Keras and of the documented layers; None passes values on."""
    if isinstance(activation, str) and activation in _OWN:
        return _OWN[activation]
    return tf.keras.activations.get(activation)


class ActivationLayer(BaseLayer):
    """`activation(x)`: a name of Keras, gelu, lrelu, relu6 or hard_swish, or a function."""

    def __init__(self, activation: Activation, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_function(activation)

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        return self.activation(inputs)


class AddLayer(BaseLayer):
    """The sum of a list of tensors."""

    def call(self, inputs: Sequence[Any], **kwargs: Any) -> Any:
        total, *others = inputs
        for other in others:
            total = total + other
        return total


class _Wrapper(BaseLayer):
    """A layer that is one Keras layer; it is built in this layer's name scope."""

    layer: Any

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        return self.layer(inputs)


class DenseLayer(_Wrapper):
    """`activation(x @ kernel + bias)`; `options` are those of tf.keras.layers.Dense."""

    def __init__(
        self,
        units: int,
        activation: Activation = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layer = tf.keras.layers.Dense(
            units,
            activation_function(activation),
            use_bias,
            kernel_initializer,
            bias_initializer,
            kernel_regularizer,
            bias_regularizer,
            activity_regularizer,
            kernel_constraint,
            bias_constraint,
            dtype=self._dtype_policy,
            name=self.name,
        )


class Conv2DLayer(_Wrapper):
    """A convolution; `options` are the initializers, regularizers and constraints of Keras."""

    def __init__(
        self,
        filters: int,
        kernel_size: Pair,
        strides: Pair = (1, 1),
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Pair = (1, 1),
        activation: Activation = None,
        use_bias: bool = True,
        boundary_casting: bool = False,
        tf_summary: bool = False,
        name: str | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(boundary_casting, tf_summary, name=name, dtype=dtype)
        self.layer = tf.keras.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            activation=activation_function(activation),
            use_bias=use_bias,
            dtype=self._dtype_policy,
            name=self.name,
            **options,
        )


class Conv2DTransposeLayer(_Wrapper):
    """A transposed convolution; `options` as of Conv2DLayer."""

    def __init__(
        self,
        filters: int,
        kernel_size: Pair,
        strides: Pair = (1, 1),
        padding: str = "valid",
        output_padding: Pair | None = None,
        data_format: str | None = None,
        dilation_rate: Pair = (1, 1),
        activation: Activation = None,
        use_bias: bool = True,
        boundary_casting: bool = False,
        tf_summary: bool = False,
        name: str | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(boundary_casting, tf_summary, name=name, dtype=dtype)
        self.layer = tf.keras.layers.Conv2DTranspose(
            filters,
            kernel_size,
            strides,
            padding,
            output_padding,
            data_format,
            dilation_rate,
            activation=activation_function(activation),
            use_bias=use_bias,
            dtype=self._dtype_policy,
            name=self.name,
            **options,
        )


class MaxPool2DLayer(_Wrapper):
    """The maximum in each window."""

    def __init__(
        self,
        pool_size: Pair = (2, 2),
        strides: Pair | None = None,
        padding: str = "valid",
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layer = tf.keras.layers.MaxPooling2D(pool_size, strides, padding, data_format)


class DropoutLayer(BaseLayer):
    """Dropout in training."""

    def __init__(
        self, rate: float, noise_shape: Any = None, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.layer = tf.keras.layers.Dropout(rate, noise_shape, seed)

    def call(self, inputs: Any, training: bool = True, **kwargs: Any) -> Any:
        return self.layer(inputs, training=training) if self.rate else inputs


class LayerNormalizationLayer(_Wrapper):
    """Normalization over `axis`; `options` are those of tf.keras.layers.LayerNormalization."""

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-8,
        center: bool = True,
        scale: bool = True,
        boundary_casting: bool = False,
        tf_summary: bool = False,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(boundary_casting, tf_summary, name=name, dtype=dtype, trainable=trainable)
        self.layer = tf.keras.layers.LayerNormalization(
            axis,
            epsilon,
            center,
            scale,
            trainable=trainable,
            dtype=self._dtype_policy,
            name=self.name,
            **options,
        )


class ReshapeLayer(_Wrapper):
    """The elements of each sample in another shape."""

    def __init__(self, target_shape: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = tf.keras.layers.Reshape(target_shape)


class SoftmaxLayer(BaseLayer):
    """Softmax over an axis."""

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        return tf.nn.softmax(inputs, axis=self.axis)
