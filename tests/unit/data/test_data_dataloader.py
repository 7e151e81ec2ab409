"""Datasets through the DataLoader and BatchSequence: the same batches however they are shared."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from openwafer.data import build_dataset, input_dataloader, input_keys, make_dataloader
from openwafer.data.registry import PROCESSORS, TASKS
from openwafer.errors import ConfigError, DataError
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.shard import Shard

Batch = dict[str, torch.Tensor]


def section(task: str, texts: Path) -> dict[str, Any]:
    """Small data of the task, with random numbers in them where the task has any."""
    sections: dict[str, dict[str, Any]] = {
        "causal_lm": {"data_dir": str(texts), "tokenizer": "byte", "max_sequence_length": 16},
        "masked_lm": {"data_dir": str(texts), "tokenizer": "byte", "max_sequence_length": 32},
        "span_corruption": {"embedded": "pairs", "src_max_sequence_length": 24},
        "segmentation": {"image_shape": [8, 8, 1], "augment_data": True},
    }
    return {**sections[task], "batch_size": 5}


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "span_corruption", "segmentation"])
@settings(max_examples=6)
@given(
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
    count=st.integers(1, 3),
    start=st.integers(0, 7),
    shuffle_seed=st.sampled_from([None, 1]),
)
def test_shards_and_restarts_give_the_same_batches(
    task: str, seed: int, epoch: int, count: int, start: int, shuffle_seed: int | None, texts: Path
) -> None:
    params = {**section(task, texts), "shuffle_seed": shuffle_seed}
    dataset = build_dataset(task, params, "train")

    def some(shard: Shard, first: int, number: int) -> list[Batch]:
        sequence = BatchSequence(make_dataloader(dataset, params), seed=seed, shard=shard)
        batches = sequence.epoch(epoch, first)
        return [batch for batch, _ in zip(batches, range(number), strict=False)]

    whole = some(Shard(0, 1), 0, 9)
    for index in range(count):
        shard = Shard(index, count)
        expected = [b for k, b in enumerate(whole) if k >= start and k % count == index]
        assert same(some(shard, start, len(expected)), expected)


def test_epochs_and_seeds_differ(texts: Path) -> None:
    params = section("masked_lm", texts)
    dataset = build_dataset("masked_lm", params, "train")

    def first(seed: int, epoch: int, **more: Any) -> Batch:
        loader = make_dataloader(dataset, {**params, **more})
        return next(BatchSequence(loader, seed=seed).epoch(epoch))

    assert not torch.equal(first(1, 0)["input_ids"], first(1, 1)["input_ids"])
    assert not torch.equal(first(1, 0)["input_ids"], first(2, 0)["input_ids"])
    # With a seed of its own the section decides, not the run.
    assert same([first(1, 0, shuffle_seed=9)], [first(2, 0, shuffle_seed=9)])


def test_an_item_does_not_depend_on_its_batch(texts: Path) -> None:
    dataset = build_dataset("masked_lm", section("masked_lm", texts), "train")
    together = dataset.batch([4, 1, 7], 99)
    for row, index in enumerate([4, 1, 7]):
        alone = dataset.batch([index], 99)
        assert all(torch.equal(together[name][row], alone[name][0]) for name in alone)


def test_evaluation_is_the_same_in_every_epoch_and_run(texts: Path) -> None:
    params = {**section("masked_lm", texts), "batch_size": 3}
    loader = input_dataloader("masked_lm", params, "eval")
    epochs = [
        list(BatchSequence(loader, seed=seed).epoch(epoch)) for seed, epoch in ((1, 0), (2, 5))
    ]
    assert same(*epochs)


def test_a_plain_loop_sees_new_epochs(texts: Path) -> None:
    loader = input_dataloader(
        "masked_lm", {**section("masked_lm", texts), "shuffle_seed": 1}, "train"
    )
    first, second = list(loader), list(loader)
    assert len(first) == len(loader)
    assert not same(first, second)
    again = input_dataloader(
        "masked_lm", {**section("masked_lm", texts), "shuffle_seed": 1}, "train"
    )
    assert same(list(again), first)


def test_plain_torch_loaders_work_too(texts: Path) -> None:
    dataset = build_dataset("causal_lm", section("causal_lm", texts), "train")
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=lambda batch: batch)))
    assert same([batch], [dataset.example_batch(4)])
    assert torch.equal(dataset[-1]["labels"], dataset[len(dataset) - 1]["labels"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "span_corruption", "segmentation"])
def test_processes_give_the_same_batches(task: str, texts: Path) -> None:
    params = section(task, texts)
    loaders = [input_dataloader(task, {**params, "num_workers": n}, "train") for n in (0, 2)]
    sequences = [BatchSequence(loader, seed=3) for loader in loaders]
    for epoch in (0, 1):
        found = [[b for b, _ in zip(s.epoch(epoch), range(9), strict=False)] for s in sequences]
        assert same(*found)


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm", "span_corruption", "segmentation"])
def test_datasets_travel_to_other_processes(task: str, texts: Path) -> None:
    dataset = build_dataset(task, section(task, texts), "train")
    data = pickle.dumps(dataset)
    assert len(data) < 200_000
    copy = pickle.loads(data)
    assert same([copy.batch([0, 2], 5)], [dataset.batch([0, 2], 5)])


def test_predictions_cover_every_item_once(texts: Path) -> None:
    params = section("causal_lm", texts)
    num_items = len(build_dataset("causal_lm", params, "predict"))
    size = next(size for size in (7, 8, 9, 10, 11) if num_items % size)
    params["batch_size"] = size
    loader = input_dataloader("causal_lm", params, "predict")
    batches = list(loader)
    ids = torch.cat([batch["unique_ids"] for batch in batches])
    assert ids[ids >= 0].tolist() == list(range(num_items))
    assert {len(batch["unique_ids"]) for batch in batches} == {size}
    filling = batches[-1]["unique_ids"] < 0
    assert filling.any()
    assert not batches[-1]["attention_mask"][filling].any()


@given(items=st.integers(1, 40), size=st.integers(1, 9), drop=st.booleans())
def test_number_of_batches(items: int, size: int, drop: bool) -> None:
    from openwafer.data.dataloader import EpochSampler

    sampler = EpochSampler(items, size, shuffle=True, seed=1, drop_last=drop)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    found = np.concatenate([batch.indices for batch in batches] or [np.zeros(0, np.int64)])
    assert len(set(found.tolist())) == len(found) == (items // size * size if drop else items)


def test_wrong_keys_and_values(texts: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = section("masked_lm", texts)
    with pytest.raises(ConfigError, match="mask_whole_wrd") as caught:
        build_dataset("masked_lm", {**params, "mask_whole_wrd": True}, "train")
    assert "mask_whole_word" in caught.value.hint
    assert caught.value.where == "train_input.mask_whole_wrd"
    with pytest.raises(ConfigError, match="masked_lm_prob"):
        build_dataset("masked_lm", {**params, "masked_lm_prob": 2}, "train")
    with pytest.raises(ConfigError, match="batch_size"):
        input_dataloader("masked_lm", {**params, "batch_size": 0}, "eval")
    with pytest.raises(DataError, match="not one batch"):
        input_dataloader("masked_lm", {**params, "batch_size": 10_000}, "train")
    with pytest.raises(ConfigError, match="there is no"):
        build_dataset("causal_lm", {"data_dir": "/nowhere"}, "train")
    with pytest.raises(ConfigError, match="data_processor"):
        build_dataset("causal_lm", {"data_processor": "T5DynamicDataProcessor"}, "train")
    with pytest.raises(ConfigError, match="causal_ml"):
        build_dataset("causal_ml", {}, "train")
    with caplog.at_level(logging.INFO, logger="openwafer"):
        build_dataset(
            "masked_lm", {**params, "shuffle_buffer": 10, "max_sequence_length": 24}, "train"
        )
    assert "shuffle_buffer" in caplog.text


def test_batch_size_by_split(texts: Path) -> None:
    params = {**section("causal_lm", texts), "train_batch_size": 6, "eval_batch_size": 2}
    for split, size in (("train", 6), ("eval", 2)):
        batch = next(iter(input_dataloader("causal_lm", params, split)))  # type: ignore[arg-type]
        assert len(batch["labels"]) == size


def test_every_task_has_its_keys_and_every_processor_a_task() -> None:
    assert set(PROCESSORS.values()) <= set(TASKS)
    for task in TASKS:
        assert "batch_size" in input_keys(task)
