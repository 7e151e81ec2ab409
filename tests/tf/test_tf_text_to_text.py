"""The processors of T5 and the Transformer: their features against the texts they are made of."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from openwafer.errors import ConfigError, DataError  # noqa: E402
from openwafer.frontends.tf.input_data import InputFunction  # noqa: E402
from openwafer.frontends.tf.input_report import slow_spots  # noqa: E402
from openwafer.streaming.shard import Shard  # noqa: E402
from openwafer.tf import data  # noqa: E402

SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
PAD, END, START = 0, 1, 3
NUM_WORDS = 60
EXTRA_IDS = 8


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENWAFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def spans(tmp_path: Path) -> dict[str, Any]:
    """A section of T5's: words in a cycle, each followed by the next; two spans a row."""
    words = [f"word{n}" for n in range(NUM_WORDS)]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ".join(words * 9))
    return {
        "data_processor": "T5DynamicDataProcessor",
        "data_dir": str(tmp_path / "text"),
        "vocab_file": str(tmp_path / "vocab.txt"),
        "extra_ids": EXTRA_IDS,
        "src_max_sequence_length": 40,
        "tgt_max_sequence_length": 14,
        "do_lower_case": False,
        "shuffle_buffer_size": 100,
        "seed": 10,
        "batch_size": 4,
    }


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """A section of the Transformer's: the target of pair n is the word `yesn`."""
    words = [*SPECIAL, "ja", *(f"yes{n}" for n in range(9))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "de").write_text("".join("ja " * (1 + n % 3) + "\n" for n in range(8)))
    (tmp_path / "en").write_text("".join(f"yes{n}\n" for n in range(8)))
    return {
        "data_processor": "TransformerDynamicDataProcessor",
        "src_data_dir": str(tmp_path / "de"),
        "tgt_data_dir": str(tmp_path / "en"),
        "src_vocab_file": str(tmp_path / "vocab.txt"),
        "tgt_vocab_file": str(tmp_path / "vocab.txt"),
        "src_max_sequence_length": 5,
        "tgt_max_sequence_length": 4,
        "num_buckets": 1,
        "batch_size": 2,
    }


