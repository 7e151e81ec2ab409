"""16 bits, loss scales, clipping and accumulation of zoo runs, as their parameters say.

The reference is a loop by hand: TensorFlow's gradients of the scaled loss of single batches, and
their mean, its clipping, momentum, and the halving of the scale in float32 with numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from run_harness import MODES, checkpoint, command, logged_losses  # noqa: E402
from zoo_harness import twin  # noqa: E402

from openwafer.streaming.loader import BatchSequence  # noqa: E402
from openwafer.zoo.tf.functions import tf_model_class  # noqa: E402

NAME, STEPS, RATE, MOMENTUM = "fc_mnist/tiny", 8, 0.1, 0.9
MODEL = [
    "model.dropout=0.0",
    "train_input.batch_size=64",
    # Smooth: a unit of ReLU that rounding turns off would change whole gradients.
    "model.activation_fn=tanh",
]
ALIKE = [
    *MODEL,
    f"optimizer.learning_rate={RATE}",
    f"optimizer.momentum={MOMENTUM}",
    "runconfig.log_steps=1",
]


FLOAT16 = ["model.mixed_precision=True", "model.fp16_type=float16"]
BFLOAT16 = ["model.mixed_precision=True", "model.fp16_type=bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """flags: of the run. The rest says the same to the reference. rtol: of losses, and a tenth
    of what the way of the weights may be off; 16-bit sums are rounded elsewhere in torch."""

    flags: list[str]
    policy: bool | str = False
    scale: float = 1.0
    halves: bool = False
    num_batches: int = 1
    max_norm: float = np.inf
    skipped: range = field(default_factory=lambda: range(1))
    rtol: float = 1e-5


CASES = {
    "float32, clipped mean of two": Case(
        flags=["optimizer.grad_accum_steps=2", "optimizer.max_gradient_norm=0.3"],
        num_batches=2,
        max_norm=0.3,
    ),
    "float16, a number": Case(
        flags=[*FLOAT16, "optimizer.loss_scaling_factor=128.0"],
        policy=True,
        scale=128.0,
        rtol=2e-3,
    ),
    "float16, dynamic from where it overflows": Case(
        flags=[
            *FLOAT16,
            "optimizer.loss_scaling_factor=dynamic",
            "optimizer.initial_loss_scale=8388608.0",
            "optimizer.max_loss_scale=8388608.0",
        ],
        policy=True,
        scale=2.0**23,
        halves=True,
        skipped=range(1, STEPS - 2),
        rtol=2e-3,
    ),
    "bfloat16, mean of two": Case(
        flags=[*BFLOAT16, "optimizer.grad_accum_steps=2"],
        policy="mixed_bfloat16",
        num_batches=2,
        rtol=1e-2,
    ),
}

Weights = dict[str, np.ndarray]


def steps_of(num_batches: int) -> Iterator[list[Any]]:
    loader = twin(NAME, MODEL).train
    sequence = BatchSequence(loader, seed=1)
    for epoch in range(2):
        batches = list(sequence.epoch(epoch))
        for first in range(0, len(batches) - num_batches + 1, num_batches):
            yield batches[first : first + num_batches]


def reference(case: Case, start: Weights) -> tuple[list[float], Weights, int]:
    """Losses, the last weights, and how many steps overflowed."""
    of, graph = twin(NAME, MODEL), tf.Graph()
    with graph.as_default():
        names = {"images": "float32", "labels": "int64"}
        first = next(steps_of(1))[0]
        places = {n: tf.compat.v1.placeholder(d, first[n].shape) for n, d in names.items()}
        model = tf_model_class(of.family)(of.config, mixed_precision=case.policy)
        loss = model.build_total_loss(model(places, "train"), places, None, "train")
        scale_place = tf.compat.v1.placeholder("float32", ())
        variables = tf.compat.v1.trainable_variables()
        gradients = tf.gradients(loss * scale_place, variables)
    weights = [start[v.op.name] for v in variables]
    momenta = [np.zeros_like(weight) for weight in weights]
    losses, scale, skipped = [], case.scale, 0
    with tf.compat.v1.Session(graph=graph) as session:
        for _, batches in zip(range(STEPS), steps_of(case.num_batches), strict=False):
            for variable, weight in zip(variables, weights, strict=True):
                variable.load(weight, session)
            found = [
                session.run(
                    [loss, gradients],
                    {**{p: batch[n].numpy() for n, p in places.items()}, scale_place: scale},
                )
                for batch in batches
            ]
            losses.append(float(np.mean([one for one, _ in found])))
            means = [np.mean(of, 0) / scale for of in zip(*[g for _, g in found], strict=True)]
            if not all(np.isfinite(mean).all() for mean in means):
                scale, skipped = scale / 2 if case.halves else scale, skipped + 1
                continue
            norm = np.sqrt(sum(np.square(mean, dtype=np.float64).sum() for mean in means))
            means = [mean * min(1.0, case.max_norm / norm) for mean in means]
            momenta = [MOMENTUM * m + mean for m, mean in zip(momenta, means, strict=True)]
            weights = [w - RATE * m for w, m in zip(weights, momenta, strict=True)]
    return losses, {v.op.name: w for v, w in zip(variables, weights, strict=True)}, skipped


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_loop_by_hand(name: str, mode: str, tmp_path: Path) -> None:
    case = CASES[name]
    told = ["--max_steps", str(STEPS), *MODES[mode], "--set", *ALIKE, *case.flags]
    command("train", NAME, tmp_path, *told)
    start = checkpoint(tmp_path, 0)
    losses, weights, skipped = reference(case, start)
    assert len(losses) == STEPS
    assert skipped in case.skipped
    last = checkpoint(tmp_path, STEPS)
    for key, value in weights.items():
        error, moved = np.linalg.norm(last[key] - value), np.linalg.norm(value - start[key])
        assert error <= 10 * case.rtol * moved, key
    if case.halves:
        (scale,) = [value for key, value in last.items() if value.ndim == 0 and "scale" in key]
        assert scale == case.scale / 2**skipped
    if mode != "plain":
        found = list(logged_losses(tmp_path).values())
        np.testing.assert_allclose(found, losses, rtol=case.rtol)
