"""Gradients that wait for a slow store hold up neither the layers nor the fetches of weights."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from runtime_cases import model_of
from runtime_reference import Setup, assert_states_equal, batches_like, optimizer_config, run_steps

from openwafer.config.optimizer import OptimizerConfig


@pytest.fixture(scope="module")
def tied() -> Setup:
    """The first layer's weight is the last layer's as well."""
    return Setup(*model_of("gpt, tied head"))


def test_a_backward_pass_ends_while_its_first_update_is_held_up(
    tied: Setup, tmp_path: Path
) -> None:
    executor = tied.streaming(optimizer_config(), tmp_path, waiting=len(tied.layers))
    store, update, ended = executor._store, executor._store.update, threading.Event()
    in_time: list[bool] = []

    def held_up(*arguments):
        in_time.append(ended.wait(60))
        update(*arguments)

    store.update = held_up
    executor.train_step([tied.batch], step=0)
    ended.set()
    found = executor.state()
    executor.close()
    assert in_time == [True] * len(in_time) != []
    expected = tied.pipelined(optimizer_config())
    expected.train_step([tied.batch], step=0)
    assert_states_equal(found, expected.state())


@pytest.mark.parametrize("config", [optimizer_config(), optimizer_config(max_gradient_norm=0.5)])
def test_any_number_that_waits_gives_the_same_bits(
    config: OptimizerConfig, tied: Setup, tmp_path: Path
) -> None:
    data = batches_like(tied.batch, 6)
    states = []
    for waiting in (1, 2, 9):
        executor = tied.streaming(config, tmp_path, waiting=waiting)
        run_steps(executor, data, microbatches=2)
        states.append(executor.state())
        executor.close()
    for state in states[1:]:
        assert_states_equal(state, states[0])
