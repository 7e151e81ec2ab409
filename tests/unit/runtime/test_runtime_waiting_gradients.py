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


def test_all_layers_but_the_last_run_backward_while_the_first_update_is_held_up(
    tied: Setup, tmp_path: Path
) -> None:
    executor = tied.streaming(optimizer_config(), tmp_path, waiting=len(tied.layers))
    store, update, at_last = executor._store, executor._store.update, threading.Event()
    wait_for_returns = executor._traffic.wait_for_returns
    waits: list[int] = []
    in_time: list[bool] = []

    def held_up(*arguments):
        in_time.append(at_last.wait(60))
        update(*arguments)

    def noted_wait(*, at_most: int) -> None:
        waits.append(at_most)
        if len(waits) == len(tied.layers):
            at_last.set()
        wait_for_returns(at_most=at_most)

    store.update = held_up
    executor._traffic.wait_for_returns = noted_wait
    executor.train_step([tied.batch], step=0)
    executor._traffic.wait_for_returns = wait_for_returns
    assert waits == [len(tied.layers)] * (len(tied.layers) - 1) + [1]
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
