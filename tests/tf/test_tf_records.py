"""TFRecord files and processors against TensorFlow's own reader, writer and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

tf = pytest.importorskip("tensorflow")

from openwafer.data import build_dataset  # noqa: E402
from openwafer.data.prepare import prepare  # noqa: E402
from openwafer.data.tfrecord_files import RecordFiles, writing_records  # noqa: E402
from openwafer.data.tfrecord_layouts import LAYOUTS, features_of  # noqa: E402
from openwafer.data.tfrecord_messages import decode_record, encode_record  # noqa: E402
from openwafer.data.tfrecord_writing import write_records  # noqa: E402
from openwafer.errors import ConfigError, DataError  # noqa: E402
from openwafer.frontends.tf.input_data import InputFunction  # noqa: E402
from openwafer.frontends.tf.input_report import slow_spots  # noqa: E402
from openwafer.streaming.shard import Shard  # noqa: E402
from openwafer.tf import data  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENWAFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@settings(max_examples=30, deadline=None)
@given(records=st.lists(st.binary(max_size=60), max_size=5))
def test_each_reads_what_the_other_wrote(
    records: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("records")
    with tf.io.TFRecordWriter(str(folder / "theirs")) as writer:
        for record in records:
            writer.write(record)
    with writing_records(folder / "ours") as ours:
        for record in records:
            ours.write(record)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    found = RecordFiles([folder / "theirs"])
    assert [found[i] for i in range(len(found))] == records
    read = tf.data.TFRecordDataset(str(folder / "ours")).as_numpy_iterator()
    assert list(read) == records


@settings(max_examples=30, deadline=None)
@given(
    integers=st.dictionaries(
        st.text(min_size=1, max_size=6), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
    ),
    floats=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
    words=st.lists(st.binary(max_size=6), min_size=1, max_size=4),
)
def test_messages_are_those_of_tensorflow(
    integers: dict[str, list[int]], floats: list[float], words: list[bytes]
) -> None:
    arrays: dict[str, Any] = {k: np.array(v, np.int64) for k, v in integers.items()}
    arrays["floats "] = np.array(floats, np.float32)
    example = tf.train.Example.FromString(encode_record(arrays))
    features = example.features.feature
    assert features.keys() == arrays.keys()
    assert list(features["floats "].float_list.value) == arrays["floats "].tolist()
    for name, values in integers.items():
        assert list(features[name].int64_list.value) == values
    theirs = tf.train.SequenceExample.FromString(encode_record(arrays, {"tokens": words}))
    lists = theirs.feature_lists.feature_list["tokens"].feature
    assert [list(each.bytes_list.value) for each in lists] == [[word] for word in words]
    for message in (example, theirs):
        found = decode_record(message.SerializeToString(), "")
        np.testing.assert_array_equal(found["floats "], arrays["floats "])
        for name, values in integers.items():
            assert list(found[name]) == values
    assert decode_record(theirs.SerializeToString(), "")["tokens"] == words


class Few:
    """The first items of a dataset, with all that it knows."""

    def __init__(self, dataset: Any, count: int) -> None:
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


SECTIONS: dict[str, dict[str, Any]] = {
    "GptTfRecordsProcessor": {
        "tokenizer": "byte",
        "embedded_bytes": 20_000,
        "max_sequence_length": 16,
    },
    "BertTfRecordsProcessor": {
        "embedded": "subjects",
        "embedded_bytes": 4_000,
        "vocab_size": 200,
        "max_sequence_length": 16,
        "max_predictions_per_seq": 4,
    },
    "BertMlmOnlyTfRecordsStaticMaskProcessor": {
        "tokenizer": "byte",
        "embedded_bytes": 20_000,
        "max_sequence_length": 16,
        "max_predictions_per_seq": 4,
        "disable_nsp": True,
    },
    "NerDataProcessor": {"tokenizer": "byte", "max_sequence_length": 24},
    "QuestionAnsweringDataProcessor": {"tokenizer": "byte", "max_sequence_length": 96},
    "BertSumTfRecordsProcessor": {
        "tokenizer": "byte",
        "max_sequence_length": 96,
        "max_cls_tokens": 5,
    },
    "UNetTfRecordsProcessor": {"image_shape": [8, 12, 1]},
}

FEATURES = {
    "input_ids": "input_ids",
    "segment_ids": "token_type_ids",
    "masked_lm_ids": "labels",
    "masked_lm_positions": "masked_lm_positions",
    "cls_indices": "cls_indices",
    "cls_weights": "cls_weights",
    "labels": "labels",
}


@pytest.mark.parametrize("name", SECTIONS)
def test_processors_give_what_the_torch_data_give(name: str, tmp_path: Path) -> None:
    """The same files, read by each side; the order is the files'."""
    section, task = SECTIONS[name], LAYOUTS[name].task
    original = build_dataset(task, section, "eval")
    write_records(Few(original, 8), name, tmp_path, seed=5)  # type: ignore[arg-type]
    asked = {**section, "data_dir": str(tmp_path), "batch_size": 4, "scale_mlm_weights": False}
    found = list(getattr(data, name)(asked, "eval").create_tf_dataset(is_training=False))
    assert len(found) == 2
    records = build_dataset(task, {**section, "data_dir": str(tmp_path)}, "eval")
    for number, (features, labels) in enumerate(found):
        batch = records.batch(range(4 * number, 4 * number + 4), 0)
        if task == "segmentation":
            same(features, batch["images"])
            same(labels, batch["labels"].flatten(1))
            continue
        assert features["input_mask"].dtype == features["input_ids"].dtype == tf.int32
        same(features.pop("input_mask"), 1 - batch["attention_mask"])
        if task == "masked_lm":
            same(features.pop("masked_lm_weights"), batch["masked_lm_mask"])
            following = batch.get("next_sentence_label", torch.zeros(4, 1))
            same(labels, following[:, 0])
        else:
            same(labels, batch["labels"])
        for key, value in features.items():
            same(value, batch[FEATURES[key]])


