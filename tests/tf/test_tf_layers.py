"""`openwafer.tf.layers`: each layer is imported with TensorFlow's numbers, and computes what its
formula says (NumPy, or torch's layer of the same weights)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tf_harness import check_alike, graph_of  # noqa: E402

from openwafer.errors import ConfigError  # noqa: E402
from openwafer.tf import layers  # noqa: E402


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def whole(*shape: int, high: int) -> np.ndarray:
    return np.random.RandomState(1).randint(0, high, shape).astype(np.int32)


def run(build: Callable[..., Any], **arrays: np.ndarray) -> tuple[list[Any], dict[str, Any]]:
    """Results in TensorFlow, and the values of the variables."""
    model, outputs = graph_of(build, arrays)
    variables = model.graph.get_collection("variables")
    feed = {place: arrays[path[2:-2]] for path, place in model.inputs.items()}
    with model.graph.as_default(), tf.compat.v1.Session() as session:
        session.run(model.initializer)
        values = dict(zip([v.op.name for v in variables], session.run(variables), strict=True))
        return session.run(outputs, feed), values


X = numbers(2, 4, 6)
IMAGE = numbers(2, 6, 6, 3)
IDS = whole(2, 4, high=5)

ONE_INPUT: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
    "ActivationLayer": (lambda: layers.ActivationLayer("hard_swish"), X),
    "ActivationLayer, gelu": (lambda: layers.ActivationLayer("gelu"), X),
    "DenseLayer": (lambda: layers.DenseLayer(3, "relu6"), X),
    "Conv2DLayer": (lambda: layers.Conv2DLayer(4, 3, activation="lrelu"), IMAGE),
    "Conv2DTransposeLayer": (lambda: layers.Conv2DTransposeLayer(4, 3, (2, 2), "same"), IMAGE),
    "MaxPool2DLayer": (lambda: layers.MaxPool2DLayer(), IMAGE),
    "DropoutLayer": (lambda: layers.DropoutLayer(0.0), X),
    "LayerNormalizationLayer": (lambda: layers.LayerNormalizationLayer(), X),
    "ReshapeLayer": (lambda: layers.ReshapeLayer((3, 8)), X),
    "SoftmaxLayer": (lambda: layers.SoftmaxLayer(1), X),
    "EmbeddingLayer": (lambda: layers.EmbeddingLayer(5, 3, use_bias=True), IDS),
    "PositionEmbeddingLayer": (lambda: layers.PositionEmbeddingLayer(), X),
    "PositionEmbeddingLayer, learned": (lambda: layers.PositionEmbeddingLayer(7, "learned"), X),
    "FeedForwardNetwork": (lambda: layers.FeedForwardNetwork([8, 6], ["gelu", None]), X),
    "FeedForwardNetworkV2": (lambda: layers.FeedForwardNetworkV2(8, 6), X),
    "SelfAttentionLayer": (lambda: layers.SelfAttentionLayer(6, 2, use_ffn_bias=True), X),
    "SelfAttentionLayer with positions": (
        lambda: layers.SelfAttentionLayer(6, 3, use_relative_attention_bias=True),
        X,
    ),
    **{
        f"PoolerLayer, {kind}": (lambda kind=kind: layers.PoolerLayer(kind), X)
        for kind in ("mean", "max", "sum", "first", "last")
    },
}


@pytest.mark.parametrize("name", ONE_INPUT)
def test_imported_with_the_numbers_of_tensorflow(name: str) -> None:
    make, array = ONE_INPUT[name]
    check_alike(lambda x: make()(x), {"x": array}, rtol=1e-4)


def test_layers_of_several_inputs_are_imported() -> None:
    def build(x: Any, y: Any, ids: Any) -> Any:
        wrapper = layers.PrePostProcessWrapper(
            layers.FeedForwardNetworkV2(8, 6),
            [(layers.LayerNormalizationLayer, {"epsilon": 1e-5})],
            [(layers.DropoutLayer, {"rate": 0.0}), (layers.AddLayer, {})],
        )
        embedding = layers.EmbeddingLayer(5, 6)
        found = embedding(ids, pad_id=0, scale=2.0)
        logits = layers.SharedWeightsDenseLayer(5)(x, embedding.embedding_table())
        return [
            layers.AddLayer()([x, y]),
            layers.AttentionLayer(6, 2, use_projection_bias=True)(x, y),
            layers.SegmentEmbeddingLayer(5)(x, ids),
            wrapper(x),
            found,
            layers.CrossEntropyFromLogitsLayer()(ids, logits),
            layers.SquaredErrorLayer()(tf.stop_gradient(x), y),
            layers.SetupInputTensor(x),
        ]

    check_alike(build, {"x": X, "y": numbers(2, 4, 6, seed=2), "ids": IDS}, rtol=1e-4)


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_is_that_of_torch(boolean: bool) -> None:
    seen = np.tril(np.ones((4, 4), bool))
    mask = seen if boolean else np.where(seen, 0, -1e9).astype(np.float32)
    (found,), weights = run(
        lambda x: layers.SelfAttentionLayer(6, 2, name="a")(x, tf.constant(mask)), x=X
    )

    def heads(name: str) -> torch.Tensor:
        product = torch.from_numpy(X @ weights[f"a/{name}/kernel"])
        return product.reshape(2, 4, 2, 3).transpose(1, 2)

    expected = F.scaled_dot_product_attention(
        heads("query"), heads("key"), heads("value"), attn_mask=torch.from_numpy(seen)
    )
    expected = expected.transpose(1, 2).reshape(2, 4, 6).numpy() @ weights["a/output/kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def t5_bucket(ahead: int, bidirectional: bool) -> int:
    """One pair, as the paper's section 2.1 tells it: 32 buckets, logarithmic up to 128."""
    first, count = 0, 32
    if bidirectional:
        count = 16
        first = count if ahead > 0 else 0
        distance = abs(ahead)
    else:
        distance = max(-ahead, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    wide = exact + int(math.log(distance / exact) / math.log(128 / exact) * (count - exact))
    return first + min(wide, count - 1)


def test_relative_positions_have_the_buckets_of_t5() -> None:
    from openwafer.frontends.tf.layers.attention import _buckets

    for bidirectional in (True, False):
        found = _buckets(50, 300, 32, bidirectional)
        expected = [
            [t5_bucket(key - (query + 250), bidirectional) for key in range(300)]
            for query in range(50)
        ]
        assert (found == np.array(expected)).all()


def test_keys_of_the_past() -> None:
    def build(x: Any) -> Any:
        layer = layers.SelfAttentionLayer(6, 2)
        whole_, present = layer(x, cache_present_kv=True)
        first, past = layer(x[:, :2], cache_present_kv=True)
        rest = layer(x[:, 2:], past_kv=past)
        del first
        return [whole_[:, 2:], rest, present[0]]

    (expected, found, _), _ = run(build, x=X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_poolers_pass_over_padding() -> None:
    padding = np.array([[0, 0, 0, 1], [0, 1, 1, 1]], np.float32)[..., None]
    kept = [X[0, :3], X[1, :1]]
    expected = {
        "mean": [k.mean(0) for k in kept],
        "max": [k.max(0) for k in kept],
        "sum": [k.sum(0) for k in kept],
        "last": [k[-1] for k in kept],
        "first": [k[0] for k in kept],
    }
    for kind, rows in expected.items():
        for layer, mask in ((layers.PoolerLayer, padding), (layers.PoolerLayerV2, 1 - padding)):
            (found,), _ = run(lambda x, f=layer, m=mask, k=kind: f(k)(x, tf.constant(m)), x=X)
            np.testing.assert_allclose(found, np.stack(rows), rtol=1e-5, err_msg=kind)


def test_mistakes() -> None:
    for make in (
        lambda: layers.PoolerLayer("means"),
        lambda: layers.AttentionLayer(6, 4),
        lambda: layers.AttentionLayer(6, 2, attention_type="additive"),
        lambda: layers.PositionEmbeddingLayer(embedding_type="learned"),
        lambda: layers.FeedForwardNetwork([1, 2], ["relu"]),
    ):
        with pytest.raises(ConfigError):
            make()
