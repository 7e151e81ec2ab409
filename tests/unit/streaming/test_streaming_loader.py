"""BatchSequence against plain iteration of the same loader."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from openwafer.errors import DataError
from openwafer.streaming import tasks
from openwafer.streaming.loader import BatchSequence, Shard, build_sequence


class Augmented(Dataset[Any]):
    """Sample i with one random number of each library: the data-augmentation case."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(0)
        self.tag = ""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        numbers = (random.random(), np.random.rand(), self.rng.random(), torch.rand(()).item())
        return (index, *numbers)


def masking_collate(samples: list[Any]) -> torch.Tensor:
    """Random collation, as masked language modelling does it."""
    return torch.cat([torch.tensor(samples, dtype=torch.float64).flatten(), torch.rand(2)])


def loader_of(size: int = 23, **options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(size), collate_fn=masking_collate, **options)


def whole(loader: Any, epoch: int, seed: int = 5, **options: Any) -> list[torch.Tensor]:
    return list(BatchSequence(loader, seed=seed, **options).epoch(epoch))


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def interleaved(loader: Any, count: int, epoch: int, start: int = 0) -> list[torch.Tensor]:
    """What a coordinator gives: batch k from shard k % count."""
    parts = [
        BatchSequence(loader, seed=5, shard=Shard(i, count)).epoch(epoch, start)
        for i in range(count)
    ]
    batches: list[torch.Tensor] = []
    while True:
        batch = next(parts[(start + len(batches)) % count], None)
        if batch is None:
            return batches
        batches.append(batch)


def test_unshuffled_batches_are_those_of_the_plain_loader() -> None:
    data = TensorDataset(torch.arange(10), torch.arange(10) * 2)
    loader = DataLoader(data, batch_size=4)
    for ours, plain in zip(BatchSequence(loader, seed=1).epoch(0), loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_shuffled_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    loader = DataLoader(TensorDataset(torch.arange(50)), batch_size=7, shuffle=True)

    def order(seed: int, epoch: int) -> list[int]:
        batches = BatchSequence(loader, seed=seed).epoch(epoch)
        return torch.cat([batch[0] for batch in batches]).tolist()

    assert sorted(order(1, 0)) == list(range(50))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(1, 0)), tuple(order(1, 1)), tuple(order(2, 0))}) == 3


@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    count=st.integers(1, 4),
    epoch=st.integers(0, 3),
    start=st.integers(0, 12),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shards_from_any_start_are_the_tail_of_the_whole(
    size: int, batch_size: int, count: int, epoch: int, start: int, shuffle: bool
) -> None:
    def loader() -> DataLoader[Any]:
        return loader_of(size, batch_size=batch_size, shuffle=shuffle)

    expected = whole(loader(), epoch)
    assert_same(interleaved(loader(), count, epoch, start), expected[start:])


@pytest.mark.parametrize("count", [1, 3])
def test_loading_processes_change_nothing(count: int) -> None:
    expected = whole(loader_of(batch_size=3, shuffle=True), 1)
    processes = loader_of(batch_size=3, shuffle=True, num_workers=2)
    assert_same(interleaved(processes, count, 1, 2), expected[2:])


def test_persistent_processes_serve_every_epoch_and_an_abandoned_one() -> None:
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    sequence = BatchSequence(
        loader_of(**options, num_workers=2, persistent_workers=True, prefetch_factor=2), seed=5
    )
    list(islice(sequence.epoch(0), 2))
    for epoch in (1, 2, 0):
        assert_same(list(sequence.epoch(epoch)), whole(loader_of(**options), epoch))


