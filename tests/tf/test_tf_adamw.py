"""`AdamWOptimizer` with bias correction where a loss scale skips steps.

The reference for the count of updates is TensorFlow's own run, and for the update PyTorch's AdamW.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from tf_models import images, linear_model  # noqa: E402
from training_harness import MODES, check_training, estimator  # noqa: E402

from openwafer.tf import AdamWOptimizer, CSDynamicLossScale, wrap_optimizer  # noqa: E402


def large_linear_model(features: Any, labels: Any, mode: str) -> Any:
    """Gradients beyond float32 until the scale has been halved some times, and again where it has
    been doubled."""

    def update(loss: Any, step: Any) -> Any:
        scale = CSDynamicLossScale(2.0**127, 3, 2.0, 1.0, 2.0**127)
        optimizer = AdamWOptimizer(1e-3, 0.01, use_bias_correction=True)
        return wrap_optimizer(optimizer, scale).minimize(loss, step)

    return linear_model(update)({"image": features["image"] * 1000.0}, labels, mode)


@pytest.mark.slow
def test_skipped_steps_are_not_counted_by_all(tmp_path: Path) -> None:
    """Nor in a run that goes on."""
    ends = check_training(large_linear_model, images, tmp_path, steps=12)
    for mode, config in {"plain": {}, **MODES}.items():
        estimator(large_linear_model, ends[mode], **config).train(images, max_steps=16)
    readers = {mode: tf.train.load_checkpoint(str(end)) for mode, end in ends.items()}
    names = readers["plain"].get_variable_to_shape_map()
    for mode in MODES:
        assert readers[mode].get_variable_to_shape_map() == names
        for name in names:
            mine, theirs = (readers[m].get_tensor(name) for m in (mode, "plain"))
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-6, err_msg=name)
    assert readers["plain"].get_tensor("global_step") == 16
    assert 0 < readers["plain"].get_tensor("num_updates") < 15, "some steps were skipped"


def test_the_update_is_that_of_pytorch_after_a_skipped_step() -> None:
    """The gradients of steps 1, 2 and 4 of four; that of step 3 is not finite."""
    gradients = [0.5, -2.0, np.inf, 0.25]
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    theirs = torch.optim.AdamW([weight], 0.1, eps=1e-6, weight_decay=0.01)
    for gradient in gradients:
        if np.isfinite(gradient):
            weight.grad = torch.tensor([gradient])
            theirs.step()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        step = tf.compat.v1.train.get_or_create_global_step()
        variable = tf.compat.v1.get_variable("weight", initializer=tf.constant([1.0]))
        gradient = tf.compat.v1.placeholder(tf.float32, [1])
        scale = CSDynamicLossScale(2.0, 100, 2.0, 1.0, 4.0)
        optimizer = AdamWOptimizer(0.1, 0.01, epsilon=1e-6, use_bias_correction=True)
        train_op = wrap_optimizer(optimizer, scale).apply_gradients([(gradient, variable)], step)
        session.run(tf.compat.v1.global_variables_initializer())
        for value in gradients:
            session.run(train_op, {gradient: [value]})
        found, counted, steps = session.run([variable, optimizer.counter, step])
    assert (counted, steps) == (3, 4)
    np.testing.assert_allclose(found, weight.detach().numpy(), rtol=1e-6)
