"""fc_mnist against the network of examples/fc_mnist, and the sizes."""

from __future__ import annotations

import gzip
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from openwafer import zoo
from openwafer.data import build_dataset
from openwafer.errors import DataError
from openwafer.frontends.torch.capture import capture_module
from openwafer.pipeline import validate_program
from openwafer.zoo import catalog
from openwafer.zoo.fc_mnist import FcMnistConfig, FcMnistModel

EXAMPLE = Path(__file__).parents[3] / "examples" / "fc_mnist" / "model.py"


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_is_the_network_of_the_example(activation):
    theirs = runpy.run_path(str(EXAMPLE))["MNIST"](784, [20, 30], 0.0, activation)
    ours = FcMnistModel(FcMnistConfig(hidden_sizes=(20, 30), activation_fn=activation))
    ours.load_state_dict(theirs.state_dict())
    batch = ours.example_batch(5)
    expected = nn.NLLLoss()(theirs(batch["images"]), batch["labels"])
    torch.testing.assert_close(ours(**batch), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "published"), [("base", "62.7"), ("wide", "545.8")])
def test_parameter_counts(size, published):
    with torch.device("meta"):
        model = zoo.build(f"fc_mnist/{size}")
    assert f"{model.num_parameters / 1e3:.1f}" == published


def test_rows_that_only_fill_a_batch_change_nothing():
    model = FcMnistModel(FcMnistConfig(depth=1))
    batch = {**model.example_batch(3), "unique_ids": torch.tensor([4, 5, -1])}
    real = {name: tensor[:2] for name, tensor in batch.items() if name != "unique_ids"}
    torch.testing.assert_close(model(**batch), model(**real))


def test_both_modes_run_every_operation():
    model = FcMnistModel(FcMnistConfig(depth=2, dropout=0.1))
    batch = model.example_batch(2)
    program = capture_module(model, batch).program
    for mode in ("layer_pipelined", "weight_streaming"):
        report = validate_program(program, mode)
        assert report.coverage == 1.0, str(report)


@pytest.mark.slow  # importing scikit-learn takes seconds
@pytest.mark.parametrize("section", ["train_input", "eval_input"])
def test_example_batch_is_like_the_data(section):
    model, params = zoo.build("fc_mnist/tiny"), catalog.load("fc_mnist/tiny").raw[section]
    data = build_dataset("digits", params, section.removesuffix("_input")).example_batch(3)
    example = model.example_batch(3)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in data.items()
    }
    assert torch.isfinite(model(**data))


def write_mnist(folder, num_items=20):
    """The four files, the test images gzipped; pixel values are random."""
    random = np.random.default_rng(3)
    written = {}
    for split, prefix in (("train", "train"), ("eval", "t10k")):
        images = random.integers(0, 256, (num_items, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, num_items, dtype=np.uint8)
        head = struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape)
        content = head + images.tobytes()
        if split == "train":
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(content)
        else:
            (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        head = struct.pack(">BBBBI", 0, 0, 8, 1, num_items)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        written[split] = images, labels
    return written


@pytest.mark.parametrize("split", ["train", "eval"])
def test_reads_the_files_of_mnist(tmp_path, split):
    images, labels = write_mnist(tmp_path)[split]
    params = catalog.load("fc_mnist/base").raw[f"{split}_input"]
    dataset = build_dataset("digits", {**params, "data_dir": str(tmp_path)}, split)
    batch = dataset.batch(np.arange(20), 0)
    expected = torch.from_numpy(images.reshape(20, 784) / np.float32(255))
    torch.testing.assert_close(batch["images"], expected)
    assert batch["labels"].tolist() == labels.tolist()
    assert torch.isfinite(zoo.build("fc_mnist/base")(**batch))


@pytest.mark.slow
def test_embedded_digits_are_scaled_to_the_size_of_mnist():
    small, large = (
        build_dataset("digits", {"image_shape": shape}, "eval").example_batch(4)["images"]
        for shape in (None, [28, 28, 1])
    )
    assert large.shape == (4, 784)
    expected = nn.functional.interpolate(small.view(4, 1, 8, 8), (28, 28), mode="bilinear")
    torch.testing.assert_close(large, expected.flatten(1))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train-images-idx3-ubyte", None, "there is no train-images"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\3" + bytes(12), "not an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x08", "not an IDX file"),
        ("train-images-idx3-ubyte", struct.pack(">BBBBIII", 0, 0, 8, 3, 20, 28, 28), "0 bytes"),
        ("train-labels-idx1-ubyte", struct.pack(">BBBBI", 0, 0, 8, 1, 3) + b"abc", "labels of"),
    ],
)
def test_broken_files_say_which_and_why(tmp_path, name, content, what):
    write_mnist(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        build_dataset("digits", {"data_dir": str(tmp_path)}, "train")
    assert str(tmp_path) in caught.value.where