def remember_dataset(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.tag = f"set by process {worker_id}"


class Tagged(Augmented):
    def __getitem__(self, index: int) -> Any:
        return self.tag


def test_worker_init_fn_sees_the_users_dataset() -> None:
    loader = DataLoader(
        Tagged(2), batch_size=2, num_workers=1, worker_init_fn=remember_dataset, collate_fn=list
    )
    assert list(BatchSequence(loader, seed=0).epoch(0)) == [["set by process 0"] * 2]


def test_the_callers_random_numbers_are_not_disturbed() -> None:
    def draw() -> tuple[float, ...]:
        return (random.random(), float(np.random.rand()), torch.rand(()).item())

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = [draw() for _ in range(4)]
    for options in ({}, {"num_workers": 1}):
        seed()
        batches = BatchSequence(loader_of(batch_size=5, shuffle=True, **options), seed=1).epoch(0)
        drawn = [draw()]
        for _ in range(3):
            next(batches)
            drawn.append(draw())
        assert drawn == expected


def test_the_batches_do_not_depend_on_the_callers_random_numbers() -> None:
    expected = whole(loader_of(batch_size=2, shuffle=True), 0)
    torch.manual_seed(99)
    disturbed = []
    for batch in BatchSequence(loader_of(batch_size=2, shuffle=True), seed=5).epoch(0):
        torch.rand(1)
        random.random()
        disturbed.append(batch)
    assert_same(disturbed, expected)


def test_sequences_in_several_threads_do_not_mix() -> None:
    expected = [whole(loader_of(60, batch_size=2, shuffle=True), epoch) for epoch in range(4)]
    found: dict[int, list[torch.Tensor]] = {}

    def load(epoch: int) -> None:
        found[epoch] = whole(loader_of(60, batch_size=2, shuffle=True), epoch)

    threads = [threading.Thread(target=load, args=(epoch,)) for epoch in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for epoch in range(4):
        assert_same(found[epoch], expected[epoch])


class LazyShuffle:
    """A sampler that draws from the global and its own generator while it is iterated."""

    def __init__(self) -> None:
        self.own = random.Random(1)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        for _ in range(200):
            yield (random.randrange(23) + self.own.randrange(23)) % 23


def test_a_sampler_that_draws_lazily_is_the_same_for_every_shard() -> None:
    sampler = LazyShuffle()
    expected = whole(loader_of(batch_size=2, sampler=sampler), 4)
    assert sampler.epochs == [4]
    assert_same(interleaved(loader_of(batch_size=2, sampler=LazyShuffle()), 3, 4), expected)
    assert not torch.equal(expected[0], whole(loader_of(batch_size=2, sampler=sampler), 5)[0])


def samplers() -> dict[str, dict[str, Any]]:
    generator = torch.Generator()
    return {
        "loader generator": {"batch_size": 4, "shuffle": True, "generator": generator},
        "sampler generator": {"sampler": RandomSampler(range(23), generator=generator)},
        "replacement": {"sampler": WeightedRandomSampler([1.0] * 23, 40), "batch_size": 3},
        "batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(23)), 5, True)},
        "list of batches": {"batch_sampler": [[0, 1, 2], [7], [22, 3]]},
    }


@pytest.mark.parametrize("name", list(samplers()))
def test_every_kind_of_sampler(name: str) -> None:
    expected = whole(loader_of(**samplers()[name]), 2)
    assert expected
    assert_same(interleaved(loader_of(**samplers()[name]), 3, 2, 1), expected[1:])
    sequence = BatchSequence(loader_of(**samplers()[name]), seed=5)
    assert sequence.num_batches == len(expected)


def test_without_batching_each_key_is_a_batch() -> None:
    sampler = BatchSampler(SequentialSampler(range(6)), 4, False)
    data = TensorDataset(torch.arange(6))
    loader = DataLoader(data, batch_size=None, sampler=sampler)
    assert [batch[0].tolist() for batch in BatchSequence(loader, seed=0).epoch(0)] == [
        [0, 1, 2, 3],
        [4, 5],
    ]
    assert torch.equal(next(BatchSequence(loader, seed=0).epoch(0, 1))[0], torch.tensor([4, 5]))


def test_datasets_that_load_many_at_once_are_asked_so() -> None:
    data = Subset(TensorDataset(torch.arange(10) * 10), [1, 3, 5])
    assert hasattr(data, "__getitems__")
    loader = DataLoader(data, batch_size=2)
    assert [b[0].tolist() for b in BatchSequence(loader, seed=0).epoch(0)] == [[10, 30], [50]]


def test_only_wanted_batches_are_loaded() -> None:
    loaded: list[int] = []

    class Counting(Augmented):
        def __getitem__(self, index: int) -> Any:
            loaded.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counting(12), batch_size=2, collate_fn=masking_collate)
    list(BatchSequence(loader, seed=0, shard=Shard(1, 2)).epoch(0, 2))
    assert loaded == [6, 7, 10, 11]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        own = torch.rand(())
        for value in range(11):
            yield torch.stack([torch.tensor(float(value)), own, torch.rand(())])


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets(workers: int) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=2, num_workers=workers)

    expected = whole(loader(), 1)
    assert len(expected) == 6 * max(workers, 1)
    assert not torch.equal(expected[0], whole(loader(), 2)[0])
    assert_same(interleaved(loader(), 3, 1, 2), expected[2:])
    assert BatchSequence(loader(), seed=0).num_batches is None


