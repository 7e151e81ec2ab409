"""Handwritten digits, or any images in the file format of MNIST.

With `data_dir`: the four files of MNIST (`train-images-idx3-ubyte` and so on, gzipped or not).
Without: the 1,797 real digits of 8 × 8 pixels that scikit-learn ships, every fifth one held out.
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "eval": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def train_input_dataloader(params):
    return _dataloader(params["train_input"], "train")


def eval_input_dataloader(params):
    return _dataloader(params["eval_input"], "eval")


def image_pixels(params):
    """Number of pixels of one image, which is the network's input size."""
    for section, split in (("train_input", "train"), ("eval_input", "eval")):
        data_dir = (params.get(section) or {}).get("data_dir")
        if data_dir:
            return int(np.prod(idx_shape(find(data_dir, FILES[split][0]))[1:]))
    return 64


def _dataloader(input_params, split):
    images, labels = _load(input_params.get("data_dir"), split)
    dataset = TensorDataset(
        torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
    )
    return DataLoader(
        dataset,
        batch_size=input_params["batch_size"],
        shuffle=input_params["shuffle"],
        num_workers=input_params["num_workers"],
        drop_last=input_params["drop_last_batch"],
    )


def _load(data_dir, split):
    """Images scaled to 0..1, and labels."""
    if data_dir:
        images, labels = (read_idx(find(data_dir, name)) for name in FILES[split])
        return images / 255.0, labels
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    chosen = held_out if split == "eval" else ~held_out
    return digits.images[chosen] / 16.0, digits.target[chosen]


def find(data_dir, name):
    """The file of that name in `data_dir`, gzipped or not."""
    for candidate in (Path(data_dir) / name, Path(data_dir) / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"no {name} or {name}.gz in {data_dir}")


def read_idx(path):
    """An array from a file in IDX format: two zero bytes, type, rank, sizes, then the data."""
    shape = idx_shape(path)
    with open_idx(path) as file:
        try:
            content = file.read()
        except EOFError as error:
            raise ValueError(f"{path} is cut short: {error}") from error
    data = np.frombuffer(content[4 + 4 * len(shape) :], dtype=np.uint8)
    if data.size != np.prod(shape):
        raise ValueError(f"{path} is cut short: {data.size} bytes of data, {shape} expected")
    return data.reshape(shape)


def idx_shape(path):
    """The sizes that the head of an IDX file states."""
    with open_idx(path) as file:
        start = file.read(4)
        if len(start) < 4 or start[:3] != b"\x00\x00\x08":
            raise ValueError(f"{path} is not an IDX file of unsigned bytes")
        sizes = file.read(4 * start[3])
    return tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))


def open_idx(path):
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