def same(tensor: Any, expected: torch.Tensor) -> None:
    np.testing.assert_array_equal(tensor.numpy(), expected.numpy())


def gpt_records(folder: Path, num_files: int, per_file: int = 4) -> dict[str, Any]:
    """Records whose first token is their number."""
    layout = LAYOUTS["GptTfRecordsProcessor"]
    for file in range(num_files):
        with writing_records(folder / f"part-{file}.tfrecord") as writer:
            for row in range(per_file):
                ids = np.array([file * per_file + row, 1, 2])
                item = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids}
                writer.write(encode_record(features_of(layout, item)))
    return {
        "data_processor": "GptTfRecordsProcessor",
        "data_dir": str(folder),
        "batch_size": 2,
        "max_sequence_length": 3,
    }


def numbers_of(batches: Any) -> list[int]:
    return [int(n) for features, _ in batches for n in features["input_ids"].numpy()[:, 0]]


def test_order_and_repetition(tmp_path: Path) -> None:
    section = gpt_records(tmp_path, num_files=3)
    once = numbers_of(data.eval_input_fn({"eval_input": section}))
    assert sorted(once) == list(range(12))
    assert once == numbers_of(data.eval_input_fn({"eval_input": section}))
    params = {"train_input": {**section, "shuffle_seed": 3}}
    epochs = numbers_of(data.train_input_fn(params).take(12))
    assert epochs == numbers_of(data.train_input_fn(params).take(12))
    first, second = epochs[:12], epochs[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first != once
    skipped = {"train_input": {**section, "shuffle": False, "repeat": False, "skip_steps": 4}}
    assert numbers_of(data.train_input_fn(skipped)) == once[8:]


def test_workers_share_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"train_input": {**gpt_records(tmp_path, num_files=3), "repeat": False}}
    alone = {"train_input": {**params["train_input"], "use_multiple_workers": False}}
    shared = {"train_input": {**params["train_input"], "use_multiple_workers": True}}
    assert sorted(numbers_of(data.train_input_fn(shared))) == list(range(12))
    seen: list[int] = []
    for index in range(2):
        cluster = {"chief": ["a:1"], "worker": ["a:2", "a:3"]}
        task = {"type": "worker", "index": index}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
        assert sorted(numbers_of(data.train_input_fn(alone))) == list(range(12))
        seen += numbers_of(data.train_input_fn(shared))
        function = InputFunction(function=data.train_input_fn, params=shared, mode="train")
        sequence = function.sequence(seed=1, shard=Shard(index, 2))
        assert sequence.already_sharded
    assert sorted(seen) == list(range(12))
    task = {"type": "chief", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    assert sorted(numbers_of(data.train_input_fn(shared))) == list(range(12))
    workers = [f"a:{n}" for n in range(4)]
    task = {"type": "worker", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": workers}, "task": task}))
    with pytest.raises(ConfigError, match="4 tasks cannot share 3 files"):
        data.train_input_fn(shared)


def test_an_input_context_deals_out_files(tmp_path: Path) -> None:
    params = {"train_input": {**gpt_records(tmp_path, num_files=2), "repeat": False}}
    contexts = [tf.distribute.InputContext(2, index) for index in range(2)]
    parts = [numbers_of(data.train_input_fn(params, context)) for context in contexts]
    assert sorted(parts[0] + parts[1]) == list(range(8))
    assert len(parts[0]) == len(parts[1]) == 4


def test_nothing_slows_the_pipeline_down(tmp_path: Path) -> None:
    params = {"train_input": gpt_records(tmp_path, num_files=2)}
    graph = tf.Graph()
    with graph.as_default():
        data.train_input_fn(params)
    assert slow_spots(graph) == []


def test_words_are_masked_anew_in_each_epoch(tmp_path: Path) -> None:
    name = "BertMlmOnlyTfRecordsDynamicMaskProcessor"
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the cat sat on the mat .\nthe dog came home .\n" * 40)
    prepare(
        [text],
        tmp_path / "out",
        tokenizer="wordpiece",
        vocab_size=60,
        output="tfrecord",
        data_processor=name,
        max_sequence_length=32,
    )
    section = {
        "data_processor": name,
        "data_dir": str(tmp_path / "out"),
        "batch_size": 2,
        "max_sequence_length": 32,
        "max_predictions_per_seq": 4,
        "shuffle": False,
        "disable_nsp": True,
    }
    params = {"train_input": section}
    num_batches = len(RecordFiles(sorted((tmp_path / "out").glob("*.tfrecord")))) // 2
    batches = [f for f, _ in data.train_input_fn(params).take(2 * num_batches)]
    again = [f for f, _ in data.train_input_fn(params).take(2 * num_batches)]
    plain = {**section, "masked_lm_prob": 0.0, "max_predictions_per_seq": 1}
    originals = build_dataset("masked_lm", plain, "train")
    for number, (features, other) in enumerate(zip(batches, again, strict=True)):
        assert all(np.array_equal(features[key], other[key]) for key in features)
        first = 2 * (number % num_batches)
        rows = originals.batch([first, first + 1], 0)
        ids = rows["input_ids"].numpy()
        # The one masked token of the reference is put back.
        np.put_along_axis(ids, rows["masked_lm_positions"].numpy(), rows["labels"].numpy(), 1)
        restored = features["input_ids"].numpy()
        for row in range(2):
            weights = features["masked_lm_weights"][row].numpy() > 0
            assert weights.any()
            places = features["masked_lm_positions"][row].numpy()[weights]
            restored[row, places] = features["masked_lm_ids"][row].numpy()[weights]
        np.testing.assert_array_equal(restored, ids)
        assert float(tf.reduce_sum(features["masked_lm_weights"])) == pytest.approx(2.0)
    assert any(
        not np.array_equal(batches[i]["input_ids"], batches[i + num_batches]["input_ids"])
        for i in range(num_batches)
    )
    with tf.Graph().as_default():  # and as the Estimator reads it
        spec = data.train_input_fn(params).element_spec[0]
    assert spec["input_ids"].shape.as_list() == [2, 32]


def test_images_are_augmented_with_their_masks(tmp_path: Path) -> None:
    layout = LAYOUTS["UNetTfRecordsProcessor"]
    image = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    with writing_records(tmp_path / "a.tfrecord") as writer:
        for _ in range(8):
            writer.write(encode_record(features_of(layout, {"images": image, "labels": image})))
    section = {
        "data_processor": "UNetTfRecordsProcessor",
        "dataset_path": str(tmp_path),
        "image_shape": [4, 4, 1],
        "batch_size": 8,
        "augment_data": True,
        "shuffle_seed": 1,
        "data_format": "channels_last",
    }
    images, masks = next(iter(data.train_input_fn({"train_input": section})))
    np.testing.assert_array_equal(images.numpy().reshape(8, -1), masks.numpy())
    assert all(sorted(row) == list(range(16)) for row in masks.numpy().tolist())
    assert len({tuple(row) for row in masks.numpy().tolist()}) > 1


def test_predictions_are_by_their_numbers(tmp_path: Path) -> None:
    row = {"input_ids": [2, 7, 3, 0], "input_mask": [1, 1, 1, 0], "segment_ids": [0, 0, 0, 0]}
    arrays = {name: np.array(values) for name, values in row.items()}
    with writing_records(tmp_path / "a.tfrecord") as writer:
        writer.write(encode_record({**arrays, "unique_ids": np.array([1000])}))
    section = {
        "data_processor": "QuestionAnsweringDataProcessor",
        "data_file": str(tmp_path / "a.tfrecord"),
        "max_sequence_length": 4,
        "batch_size": 1,
    }
    (features,) = data.predict_input_fn({"predict_input": section})
    assert features["unique_ids"].numpy().tolist() == [[1000]]
    assert features["input_mask"].numpy().tolist() == [[0, 0, 0, 1]]


def test_sections_that_are_wrong(tmp_path: Path) -> None:
    section = gpt_records(tmp_path, num_files=1)
    for change, error, message in (
        ({"data_processor": "GptTfRecordProcessor"}, ConfigError, "GptTfRecordProcessor"),
        ({"data_dir": None}, ConfigError, "`data_dir` is missing"),
        ({"data_dir": str(tmp_path / "none")}, ConfigError, "there is no"),
        ({"batch_size": 0}, ConfigError, "`batch_size` is 0"),
        ({"max_sequence_length": None}, ConfigError, "`max_sequence_length` is missing"),
    ):
        with pytest.raises(error, match=message) as caught:
            data.train_input_fn({"train_input": {**section, **change}})
        assert str(caught.value.where).startswith("train_input.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no TFRecord files"):
        data.train_input_fn({"train_input": {**section, "data_dir": str(tmp_path / "empty")}})