def test_lists_and_functions_and_own_loaders_are_iterated() -> None:
    class OwnLoader(DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter("abc")

    def function() -> Iterator[str]:
        yield from "abc"

    for data in (["a", "b", "c"], function, OwnLoader([1], batch_size=1)):
        sequence = BatchSequence(data, seed=0, shard=Shard(1, 2))
        assert list(sequence.epoch(0)) == ["b"]
        assert list(sequence.epoch(1, 2)) == []
    assert BatchSequence(["a", "b"], seed=0).num_batches == 2
    assert BatchSequence(function, seed=0).num_batches is None


def test_what_can_be_read_once_gives_one_epoch() -> None:
    sequence = BatchSequence(iter(["a"]), seed=0)
    assert list(sequence.epoch(0)) == ["a"]
    with pytest.raises(DataError, match="only once"):
        next(sequence.epoch(1))


def test_an_empty_epoch_is_an_error_but_an_empty_shard_is_not() -> None:
    loader = DataLoader(TensorDataset(torch.arange(3)), batch_size=4, drop_last=True)
    with pytest.raises(DataError, match="3 samples, batch_size=4, drop_last=True"):
        next(BatchSequence(loader, seed=0).epoch(0))
    with pytest.raises(DataError, match="no batch"):
        next(BatchSequence([], seed=0).epoch(0))
    loader = DataLoader(TensorDataset(torch.arange(3)), batch_size=4)
    assert list(BatchSequence(loader, seed=0, shard=Shard(1, 2)).epoch(0)) == []
    assert list(BatchSequence(loader, seed=0).epoch(0, 1)) == []


def test_no_batches_at_all() -> None:
    with pytest.raises(DataError, match="a int, which has no batches"):
        BatchSequence(3, seed=0)


class Faulty(Augmented):
    def __getitem__(self, index: int) -> Any:
        raise KeyError("label")  # the line that the error must name


@pytest.mark.parametrize("workers", [0, 1])
def test_the_users_error_is_named_with_its_line(workers: int) -> None:
    loader = DataLoader(Faulty(4), num_workers=workers)
    with pytest.raises(DataError, match="KeyError") as caught:
        next(BatchSequence(loader, seed=0).epoch(0))
    file, line = caught.value.where.rsplit(":", 1)
    # The error's frames hold torch's iterator, which takes five seconds to go in a cycle.
    del caught
    assert file == __file__
    with open(__file__) as source:
        assert "the line that the error must name" in source.readlines()[int(line) - 1]


def set_task(monkeypatch: pytest.MonkeyPatch, rank: int, num_tasks: int) -> None:
    monkeypatch.setenv("SLURM_PROCID", str(rank))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(num_tasks))


def test_data_that_the_user_sharded_are_not_sharded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_shard() -> DataLoader[Any]:
        rank, count = tasks.get_streaming_rank(), tasks.num_streamers()
        return DataLoader(TensorDataset(torch.arange(14)[rank::count]), batch_size=3)

    set_task(monkeypatch, 2, 3)
    sequence = build_sequence(own_shard, seed=0, shard=Shard(1, 2))
    assert sequence.already_sharded
    values = [batch[0].tolist() for batch in sequence.epoch(0)]
    assert values == [[1, 3, 5], [7, 9, 11], [13]]
    assert [batch[0].tolist() for batch in sequence.epoch(0, 2)] == values[1:]
    # Batches 1, 3 and 5 of the epoch are here; 7 is the first that is not.
    assert sequence.num_batches == 7
    plain = build_sequence(lambda: ["a", "b"], seed=0, shard=Shard(1, 2))
    assert not plain.already_sharded
    assert list(plain.epoch(0)) == ["b"]


def test_asking_for_the_rank_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def late() -> Iterator[int]:
        yield tasks.get_streaming_rank()

    set_task(monkeypatch, 1, 3)
    sequence = build_sequence(lambda: late, seed=0, shard=Shard(0, 2))
    with pytest.raises(DataError, match="sharded twice"):
        next(sequence.epoch(0))
