"""A run of a zoo model that goes on: the same batches, losses and weights as without the stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from run_harness import MODES, checkpoint, command, logged_losses  # noqa: E402
from zoo_harness import twin  # noqa: E402

from openwafer.streaming.loader import BatchSequence  # noqa: E402
from openwafer.zoo.tf.functions import input_fn_of  # noqa: E402

NAME = "fc_mnist/tiny"
STEPS, STOP = 9, 5
"""Epochs have five batches and two steps of two batches: the stop is within the third epoch."""

FLAGS = ["--batch_size", "256", "--set", "runconfig.log_steps=1", "optimizer.grad_accum_steps=2"]


def train(folder: Path, *flags: str) -> None:
    # Its dropout in TensorFlow itself draws anew in each process.
    command("train", NAME, folder, *FLAGS, "model.dropout=0.0", *flags)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_command_goes_on_with_the_data_where_it_stopped(mode: str, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *MODES[mode], "--num_steps", str(STEPS))
    train(halves, *MODES[mode], "--max_steps", str(STOP))
    train(halves, *MODES[mode], "--num_steps", str(STEPS))
    found, expected = checkpoint(halves, STEPS), checkpoint(whole, STEPS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-8, err_msg=name)
    if mode != "plain":
        assert len(logged_losses(whole)) == STEPS
        assert logged_losses(halves) == logged_losses(whole)


@pytest.mark.parametrize("first_step", [0, 3, 4, 5])
def test_a_dataset_begins_with_the_batches_of_its_step(first_step: int) -> None:
    loader, per_step = twin(NAME, ["train_input.batch_size=256"]).train, 2
    sequence = BatchSequence(loader, seed=5)
    in_steps = [
        batch["images"]
        for epoch in range(4)
        for batch in list(sequence.epoch(epoch))[: len(loader) // per_step * per_step]
    ]
    expected = in_steps[first_step * per_step :][:5]
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        input_fn = input_fn_of(loader, seed=5, repeats=True, batches_per_step=per_step)
        dataset = input_fn.from_step(first_step)()
        batch = tf.compat.v1.data.make_one_shot_iterator(dataset).get_next()
        found = [session.run(batch)["images"] for _ in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
