"""The common Keras layers, one by one with drawn shapes: imported, with TensorFlow's results and
gradients, or refused with the line of this file that made them. None crashes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tf_harness import batch_of, check_alike, graph_of, imported  # noqa: E402

from openwafer.errors import UnsupportedOpError  # noqa: E402
from openwafer.frontends.tf.lowering import GraphModule  # noqa: E402

keras = tf.keras.layers
FEW = settings(max_examples=3)

FLAT = {
    "Dense": lambda: keras.Dense(3, activation="relu"),
    "Activation": lambda: keras.Activation("tanh"),
    "ReLU": lambda: keras.ReLU(max_value=1.5, negative_slope=0.1),
    "ELU": lambda: keras.ELU(),
    "LeakyReLU": lambda: keras.LeakyReLU(),
    "PReLU": lambda: keras.PReLU(),
    "Softmax": lambda: keras.Softmax(),
    "ThresholdedReLU": lambda: keras.ThresholdedReLU(0.5),
    "BatchNormalization": lambda: keras.BatchNormalization(),
    "LayerNormalization": lambda: keras.LayerNormalization(),
    "UnitNormalization": lambda: keras.UnitNormalization(),
    "Flatten": lambda: keras.Flatten(),
    "RepeatVector": lambda: keras.RepeatVector(3),
    "Dropout in evaluation": lambda: keras.Dropout(0.5),
    "GaussianNoise in evaluation": lambda: keras.GaussianNoise(0.5),
    "ActivityRegularization": lambda: keras.ActivityRegularization(0.1),
    "Lambda": lambda: keras.Lambda(lambda x: x * 2),
    "Identity": lambda: keras.Identity(),
    "Masking": lambda: keras.Masking(0.5),
    "GaussianDropout in evaluation": lambda: keras.GaussianDropout(0.5),
    "AlphaDropout in evaluation": lambda: keras.AlphaDropout(0.5),
    "Rescaling": lambda: keras.Rescaling(0.5, 1.0),
    "Normalization": lambda: keras.Normalization(mean=0.5, variance=2.0),
    "SpectralNormalization": lambda: keras.SpectralNormalization(keras.Dense(3)),
}
SEQUENCES = {
    "Conv1D": lambda: keras.Conv1D(3, 2, padding="same"),
    "Conv1D, causal": lambda: keras.Conv1D(3, 2, padding="causal"),
    "SeparableConv1D": lambda: keras.SeparableConv1D(3, 2),
    "Conv1DTranspose": lambda: keras.Conv1DTranspose(3, 2, strides=2),
    "MaxPooling1D": lambda: keras.MaxPooling1D(2),
    "AveragePooling1D": lambda: keras.AveragePooling1D(2, padding="same"),
    "GlobalAveragePooling1D": lambda: keras.GlobalAveragePooling1D(),
    "GlobalMaxPooling1D": lambda: keras.GlobalMaxPooling1D(),
    "Cropping1D": lambda: keras.Cropping1D(1),
    "ZeroPadding1D": lambda: keras.ZeroPadding1D(1),
    "UpSampling1D": lambda: keras.UpSampling1D(2),
    "DepthwiseConv1D": lambda: keras.DepthwiseConv1D(3),
    "LocallyConnected1D": lambda: keras.LocallyConnected1D(2, 2),
    "Permute": lambda: keras.Permute((2, 1)),
    "Reshape": lambda: keras.Reshape((-1, 2)),
    "SpatialDropout1D in evaluation": lambda: keras.SpatialDropout1D(0.5),
    "TimeDistributed": lambda: keras.TimeDistributed(keras.Dense(3)),
    "EinsumDense": lambda: keras.EinsumDense("abc,cd->abd", output_shape=(None, 3)),
    "LayerNormalization": lambda: keras.LayerNormalization(epsilon=1e-5),
    "LayerNormalization of two axes": lambda: keras.LayerNormalization(axis=[1, 2]),
    "GroupNormalization": lambda: keras.GroupNormalization(2),
}
IMAGES = {
    "Conv2D": lambda: keras.Conv2D(3, 3, strides=2, padding="same"),
    "Conv2D, dilated": lambda: keras.Conv2D(3, 2, dilation_rate=2),
    "DepthwiseConv2D": lambda: keras.DepthwiseConv2D(3),
    "SeparableConv2D": lambda: keras.SeparableConv2D(3, 3),
    "Conv2DTranspose": lambda: keras.Conv2DTranspose(3, 3, strides=2, padding="same"),
    "MaxPooling2D": lambda: keras.MaxPooling2D(),
    "AveragePooling2D": lambda: keras.AveragePooling2D(padding="same"),
    "GlobalAveragePooling2D": lambda: keras.GlobalAveragePooling2D(),
    "GlobalMaxPooling2D": lambda: keras.GlobalMaxPooling2D(),
    "BatchNormalization": lambda: keras.BatchNormalization(),
    "UpSampling2D": lambda: keras.UpSampling2D(2),
    "UpSampling2D, bilinear": lambda: keras.UpSampling2D(2, interpolation="bilinear"),
    "ZeroPadding2D": lambda: keras.ZeroPadding2D((1, 2)),
    "Cropping2D": lambda: keras.Cropping2D(1),
    "LocallyConnected2D": lambda: keras.LocallyConnected2D(2, 2),
    "SpatialDropout2D in evaluation": lambda: keras.SpatialDropout2D(0.5),
    "Resizing": lambda: keras.Resizing(6, 5),
    "CenterCrop": lambda: keras.CenterCrop(3, 2),
}
VOLUMES = {
    "Conv3D": lambda: keras.Conv3D(2, 2),
    "Conv3DTranspose": lambda: keras.Conv3DTranspose(2, 2),
    "MaxPooling3D": lambda: keras.MaxPooling3D(),
    "AveragePooling3D": lambda: keras.AveragePooling3D(),
    "GlobalAveragePooling3D": lambda: keras.GlobalAveragePooling3D(),
    "GlobalMaxPooling3D": lambda: keras.GlobalMaxPooling3D(),
    "Cropping3D": lambda: keras.Cropping3D(1),
    "ZeroPadding3D": lambda: keras.ZeroPadding3D(1),
    "UpSampling3D": lambda: keras.UpSampling3D(2),
    "SpatialDropout3D in evaluation": lambda: keras.SpatialDropout3D(0.5),
}
RECURRENT = {
    "LSTM": lambda: keras.LSTM(3),
    "GRU": lambda: keras.GRU(3),
    "SimpleRNN": lambda: keras.SimpleRNN(3),
    "Bidirectional": lambda: keras.Bidirectional(keras.LSTM(3)),
    "RNN": lambda: keras.RNN(keras.SimpleRNNCell(3)),
}
RANDOM = {
    "RandomBrightness": lambda: keras.RandomBrightness(0.2),
    "RandomContrast": lambda: keras.RandomContrast(0.2),
    "RandomCrop": lambda: keras.RandomCrop(3, 3),
    "RandomFlip": lambda: keras.RandomFlip(),
    "RandomHeight": lambda: keras.RandomHeight(0.2),
    "RandomRotation": lambda: keras.RandomRotation(0.2),
    "RandomTranslation": lambda: keras.RandomTranslation(0.2, 0.2),
    "RandomWidth": lambda: keras.RandomWidth(0.2),
    "RandomZoom": lambda: keras.RandomZoom(0.2),
}
NOT_IN_A_MODEL = {
    "what other layers are made of": {"InputSpec", "Layer", "Wrapper", "AbstractRNNCell"},
    "cells, which RNN takes": {"GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells"},
    "of the Model API": {"InputLayer"},
    "for features that are texts or categories: of an input function": {
        "CategoryEncoding", "DenseFeatures", "Discretization", "HashedCrossing", "Hashing",
        "IntegerLookup", "StringLookup", "TextVectorization",
    },
}  # fmt: skip
OTHERS = {
    "Add", "AdditiveAttention", "Attention", "Average", "Concatenate", "ConvLSTM1D", "ConvLSTM2D",
    "ConvLSTM3D", "Dot", "Embedding", "Maximum", "Minimum", "MultiHeadAttention", "Multiply",
    "Subtract",
}  # fmt: skip
"""In tests of their own below."""


def test_every_public_layer_is_somewhere_here() -> None:
    groups = (FLAT, SEQUENCES, IMAGES, VOLUMES, RECURRENT, RANDOM, OTHERS, *NOT_IN_A_MODEL.values())
    named = {re.split("[ ,]", name)[0] for group in groups for name in group}
    classes = {value for value in vars(keras).values() if isinstance(value, type)}
    known = {getattr(keras, name) for name in named}
    assert {cls.__name__ for cls in classes - known} == set()


REFUSED = {
    "UpSampling2D, bilinear",
    "Resizing",
    "CenterCrop",
    "Conv3DTranspose",
    "Conv3D",
    "MaxPooling3D",
    "AveragePooling3D",
    *RECURRENT,
    *(RANDOM.keys() - {"RandomBrightness", "RandomFlip"}),
    "ConvLSTM1D",
    "ConvLSTM2D",
    "ConvLSTM3D",
}


def check(name: str, make: Callable[[], Any], array: np.ndarray, **call: Any) -> None:
    def build(x: Any) -> Any:
        return make()(x, **call)

    if name in REFUSED:
        check_refused(build, array)
    else:
        check_alike(build, {"x": array}, rtol=1e-4)


def check_refused(build: Callable[..., Any], array: np.ndarray) -> None:
    model, outputs = graph_of(build, {"x": array})
    with pytest.raises(UnsupportedOpError) as caught:
        imported(model, outputs, batch_of({"x": array}))
    assert caught.value.refusals
    for refusal in caught.value.refusals:
        assert Path(refusal.file).name == Path(__file__).name
        assert refusal.line > 0
        assert refusal.reason
    assert Path(__file__).name in str(caught.value)


def numbers(*shape: int) -> np.ndarray:
    """All different, so that no maximum has a rival."""
    count = int(np.prod(shape))
    order = np.random.RandomState(0).permutation(count).astype(np.float32)
    return ((order + 0.5) * 4 / count - 2).reshape(shape).astype(np.float32)


@pytest.mark.parametrize("name", FLAT)
@FEW
@given(rows=st.integers(2, 5), columns=st.integers(2, 5))
def test_on_rows(name: str, rows: int, columns: int) -> None:
    check(name, FLAT[name], numbers(rows, columns))


@pytest.mark.parametrize("name", SEQUENCES)
@FEW
@given(length=st.integers(4, 7), size=st.sampled_from([2, 4]))
def test_on_sequences(name: str, length: int, size: int) -> None:
    check(name, SEQUENCES[name], numbers(2, length, size))


@pytest.mark.parametrize("name", IMAGES)
@FEW
@given(height=st.integers(4, 7), width=st.integers(4, 7))
def test_on_images(name: str, height: int, width: int) -> None:
    check(name, IMAGES[name], numbers(2, height, width, 4))


def test_convolution_in_groups() -> None:
    """Keras calls a function here, whose gradient TensorFlow itself does not find."""
    check_alike(
        lambda x: keras.Conv2D(4, 3, groups=2)(x), {"x": numbers(2, 5, 5, 4)}, gradients=False
    )


def test_functions_and_constant_conditions() -> None:
    @tf.function
    def doubled(x: Any) -> Any:
        return tf.cond(tf.constant(True), lambda: x * 2.0, lambda: x)

    def build(x: Any) -> Any:
        return [doubled(x) + 1.0, doubled(doubled(x))]

    # TensorFlow itself does not find the gradient of a call in a graph of its first version.
    check_alike(build, {"x": numbers(3, 4)}, gradients=False)


def test_conditions_on_values_are_refused() -> None:
    check_refused(lambda x: tf.cond(tf.reduce_sum(x) > 0, lambda: x, lambda: -x), numbers(3, 4))


MERGES = ["Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate"]


@pytest.mark.parametrize("name", [*MERGES, "Dot"])
def test_of_several_tensors(name: str) -> None:
    layer = (lambda: keras.Dot(1)) if name == "Dot" else getattr(keras, name)
    x = numbers(3, 4)
    check_alike(lambda x, y: layer()([x, y]), {"x": x, "y": np.roll(x, 1)})


@pytest.mark.parametrize("name", ["Attention", "AdditiveAttention"])
def test_attention(name: str) -> None:
    layer = getattr(keras, name)
    check_alike(lambda x, y: layer()([x, y]), {"x": numbers(2, 3, 4), "y": numbers(2, 5, 4)})


@FEW
@given(heads=st.integers(1, 3), masked=st.booleans())
def test_multi_head_attention(heads: int, masked: bool) -> None:
    mask = np.tril(np.ones((5, 5), bool))[None] if masked else None

    def build(x: Any, y: Any) -> Any:
        return keras.MultiHeadAttention(heads, 4)(x, y, attention_mask=mask)

    check_alike(build, {"x": numbers(2, 5, 6), "y": numbers(2, 5, 6)}, rtol=1e-4)


def test_embedding() -> None:
    ids = np.random.RandomState(0).randint(0, 7, (3, 4)).astype(np.int32)
    check_alike(lambda x: keras.Embedding(7, 5)(x), {"x": ids})


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalization_of_a_batch(training: bool) -> None:
    check_alike(
        lambda x: keras.BatchNormalization()(x, training=training),
        {"x": numbers(3, 4, 4, 2)},
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", VOLUMES)
def test_on_volumes(name: str) -> None:
    check(name, VOLUMES[name], numbers(2, 4, 4, 4, 2))


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    check(name, RECURRENT[name], numbers(2, 4, 3))


@pytest.mark.parametrize("name", RANDOM)
def test_random_pictures(name: str) -> None:
    """Their numbers are not TensorFlow's."""
    array = numbers(2, 6, 6, 3)
    if name in REFUSED:
        check(name, RANDOM[name], array, training=True)
        return
    model, outputs = graph_of(lambda x: RANDOM[name]()(x, training=True), {"x": array})
    batch = batch_of({"x": array})
    (found,) = GraphModule(imported(model, outputs, batch), {}).run(batch)
    if name == "RandomFlip":
        for before, after in zip(array, found.numpy(), strict=True):
            flips = [before, before[::-1], before[:, ::-1], before[::-1, ::-1]]
            assert any(np.array_equal(after, flip) for flip in flips)
    assert found.shape == array.shape
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_in_recurrent_layers(dimensions: int) -> None:
    name = f"ConvLSTM{dimensions}D"
    check(name, lambda: getattr(keras, name)(2, 2), numbers(2, 3, *[4] * dimensions, 2))
