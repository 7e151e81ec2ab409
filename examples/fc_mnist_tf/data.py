"""Handwritten digits, or any images in the file format of MNIST, as tf.data pipelines.

With `data_dir`: the four files of MNIST (`train-images-idx3-ubyte` and so on, gzipped or not).
Without: the 1,797 real digits of 8 × 8 pixels that scikit-learn ships, every fifth one held out.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf

from openwafer.data.idx_files import read_idx_images


def set_defaults(params):
    for section, shuffle in (("train_input", True), ("eval_input", False)):
        if section in params:
            params[section].setdefault("batch_size", 128)
            params[section].setdefault("shuffle", shuffle)
    return params


def train_input_fn(params):
    """Batches without an end."""
    input_params = params["train_input"]
    images, labels = load(input_params.get("data_dir"), "train")
    dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    if input_params["shuffle"]:
        dataset = dataset.shuffle(len(images))
    dataset = dataset.repeat().batch(input_params["batch_size"], drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def eval_input_fn(params):
    input_params = params["eval_input"]
    dataset = tf.data.Dataset.from_tensor_slices(load(input_params.get("data_dir"), "eval"))
    dataset = dataset.batch(input_params["batch_size"], drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def predict_input_fn(params):
    """Images alone."""
    return eval_input_fn(params).map(lambda images, labels: images)


def load(data_dir, split):
    """Images [sample, pixels] scaled to 0..1, and labels [sample]."""
    if data_dir:
        images, labels = read_idx_images(Path(data_dir), split)
        images = images / 255.0
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        held_out = np.arange(len(digits.target)) % 5 == 0
        chosen = held_out if split == "eval" else ~held_out
        images, labels = digits.images[chosen] / 16.0, digits.target[chosen]
    return images.reshape(len(images), -1).astype(np.float32), labels.astype(np.int64)
