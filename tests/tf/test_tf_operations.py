"""Each operation with drawn shapes: results and gradients are TensorFlow's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tf_harness import batch_of, check_alike, graph_of, imported  # noqa: E402

from openwafer.frontends.tf.ops import LOWERINGS  # noqa: E402

raw = tf.raw_ops
SEEN: set[str] = set()
SIZES = st.integers(1, 4)
FEW = settings(max_examples=4)


def floats(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return np.random.RandomState(seed).uniform(low, high, shape).astype(np.float32)


def whole(*shape: int, seed: int = 0, high: int = 4) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, high, shape).astype(np.int32)


def alike(build: Callable[..., Any], /, **arrays: np.ndarray) -> None:
    gradients = arrays.pop("gradients", True)
    graph = check_alike(build, arrays, gradients=bool(np.all(gradients)))
    SEEN.update(node.kind for node in graph.nodes)


SMOOTH = (
    "Abs Cos Cosh Elu Erf Erfc Exp Expm1 Neg Relu Relu6 Selu Sigmoid Sign Sin Sinh Softplus Square "
    "Tan Tanh Softsign OnesLike ZerosLike Identity StopGradient Ceil Floor Rint Round Atan"
)
POSITIVE = "Inv Log Log1p Reciprocal Rsqrt Sqrt"
INSIDE_ONE = "Acos Asin"


def kinds_of(build: Callable[..., Any], /, **arrays: np.ndarray) -> list[str]:
    """The operations that are imported."""
    model, outputs = graph_of(build, arrays)
    return [node.kind for node in imported(model, outputs, batch_of(arrays)).nodes]


def _unary(kind: str) -> Callable[..., Any]:
    function = getattr(raw, kind)
    name = "features" if kind in ["Elu", "Relu", "Relu6", "Selu", "Softplus", "Softsign"] else "x"
    if kind in ("Identity", "StopGradient"):
        name = "input"
    return lambda x: function(**{name: x}) + 0.0 * x


@pytest.mark.parametrize("kind", (SMOOTH + " " + POSITIVE + " " + INSIDE_ONE).split())
@FEW
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 99))
def test_of_one_operand(kind: str, rows: int, columns: int, seed: int) -> None:
    low, high = {"P": (0.2, 3.0), "I": (-0.9, 0.9)}.get(
        "P" if kind in POSITIVE.split() else "I" if kind in INSIDE_ONE.split() else "", (-2.0, 2.0)
    )
    if kind == "Tan":
        low, high = -1.0, 1.0
    alike(_unary(kind), x=floats(rows, columns, seed=seed, low=low, high=high))


BINARY = "Add AddV2 Sub Mul RealDiv Div Maximum Minimum SquaredDifference Atan2 DivNoNan MulNoNan"


@pytest.mark.parametrize("kind", BINARY.split())
@FEW
@given(rows=SIZES, columns=SIZES, spread=st.sampled_from(["none", "row", "column", "number"]))
def test_of_two_operands(kind: str, rows: int, columns: int, spread: str) -> None:
    shape = {"none": (rows, columns), "row": (columns,), "column": (rows, 1), "number": ()}[spread]
    names = ("y", "x") if kind == "Atan2" else ("x", "y")

    def function(first: Any, second: Any) -> Any:
        return getattr(raw, kind)(**dict(zip(names, (first, second), strict=True)))

    x, y = floats(rows, columns), floats(*shape, seed=1, low=0.5)
    alike(lambda x, y: function(x, y), x=x, y=y)
    alike(lambda x: function(x, tf.constant(0.7)), x=x)
    alike(lambda y: function(tf.constant(0.7), y), y=y)


def test_equal_elements_pass_the_gradient_to_the_first() -> None:
    x = floats(3, 4)
    alike(lambda x, y: raw.Maximum(x=x, y=y), x=x, y=x.copy())
    alike(lambda x, y: raw.Minimum(x=x, y=y), x=x, y=x.copy())
    alike(lambda x, y: raw.DivNoNan(x=x, y=y), x=x, y=np.where(x > 0, x, 0).astype(np.float32))


@pytest.mark.parametrize("kind", ["Pow", "Xlogy", "FloorDiv", "FloorMod", "TruncateDiv"])
def test_of_positive_operands(kind: str) -> None:
    function = getattr(raw, kind)
    if kind in ("Pow", "Xlogy"):
        x, y = floats(3, 4, low=0.3), floats(3, 4, seed=1, low=0.3)
        alike(lambda x, y: function(x=x, y=y), x=x, y=y)
    else:
        x, y = whole(3, 4, high=9) - 4, whole(3, 4, seed=1, high=3) + 1
        if kind == "TruncateDiv":
            x = np.abs(x)
        alike(lambda x, y: function(x=x, y=y), x=x, y=y, gradients=np.False_)


COMPARISONS = "Equal NotEqual Less LessEqual Greater GreaterEqual"


@pytest.mark.parametrize("kind", COMPARISONS.split())
def test_comparisons_and_choices(kind: str) -> None:
    def build(x: Any, y: Any) -> Any:
        chosen = getattr(raw, kind)(x=x, y=y)
        both = raw.LogicalAnd(x=chosen, y=x > 0)
        either = raw.LogicalOr(x=raw.LogicalNot(x=both), y=y > 0)
        zeros = tf.zeros_like(x)
        return [
            tf.where(either, x, y),
            tf.where(both, x, 0.0),
            raw.Select(condition=tf.reduce_any(either, 1), x=x, y=y),
            tf.cast(chosen, tf.float32) + zeros,
            tf.reduce_all(chosen, 0),
        ]

    x = whole(4, 3).astype(np.float32)
    alike(build, x=x, y=whole(4, 3, seed=1).astype(np.float32))


@FEW
@given(
    kind=st.sampled_from(["Sum", "Mean", "Max", "Min", "Prod"]),
    axes=st.sampled_from([[0], [1], [-1], [0, 2], [0, 1, 2], []]),
    keep=st.booleans(),
)
def test_reductions(kind: str, axes: list[int], keep: bool) -> None:
    function = getattr(raw, kind)
    alike(lambda x: function(input=x, axis=axes, keep_dims=keep), x=floats(2, 3, 4))


@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min", "Prod"])
def test_every_reduction(kind: str) -> None:
    function = getattr(raw, kind)
    alike(lambda x: function(input=x, axis=[0, 2]), x=floats(2, 3, 4))


def test_places_of_extremes() -> None:
    x = np.random.RandomState(0).permutation(24).reshape(4, 6).astype(np.float32)

    def build(x: Any) -> Any:
        values, places = tf.math.top_k(x, 3)
        return [tf.argmax(x, 1), tf.argmin(x, 0, tf.int32), values, places]

    alike(build, x=x)
    targets = whole(4, high=6)
    alike(
        lambda x, y: tf.cast(tf.math.in_top_k(y, x, 2), tf.int32),
        x=x,
        y=targets,
        gradients=np.False_,
    )


@FEW
@given(exclusive=st.booleans(), reverse=st.booleans(), axis=st.integers(-2, 1))
def test_running_sums(exclusive: bool, reverse: bool, axis: int) -> None:
    alike(lambda x: tf.cumsum(x, axis, exclusive, reverse), x=floats(3, 5))


@FEW
@given(m=SIZES, k=SIZES, n=SIZES, ta=st.booleans(), tb=st.booleans(), bias=st.booleans())
def test_products(m: int, k: int, n: int, ta: bool, tb: bool, bias: bool) -> None:
    def build(a: Any, b: Any, c: Any) -> Any:
        product = tf.matmul(a, b, transpose_a=ta, transpose_b=tb)
        return tf.nn.bias_add(product, c) if bias else product + 0.0 * c

    a, b = floats(*((k, m) if ta else (m, k))), floats(*((n, k) if tb else (k, n)), seed=1)
    alike(build, a=a, b=b, c=floats(n, seed=2))


@FEW
@given(batch=SIZES, m=SIZES, k=SIZES, ta=st.booleans(), tb=st.booleans())
def test_batched_products(batch: int, m: int, k: int, ta: bool, tb: bool) -> None:
    a = floats(batch, 2, *((k, m) if ta else (m, k)))
    b = floats(batch, 2, *((3, k) if tb else (k, 3)), seed=1)
    alike(lambda a, b: tf.matmul(a, b, transpose_a=ta, transpose_b=tb), a=a, b=b)
    alike(lambda a, b: raw.BatchMatMul(x=a, y=b, adj_x=ta, adj_y=tb), a=a, b=b)
    alike(
        lambda a, b: raw.BatchMatMulV3(x=a, y=b, Tout=tf.float32, adj_x=ta, adj_y=tb),
        a=a,
        b=b,
        gradients=np.False_,
    )


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("abc,cde->abde", (2, 3, 4), (4, 2, 3)),
        ("aecd,abcd->acbe", (2, 3, 2, 4), (2, 5, 2, 4)),
        ("acbe,aecd->abcd", (2, 2, 5, 3), (2, 3, 2, 4)),
        ("abcd,cde->abe", (2, 3, 2, 4), (2, 4, 6)),
        ("...i,ij->...j", (2, 3, 4), (4, 2)),
    ],
)
def test_einsum(equation: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    alike(lambda a, b: tf.einsum(equation, a, b), a=floats(*a), b=floats(*b, seed=1))


IMAGES = st.tuples(st.integers(5, 8), st.integers(5, 8))
PADDING = st.sampled_from(["SAME", "VALID"])


@settings(max_examples=12)
@given(
    size=IMAGES,
    kernel=st.integers(1, 4),
    stride=st.integers(1, 2),
    padding=PADDING,
    dilation=st.integers(1, 2),
)
def test_convolutions(
    size: tuple[int, int], kernel: int, stride: int, padding: str, dilation: int
) -> None:
    if dilation > 1 and ((kernel - 1) * dilation >= 5 or stride > 1):
        dilation = 1
    x, w = floats(2, *size, 3), floats(kernel, kernel, 3, 4, seed=1)
    alike(lambda x, w: tf.nn.conv2d(x, w, stride, padding, dilations=dilation), x=x, w=w)


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_bias_joins_its_convolution(side: int, padding: str) -> None:
    """Also that of a transposed one, whose last row may be out of its reach."""
    x, w, c = floats(2, side, side, 3), floats(2, 2, 3, 3, seed=1), floats(3, seed=2)

    def forward(x: Any, w: Any, c: Any) -> Any:
        return tf.nn.bias_add(tf.nn.conv2d(x, w, 2, padding), c)

    def back(x: Any, w: Any, c: Any) -> Any:
        wide = 2 * side + (padding == "VALID")
        return tf.nn.bias_add(tf.nn.conv2d_transpose(x, w, [2, wide, wide, 3], 2, padding), c)

    for build, kind in ((forward, "BiasedConv2D"), (back, "BiasedConv2DBackpropInput")):
        alike(build, x=x, w=w, c=c)
        assert kinds_of(build, x=x, w=w, c=c) == [kind]
        alike(lambda x, w, c, build=build: build(x, w, 0.0 * c) + c, x=x, w=w, c=c)
    alike(lambda x, c: tf.nn.bias_add(x, c), x=x, c=c)
    alike(
        lambda x, w: tf.nn.conv2d_transpose(x, w, [2, 2 * side, 2 * side, 3], 2, "SAME"), x=x, w=w
    )


@FEW
@given(size=IMAGES, kernel=st.integers(1, 3), stride=st.integers(1, 2), padding=PADDING)
def test_depthwise_convolutions(
    size: tuple[int, int], kernel: int, stride: int, padding: str
) -> None:
    x, w = floats(2, *size, 3), floats(kernel, kernel, 3, 2, seed=1)
    steps = [1, stride, stride, 1]
    alike(lambda x, w: tf.nn.depthwise_conv2d(x, w, steps, padding), x=x, w=w)


def test_paddings_of_its_own() -> None:
    x, w = floats(2, 5, 6, 3), floats(3, 3, 3, 4, seed=1)
    pads = [[0, 0], [1, 2], [0, 1], [0, 0]]
    alike(lambda x, w: tf.nn.conv2d(x, w, 1, pads), x=x, w=w)


@settings(max_examples=10)
@given(size=IMAGES, kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=PADDING)
def test_transposed_convolutions(
    size: tuple[int, int], kernel: int, stride: int, padding: str
) -> None:
    layer = tf.keras.layers.Conv2DTranspose
    alike(lambda x: layer(3, kernel, stride, padding.lower())(x), x=floats(2, *size, 2))


@settings(max_examples=10)
@given(size=IMAGES, window=st.integers(1, 3), stride=st.integers(1, 3), padding=PADDING)
def test_pooling(size: tuple[int, int], window: int, stride: int, padding: str) -> None:
    x = np.random.RandomState(0).permutation(2 * size[0] * size[1] * 3)
    x = x.reshape(2, *size, 3).astype(np.float32)
    alike(lambda x: tf.nn.max_pool2d(x, window, stride, padding), x=x)
    alike(lambda x: tf.nn.avg_pool2d(x, window, stride, padding), x=x / 100)


@FEW
@given(training=st.booleans(), size=IMAGES)
def test_batch_normalization(training: bool, size: tuple[int, int]) -> None:
    def build(x: Any, scale: Any, offset: Any) -> Any:
        mean, variance = tf.constant([0.1, 0.2, 0.3]), tf.constant([1.1, 0.9, 0.5])
        if training:
            mean = variance = tf.zeros([0])
        y, new_mean, new_variance = tf.compat.v1.nn.fused_batch_norm(
            x, scale, offset, mean, variance, 1e-3, is_training=training
        )
        return [y, tf.stop_gradient(new_mean), tf.stop_gradient(new_variance)]

    alike(build, x=floats(2, *size, 3), scale=floats(3, seed=1), offset=floats(3, seed=2))


def test_softmax_and_cross_entropies() -> None:
    def build(x: Any, probabilities: Any, labels: Any) -> Any:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, x)
        return [
            tf.nn.softmax(x),
            tf.nn.log_softmax(x),
            losses,
            tf.nn.softmax_cross_entropy_with_logits(tf.stop_gradient(probabilities), x),
            tf.nn.sigmoid_cross_entropy_with_logits(tf.stop_gradient(probabilities), x),
            tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, 2.0 * x)),
            tf.compat.v1.losses.sparse_softmax_cross_entropy(labels, 3.0 * x),
        ]

    shares = floats(5, 4, seed=1, low=0)
    shares /= shares.sum(1, keepdims=True)
    alike(build, x=floats(5, 4), probabilities=shares, labels=whole(5))
    assert "MeanSparseCrossEntropy" in SEEN


def test_shapes() -> None:
    def build(x: Any) -> Any:
        first, second = tf.split(x, 2, axis=2)
        one, two, three = tf.split(x, [1, -1, 2], axis=2)
        return [
            tf.reshape(x, [-1, 4]),
            tf.transpose(x, [2, 0, 1]),
            tf.squeeze(tf.expand_dims(x, 1), 1),
            tf.concat([first, second, first], -1),
            tf.stack([first, second], 1),
            tf.add_n(tf.unstack(x, axis=0)),
            tf.concat([one, two, three], 2),
            tf.tile(x, [1, 2, 1]),
            tf.broadcast_to(x[:, :1], [2, 3, 4]),
            tf.pad(x, [[0, 0], [1, 2], [0, 1]]),
            tf.pad(x, [[1, 0], [0, 0], [0, 0]], constant_values=0.5),
            tf.pad(x, [[0, 0], [1, 1], [2, 1]], "REFLECT"),
            tf.pad(x, [[0, 0], [1, 1], [2, 1]], "SYMMETRIC"),
            tf.reverse(x, [1]),
            tf.roll(x, [1, 2], [0, 2]),
            tf.linalg.band_part(x, 1, 0),
            tf.fill([2, 2], tf.reduce_sum(x)),
            tf.identity_n([x, 2.0 * x])[1],
            tf.ensure_shape(x, [2, 3, 4]),
        ]

    alike(build, x=floats(2, 3, 4))


@pytest.mark.parametrize(
    "index",
    [
        "x[0]",
        "x[:, 1]",
        "x[..., -1]",
        "x[:, None, 1:]",
        "x[1:, ::2]",
        "x[:, ::-1]",
        "x[0, 1, 2]",
        "x[:, -2:, :3]",
        "x[..., tf.newaxis]",
        "tf.slice(x, [0, 1, 0], [-1, 2, 3])",
        "x[None, ..., 1]",
    ],
)
def test_indices(index: str) -> None:
    alike(lambda x: eval(index, {"x": x, "tf": tf}) * 1.0, x=floats(2, 3, 4))


def test_gathers() -> None:
    def build(x: Any, i: Any) -> Any:
        return [
            tf.gather(x, i),
            tf.gather(x, i, axis=1),
            tf.gather(x, i[0, 0], axis=1),
            tf.gather(x, i, axis=1, batch_dims=1),
            tf.gather_nd(x, tf.stack([i, i], -1)),
            raw.Gather(params=x, indices=i),
            tf.compat.v1.gather_nd(x, i[..., None]),
        ]

    alike(build, x=floats(4, 4, 3), i=whole(4, 2))
    alike(lambda x, i: tf.gather(x, i), x=floats(4, 3), i=whole(2, 3))


def test_embeddings_of_a_variable() -> None:
    def build(i: Any) -> Any:
        table = tf.compat.v1.get_variable(
            "table", [5, 3], initializer=tf.random_normal_initializer()
        )
        return tf.nn.embedding_lookup(table, i)

    alike(build, i=whole(2, 4, high=5))


@FEW
@given(axis=st.sampled_from([-1, 0, 1]), on=st.sampled_from([1.0, 3.0]))
def test_one_hot(axis: int, on: float) -> None:
    labels = whole(2, 3, high=6) - 1
    alike(
        lambda i: tf.one_hot(i, 4, on_value=on, off_value=0.0 if on == 1 else -1.0, axis=axis),
        i=labels,
        gradients=np.False_,
    )


def test_scatters() -> None:
    def build(x: Any, i: Any) -> Any:
        return [
            tf.math.unsorted_segment_sum(x, i, 4),
            tf.scatter_nd(i[:, None], x, [4, 3]),
        ]

    alike(build, x=floats(5, 3), i=whole(5))


def test_blocks_and_channels() -> None:
    x = floats(2, 4, 6, 3)
    alike(lambda x: tf.nn.space_to_depth(x, 2), x=x)
    alike(lambda x: tf.nn.depth_to_space(x, 2), x=floats(2, 3, 2, 8))
    alike(lambda x: tf.space_to_batch(x, [2, 3], [[0, 0], [1, 2]]), x=x)
    alike(
        lambda x: tf.compat.v1.batch_to_space_nd(x, [2, 2], [[1, 0], [0, 1]]), x=floats(8, 2, 3, 2)
    )


def test_the_rest() -> None:
    def build(x: Any) -> Any:
        return [
            tf.nn.leaky_relu(x, 0.3),
            tf.clip_by_value(x, -1.0, 1.0),
            raw.ClipByValue(t=x, clip_value_min=-1.0, clip_value_max=1.0),
            tf.nn.l2_loss(x),
            tf.cast(tf.cast(x, tf.int32), tf.float32) + x,
            tf.debugging.check_numerics(x, "bad"),
            raw.PreventGradient(input=x),
            tf.cast(tf.math.is_finite(x), tf.float32) * x,
            tf.cast(tf.math.is_nan(x) | tf.math.is_inf(x), tf.float32) * x,
            tf.cast(tf.bitwise.bitwise_and(tf.cast(x, tf.int32), 1), tf.float32),
            tf.cast(tf.bitwise.bitwise_or(tf.cast(x, tf.int32), 1), tf.float32),
            tf.compat.v1.placeholder_with_default(x, x.shape),
        ]

    alike(build, x=floats(3, 4), gradients=np.False_)


def test_dropout_becomes_one_operation() -> None:
    for build in (
        lambda x: tf.nn.dropout(x, 0.3),
        lambda x: tf.keras.layers.Dropout(0.3)(x, training=True),
        lambda x: tf.compat.v1.layers.dropout(x, 0.3, training=True),
    ):
        arrays = {"x": floats(3, 4)}
        model, outputs = graph_of(build, arrays)
        graph = imported(model, outputs, batch_of(arrays))
        assert [node.kind for node in graph.nodes] == ["Dropout"]
        assert graph.nodes[0].attribute("rate") == pytest.approx(0.3)


def test_pixels_repeated() -> None:
    alike(lambda x: tf.keras.layers.UpSampling2D(2)(x), x=floats(2, 3, 4, 5))
    alike(lambda x: tf.keras.layers.UpSampling2D((3, 1))(x), x=floats(1, 2, 2, 3))


def test_layer_normalization_becomes_one_operation() -> None:
    SEEN.discard("LayerNorm")
    alike(lambda x: tf.keras.layers.LayerNormalization()(x), x=floats(3, 5))
    assert "LayerNorm" in SEEN
    for epsilon in (1e-3, 1e-6):  # Keras has another spelling for a small one

        def build(x: Any, epsilon: float = epsilon) -> Any:
            return tf.keras.layers.LayerNormalization(epsilon=epsilon)(x)

        alike(build, x=floats(2, 3, 5))
        assert kinds_of(build, x=floats(2, 3, 5)) == ["LayerNorm"]


def test_what_is_almost_a_layer_normalization_stays_in_parts() -> None:
    def normalized(x: Any, axis: int) -> Any:
        mean, variance = tf.nn.moments(x, [axis], keepdims=True)
        gamma, beta = tf.constant([2.0] * 5), tf.constant([0.5] * 5)
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-6)

    x = floats(4, 5)
    assert kinds_of(lambda x: normalized(x, 1), x=x) == ["LayerNorm"]
    assert "LayerNorm" not in kinds_of(lambda x: normalized(x, 0), x=x)
    of_another = kinds_of(
        lambda x, y: tf.nn.batch_normalization(
            x, *tf.nn.moments(y, [1], keepdims=True), 0.5, 2.0, 1e-6
        ),
        x=x,
        y=floats(4, 5, seed=1),
    )
    assert "LayerNorm" not in of_another


def test_a_dense_layer_of_more_dimensions_is_one_product_with_its_bias() -> None:
    def build(x: Any) -> Any:
        return tf.keras.layers.Dense(4, bias_initializer="ones")(x)

    alike(build, x=floats(2, 3, 5))
    assert kinds_of(build, x=floats(2, 3, 5)) == ["Reshape", "Dense"]


NOT_COMPARED = {
    # Random numbers are our own.
    "Dropout",
    "RandomUniform",
    "RandomStandardNormal",
    "StatelessRandomUniform",
    "StatelessRandomUniformV2",
    "StatelessRandomNormal",
    "StatelessRandomNormalV2",
    # Refused with an explanation.
    "Conv3D",
    "Range",
    "Where",
    # Older forms that TensorFlow 2.15 makes no more.
    "FusedBatchNorm",
    "FusedBatchNormV2",
    "InTopK",
}


def test_no_operation_was_left_out() -> None:
    """Runs after the others in this file; alone it has nothing to say."""
    if len(SEEN) < 50:
        pytest.skip("the other tests of this file have not run")
    assert set(LOWERINGS) - SEEN == NOT_COMPARED
