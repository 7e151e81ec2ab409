"""Random generators that are set aside in one thread while another one needs them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from openwafer.streaming.randomness import RandomStream, preserved, result_of, seed_all


def test_a_thread_that_is_waited_for_may_set_generators_aside() -> None:
    def draw() -> float:
        with preserved():
            seed_all(5)
            return random.random()

    seed_all(5)
    expected = random.random()
    alone, stream = RandomStream(3), RandomStream(3)
    with alone.installed():
        numbers = [random.random() for _ in range(4)]
    found: list[float] = []
    with ThreadPoolExecutor(1) as pool, stream.installed():
        for _ in range(4):
            assert result_of(pool.submit(draw)) == expected
            found.append(random.random())
    assert found == numbers