def numbers_of(batches: Any) -> list[int]:
    """Which pairs there are, by the first word of the target."""
    return [int(n) - len(SPECIAL) - 1 for _, labels in batches for n in labels.numpy()[:, 0]]


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text, with the target's spans in the places of the source's sentinels."""
    first_sentinel = len(SPECIAL) + NUM_WORDS
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= first_sentinel:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    found: list[int] = []
    for token in source:
        found += spans[token] if token >= first_sentinel else [token]
    return found


def test_the_documented_features_of_a_translation(pairs: dict[str, Any]) -> None:
    section = {**pairs, "mixed_precision": True}
    features, labels = next(iter(data.eval_input_fn({"eval_input": section})))
    expected = {
        "encoder_input_ids": [[4, END, 0, 0, 0], [4, 4, END, 0, 0]],
        "encoder_mask": [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]],
        "encoder_input_length": [2, 3],
        "decoder_input_ids": [[START, 5, 0, 0], [START, 6, 0, 0]],
        "decoder_mask": [[0, 0, 1, 1], [0, 0, 1, 1]],
        "decoder_input_length": [2, 2],
        "loss_scale": [[0.5] * 4] * 2,
    }
    assert {name: tensor.numpy().tolist() for name, tensor in features.items()} == expected
    assert labels.numpy().tolist() == [[5, END, 0, 0], [6, END, 0, 0]]
    assert features.pop("loss_scale").dtype == tf.float16
    assert {tensor.dtype for tensor in (*features.values(), labels)} == {tf.int32}


def test_spans_are_of_the_text(spans: dict[str, Any]) -> None:
    """In each epoch others; put back, they give the words in their order."""
    section = {**spans, "shuffle": False}
    dataset = data.train_input_fn({"train_input": section})
    once = list(data.train_input_fn({"train_input": {**section, "repeat": False}}))
    batches = list(dataset.take(2 * len(once)))
    texts: list[list[int]] = []
    for features, labels in batches:
        counts = [
            features["encoder_input_length"].numpy() - 1,  # the end is counted
            features["decoder_input_length"].numpy() - 1,
        ]
        for row in range(4):
            source = features["encoder_input_ids"].numpy()[row]
            target = labels.numpy()[row]
            given = features["decoder_input_ids"].numpy()[row]
            num_source, num_target = counts[0][row], counts[1][row]
            assert source[num_source] == target[num_target] == END
            assert not source[num_source + 1 :].any()
            assert not target[num_target + 1 :].any()
            assert given[0] in (START, PAD)
            assert given[1 : num_target + 1].tolist() == target[:num_target].tolist()
            padded = features["encoder_mask"].numpy()[row]
            assert padded.tolist() == [0] * (num_source + 1) + [1] * (39 - num_source)
            texts.append(restored(source[:num_source].tolist(), target[:num_target].tolist()))
    rows = 4 * len(once)
    assert texts[:rows] == texts[rows:]
    following = [token for text in texts[:rows] for token in text]
    first = len(SPECIAL)
    assert following[0] == first
    assert all((b - first) == (a - first + 1) % NUM_WORDS for a, b in pairwise(following))
    assert any(
        not np.array_equal(one[0]["encoder_input_ids"], other[0]["encoder_input_ids"])
        for one, other in zip(once, batches[len(once) :], strict=True)
    )


def test_order_and_repetition(pairs: dict[str, Any]) -> None:
    assert numbers_of(data.eval_input_fn({"eval_input": pairs})) == list(range(8))
    params = {"train_input": {**pairs, "shuffle_seed": 3}}
    found = numbers_of(data.train_input_fn(params).take(8))
    assert found == numbers_of(data.train_input_fn(params).take(8))
    first, second = found[:8], found[8:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    params["train_input"]["skip_steps"] = 3
    assert numbers_of(data.train_input_fn(params).take(5)) == found[6:]
    by_hand = data.TransformerDynamicDataProcessor(pairs)
    modes = tf.estimator.ModeKeys
    assert numbers_of(by_hand.create_tf_dataset(mode=modes.EVAL)) == list(range(8))
    assert len(numbers_of(by_hand.create_tf_dataset(mode=modes.TRAIN).take(9))) == 18


def test_tasks_share_the_batches(pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    once = {**pairs, "repeat": False, "shuffle_seed": 1}
    params = {"train_input": {**once, "use_multiple_workers": True}}
    alone = numbers_of(data.train_input_fn(params))
    contexts = [tf.distribute.InputContext(2, index) for index in range(2)]
    parts = [numbers_of(data.train_input_fn({"train_input": once}, each)) for each in contexts]
    shared: list[list[int]] = []
    for index in range(2):
        cluster = {"chief": ["a:1"], "worker": ["a:2", "a:3"]}
        task = {"type": "worker", "index": index}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
        shared.append(numbers_of(data.train_input_fn(params)))
        function = InputFunction(function=data.train_input_fn, params=params, mode="train")
        assert function.sequence(seed=1, shard=Shard(index, 2)).already_sharded
    batches = [alone[i : i + 2] for i in range(0, 8, 2)]
    assert parts == shared == [batches[0] + batches[2], batches[1] + batches[3]]


def test_a_run_reads_them(spans: dict[str, Any]) -> None:
    params = {"train_input": spans}
    function = InputFunction(function=data.train_input_fn, params=params, mode="train")
    features, labels = function.element_spec()
    assert features["encoder_input_ids"].shape.as_list() == [4, 40]
    assert features["loss_scale"].shape.as_list() == labels.shape.as_list() == [4, 14]
    batch = next(iter(function.sequence(seed=1, shard=Shard(0, 1)).epoch(0)))
    expected, _ = next(iter(data.train_input_fn(params)))
    found = batch["features"]
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    graph = tf.Graph()
    with graph.as_default():
        data.train_input_fn(params)
    assert slow_spots(graph) == []


def test_sections_that_are_wrong(pairs: dict[str, Any], spans: dict[str, Any]) -> None:
    for section, change, error, message in (
        (pairs, {"use_vsl": True}, ConfigError, "rows of other lengths"),
        (pairs, {"skip_steps": -1}, ConfigError, "`skip_steps` is -1"),
        (pairs, {"src_data_dirs": "x"}, ConfigError, "`src_data_dirs` is not a key"),
        (pairs, {"tgt_data_dir": "/nowhere"}, ConfigError, "there is no /nowhere"),
        (pairs, {"batch_size": 9}, DataError, "8 samples are not one batch of 9"),
        (spans, {"extra_ids": 0}, ConfigError, "sentinels"),
    ):
        with pytest.raises(error, match=message) as caught:
            data.train_input_fn({"train_input": {**section, **change}})
        assert str(caught.value.where).startswith("train_input.")
