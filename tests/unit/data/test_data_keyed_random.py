"""Keyed random numbers: functions of their key, and random."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from openwafer.data.keyed_random import (
    derive_seed,
    item_generator,
    keyed_integers,
    keyed_uniforms,
)

SEEDS = st.integers(0, 2**64 - 1)


@given(
    seed=SEEDS,
    items=st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    count=st.integers(1, 9),
)
def test_a_row_depends_on_its_key_alone(seed: int, items: list[int], count: int) -> None:
    together = keyed_uniforms(seed, np.array(items), count)
    longer = keyed_uniforms(seed, np.array(items), count + 5)
    np.testing.assert_array_equal(longer[:, :count], together)
    for row, item in zip(together, items, strict=True):
        np.testing.assert_array_equal(keyed_uniforms(seed, np.array([item]), count)[0], row)
    assert ((together >= 0) & (together < 1)).all()


def test_uniform_in_every_direction() -> None:
    """Means and correlations within five standard deviations, along items, counts and draws."""
    size = 400
    first = keyed_uniforms(7, np.arange(size), size)
    for other in (
        keyed_uniforms(7, np.arange(size), size, draw=1),
        keyed_uniforms(8, np.arange(size), size),
        np.roll(first, 1, axis=0),
        np.roll(first, 1, axis=1),
    ):
        correlation = float(np.corrcoef(first.ravel(), other.ravel())[0, 1])
        assert abs(correlation) < 5 / size
    deviation = np.sqrt(1 / 12 / size)
    assert np.abs(first.mean(axis=0) - 0.5).max() < 5 * deviation
    assert np.abs(first.mean(axis=1) - 0.5).max() < 5 * deviation
    counts = np.bincount(keyed_integers(7, np.arange(size), size, below=10).ravel(), minlength=10)
    assert np.abs(counts - size * size / 10).max() < 5 * np.sqrt(size * size / 10)


def test_seeds_and_generators() -> None:
    assert derive_seed("a", 1) == derive_seed("a", 1) != derive_seed("a", 2)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    draws = [item_generator(seed, item).random() for seed, item in ((1, 2), (1, 3), (2, 2))]
    assert len(set(draws)) == 3
    assert item_generator(1, 2).random() == draws[0]
