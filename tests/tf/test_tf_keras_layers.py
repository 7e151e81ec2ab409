"""The common Keras layers, one by one with drawn shapes: imported, with TensorFlow's results and
gradients, or refused with the line of this file that made them. None crashes."""

from __future__ import annotations

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
}
REFUSED = {
    "UpSampling2D, bilinear",
    "LSTM",
    "GRU",
    "SimpleRNN",
    "Bidirectional",
    "ConvLSTM1D",
    "Conv3D",
    "RandomFlip",
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


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        ("LSTM", lambda: keras.LSTM(3), (2, 4, 3)),
        ("GRU", lambda: keras.GRU(3), (2, 4, 3)),
        ("SimpleRNN", lambda: keras.SimpleRNN(3), (2, 4, 3)),
        ("Bidirectional", lambda: keras.Bidirectional(keras.LSTM(3)), (2, 4, 3)),
        ("Conv3D", lambda: keras.Conv3D(2, 2), (2, 4, 4, 4, 2)),
    ],
)
def test_refused_with_the_line(name: str, make: Any, shape: tuple[int, ...]) -> None:
    check(name, make, numbers(*shape))
