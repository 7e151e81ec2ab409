"""Name scopes become module paths; operations know the user's line."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from openwafer.frontends.tf.places import ModulePaths, site_of_operation  # noqa: E402


def test_scopes_that_are_numbered_are_elements_of_a_list() -> None:
    names = [
        "net/block/dense/MatMul",
        "net/block_1/dense/MatMul",
        "net/block_1/dense_1/MatMul",
        "net/head/MatMul",
        "layer_3/Relu",
        "Mean",
    ]
    paths = ModulePaths(names)
    assert [paths.of(name) for name in names] == [
        "net.block.0.dense",
        "net.block.1.dense.0",
        "net.block.1.dense.1",
        "net.head",
        "layer.3",
        "",
    ]


def test_the_line_is_that_of_the_users_call() -> None:
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [2, 3])
        y = tf.keras.layers.Dense(4)(x)
        line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    site = site_of_operation(y.op, ModulePaths(o.name for o in graph.get_operations()))
    assert (Path(site.file), site.line) == (Path(__file__), line)
    assert site.module == "dense"


def test_a_layer_that_is_called_again_is_no_list() -> None:
    variables = ["shared/embeddings", "block/kernel", "block_1/kernel"]
    names = [f"{scope}/op" for scope in ("shared", "shared_1", "block", "block_1", "drop_1")]
    paths = ModulePaths(names, variables)
    assert [paths.of(name) for name in names] == [
        *("shared", "shared", "block.0", "block.1", "drop.1"),
    ]
