"""TFRecord files: the format against a slow, obvious one; damage; every task's records.

TensorFlow's own reader and writer are compared in tests/tf/test_tf_records.py.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.data import build_dataset
from openwafer.data.prepare import prepare
from openwafer.data.tfrecord_files import RecordFiles, record_files, writing_records
from openwafer.data.tfrecord_layouts import LAYOUTS
from openwafer.data.tfrecord_messages import decode_record, encode_record
from openwafer.data.tfrecord_writing import write_records
from openwafer.errors import ConfigError, DataError

CASTAGNOLI = 0x82F63B78
"""The polynomial of CRC-32C, bits reversed (RFC 3720, appendix B.4)."""


def slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (CASTAGNOLI if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def slow_masked(data: bytes) -> bytes:
    crc = slow_crc32c(data)
    turned = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (turned + 0xA282EAD8) % 2**32)


def slow_file(records: Sequence[bytes]) -> bytes:
    parts: list[bytes] = []
    for data in records:
        length = struct.pack("<Q", len(data))
        parts += [length, slow_masked(length), data, slow_masked(data)]
    return b"".join(parts)


def written(path: Path, records: Sequence[bytes]) -> Path:
    with writing_records(path) as writer:
        for data in records:
            writer.write(data)
    return path


def all_of(path: Path) -> list[bytes]:
    found = RecordFiles([path])
    return [found[i] for i in range(len(found))]


def test_the_checksum_is_the_published_one() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, of ones, ascending."""
    assert slow_crc32c(bytes(32)) == 0x8A9136AA
    assert slow_crc32c(b"\xff" * 32) == 0x62A8AB43
    assert slow_crc32c(bytes(range(32))) == 0x46DD794E


@settings(max_examples=40)
@given(parts=st.lists(st.lists(st.binary(max_size=40), max_size=4), min_size=1, max_size=3))
def test_files_are_those_of_the_format(
    parts: list[list[bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("records")
    paths = [written(folder / f"{i}.tfrecord", records) for i, records in enumerate(parts)]
    assert [path.read_bytes() for path in paths] == [slow_file(records) for records in parts]
    found = RecordFiles(record_files([folder], "train"))
    flat = [data for records in parts for data in records]
    assert [found[i] for i in range(len(found))] == flat
    copy = pickle.loads(pickle.dumps(found))
    assert [copy[i] for i in reversed(range(len(copy)))] == flat[::-1]


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_is_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One bit of any byte, or any number of bytes from the end."""
    path = tmp_path_factory.getbasetemp() / "damaged.tfrecord"
    records = [b"first", b"", b"the third"]
    whole = bytearray(slow_file(records))
    if data.draw(st.booleans(), "cut"):
        kept = data.draw(st.integers(0, len(whole) - 1), "kept")
        ends = {0, len(slow_file(records[:1])), len(slow_file(records[:2]))}
        path.write_bytes(whole[:kept])
        if kept in ends:  # as if fewer had been written: no format of records can tell
            assert len(RecordFiles([path])) == sorted(ends).index(kept)
            return
        with pytest.raises(DataError, match="middle of a record") as caught:
            RecordFiles([path])
    else:
        place = data.draw(st.integers(0, len(whole) - 1), "byte")
        whole[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
        path.write_bytes(whole)
        with pytest.raises(DataError, match="checksum") as caught:
            all_of(path)
    assert "damaged.tfrecord, record " in caught.value.where


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord.gz"
    path.write_bytes(b"\x1f\x8b" + bytes(30))
    with pytest.raises(DataError, match="compressed"):
        RecordFiles([path])
    path.write_bytes(b"text of some length, but no record\n")
    with pytest.raises(DataError, match="wrong checksum"):
        RecordFiles([path])
    with pytest.raises(DataError, match=r"not a tf\.train\.Example") as caught:
        decode_record(b"\xff\xff", "here")
    assert caught.value.where == "here"
    # What an interrupted writer leaves is no file of the folder.
    (tmp_path / ".b.tfrecord.0123.partial").write_bytes(b"half")
    assert record_files([tmp_path], "train") == [path]
    path.write_bytes(b"")
    assert len(RecordFiles([path])) == 0
    with pytest.raises(IndexError):
        RecordFiles([path])[0]


INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=5)


@settings(max_examples=60)
@given(
    integers=st.dictionaries(st.text(max_size=6), INTEGERS, max_size=3),
    floats=FLOATS,
    texts=st.lists(st.binary(max_size=8), max_size=4),
)
def test_features_come_back(
    integers: dict[str, list[int]], floats: list[float], texts: list[bytes]
) -> None:
    arrays: dict[str, Any] = {k: np.array(v, dtype=np.int64) for k, v in integers.items()}
    arrays[" floats"] = np.array(floats, dtype=np.float32)
    record = encode_record(arrays, {" texts": texts})
    assert record == encode_record(dict(reversed(arrays.items())), {" texts": texts})
    found = decode_record(record, "")
    assert found.pop(" texts", []) == texts
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        values = found[name]
        assert not isinstance(values, list)
        np.testing.assert_array_equal(values, array)
        assert values.dtype == array.dtype or not len(array)


def small(task: str) -> dict[str, Any]:
    """A section of the task's embedded data."""
    by_task: dict[str, dict[str, Any]] = {
        "causal_lm": {"tokenizer": "byte", "embedded_bytes": 20_000, "max_sequence_length": 16},
        "masked_lm": {
            "embedded": "subjects",
            "embedded_bytes": 4_000,
            "vocab_size": 200,
            "max_sequence_length": 16,
        },
        "token_classification": {"tokenizer": "byte", "max_sequence_length": 24},
        "question_answering": {"tokenizer": "byte", "max_sequence_length": 96},
        "summarization": {"tokenizer": "byte", "max_sequence_length": 96, "max_cls_tokens": 5},
        "segmentation": {"image_shape": [8, 12, 1]},
    }
    return by_task[task]


class Few:
    """The first items of a dataset, with all that it knows."""

    def __init__(self, dataset: Any, count: int) -> None:
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


TASKS = [
    ("causal_lm", "GptTfRecordsProcessor"),
    ("masked_lm", "BertTfRecordsProcessor"),
    ("masked_lm", "BertMlmOnlyTfRecordsStaticMaskProcessor"),
    ("token_classification", "NerDataProcessor"),
    ("question_answering", "QuestionAnsweringDataProcessor"),
    ("summarization", "BertSumTfRecordsProcessor"),
    ("segmentation", "UNetTfRecordsProcessor"),
]


@pytest.mark.parametrize(("task", "processor"), TASKS)
@pytest.mark.parametrize("named", [True, False])
def test_records_are_the_items_they_were_made_of(
    task: str, processor: str, named: bool, tmp_path: Path
) -> None:
    section = small(task)
    if processor.startswith("BertMlmOnly"):
        section["disable_nsp"] = True
    if task == "question_answering" and named:
        section["max_sequence_length"] = 64  # some answers are cut off
    original = build_dataset(task, section, "eval")
    files = write_records(
        Few(original, 7),  # type: ignore[arg-type]
        processor,
        tmp_path,
        seed=5,
        records_per_file=3,
    )
    assert [path.name for path in files] == [f"examples-0000{i}.tfrecord" for i in range(3)]
    records = {**section, "data_dir": str(tmp_path)}
    if named:
        records["data_processor"] = processor
    found = build_dataset(task, records, "eval")
    assert found.info.source == "7 records of 3 TFRecord files"
    assert found.info.vocab_size == original.info.vocab_size
    assert found.info.label_names == original.info.label_names
    assert found.info.num_classes == original.info.num_classes
    expected, batch = original.batch(range(7), 5), found.batch(range(7), 0)
    # Which piece of a word counts is not in the documented records: every token does.
    if task == "token_classification":
        expected["loss_mask"] = expected["attention_mask"]
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype, name
        assert torch.equal(batch[name], tensor), name
    assert build_dataset(task, records, "predict").batch([0], 0)["unique_ids"].tolist() == [0]


def test_words_are_masked_anew_in_each_epoch(texts: Path, tmp_path: Path) -> None:
    name = "BertMlmOnlyTfRecordsDynamicMaskProcessor"
    options: dict[str, Any] = {"tokenizer": "wordpiece", "vocab_size": 200, "do_lower": True}
    prepare(
        [texts],
        tmp_path,
        output="tfrecord",
        data_processor=name,
        max_sequence_length=32,
        **options,
    )
    section = {"data_dir": str(tmp_path), "max_sequence_length": 32, "disable_nsp": True}
    dataset = build_dataset("masked_lm", section, "train")
    shards = tmp_path / "shards"
    prepare([texts], shards, **options)
    plain = build_dataset("masked_lm", {**section, "data_dir": str(shards)}, "train")
    assert len(dataset) == len(plain)
    for seed in (1, 2):
        batch, expected = dataset.batch(range(4), seed), plain.batch(range(4), seed)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)
    first, second = (dataset.batch(range(4), seed)["input_ids"] for seed in (1, 2))
    assert not torch.equal(first, second)
    with pytest.raises(ConfigError, match="without next sentences") as caught:
        build_dataset("masked_lm", {**section, "disable_nsp": False}, "train")
    assert caught.value.where == "train_input.disable_nsp"
    with pytest.raises(DataError, match="tokens") as found:
        build_dataset("masked_lm", {**section, "max_sequence_length": 16}, "train")[0]
    assert "record 0" in found.value.where


@pytest.mark.parametrize("tokenizer", ["byte", "wordpiece"])
def test_prepared_text(tokenizer: str, texts: Path, tmp_path: Path) -> None:
    """What is written is what the prepared tokens give; a run with other lengths replaces it."""
    task = "causal_lm" if tokenizer == "byte" else "masked_lm"
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": 200, "eval_fraction": 0.3}
    prepare([texts], tmp_path, output="tfrecord", max_sequence_length=24, **options)
    prepare([texts], tmp_path, output="tfrecord", max_sequence_length=48, **options)
    prepare([texts], tmp_path / "shards", **options)
    section = {"data_dir": str(tmp_path), "max_sequence_length": 48}
    for split, seed in (("train", 1), ("eval", 1)):
        found = build_dataset(task, section, split)  # type: ignore[arg-type]
        plain = {**section, "data_dir": str(tmp_path / "shards")}
        expected = build_dataset(task, plain, split)  # type: ignore[arg-type]
        assert len(found) == len(expected) > 0
        assert found.info.bytes_per_token == expected.info.bytes_per_token > 0.9
        assert found.info.vocab_size == expected.info.vocab_size
        batch, wanted = found.batch(range(len(found)), 0), expected.batch(range(len(found)), seed)
        assert all(torch.equal(batch[key], wanted[key]) for key in wanted)


def test_no_examples_of_other_text_stay(tmp_path: Path) -> None:
    """Files that are there are read; those of an earlier text would be read in silence."""
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("one text, " * 9)
    prepare([text], out, tokenizer="byte", output="tfrecord", max_sequence_length=16)
    assert sorted(out.glob("*.tfrecord"))
    text.write_text("and another one, " * 9)
    prepare([text], out, tokenizer="byte")
    assert not sorted(out.glob("*.tfrecord"))


def test_prepared_text_of_a_layout_that_does_not_fit(texts: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"output": "csv", "data_processor": "GptTfRecordsProcessor"}, "layout of TFRecords"),
        ({"output": "tfrecord", "data_processor": "NerDataProcessor"}, "not made into"),
        ({"output": "tfrecord", "data_processor": "BertTfRecordsProcessor"}, "holds words"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare([texts], tmp_path, tokenizer="byte", max_sequence_length=16, **options)  # type: ignore[arg-type]


def example(folder: Path, **features: Any) -> dict[str, Any]:
    record = encode_record({name: np.array(values) for name, values in features.items()})
    written(folder / "a.tfrecord", [record])
    return {"data_dir": str(folder), "max_sequence_length": 4}


def test_both_kinds_of_masks(tmp_path: Path) -> None:
    """1 on tokens, as most documented files have it, or 1 on padding."""
    ids = [5, 6, 7, 0]
    for mask in ([1, 1, 1, 0], [0, 0, 0, 1]):
        folder = tmp_path / str(mask[0])
        section = example(folder, input_ids=ids, input_mask=mask, labels=[6, 7, 8, 0])
        item = build_dataset("causal_lm", section, "train")[0]
        assert item["attention_mask"].tolist() == [1, 1, 1, 0]
        assert item["input_ids"].dtype == torch.int64


def test_records_of_another_layout(tmp_path: Path) -> None:
    section = example(tmp_path, input_ids=[1, 2, 3, 4], input_mask=[1, 1, 1, 1], label=[0])
    dataset = build_dataset("causal_lm", section, "train")
    with pytest.raises(DataError, match="no feature `labels`") as caught:
        dataset[0]
    assert caught.value.where == f"{tmp_path / 'a.tfrecord'}, record 0"
    assert "input_ids, input_mask, label" in caught.value.hint
    short = build_dataset("causal_lm", {**section, "max_sequence_length": 3}, "train")
    with pytest.raises(DataError, match="`input_ids` has 4 values") as caught:
        short[0]
    assert caught.value.allowed == "3 (int64)"
    assert "max_sequence_length" in caught.value.hint
    words = {**section, "disable_nsp": True, "max_sequence_length": 8}
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    words["data_processor"] = "BertMlmOnlyTfRecordsDynamicMaskProcessor"
    with pytest.raises(DataError, match="no feature list `tokens`"):
        build_dataset("masked_lm", words, "train")[0]
    images = {"data_dir": str(tmp_path / "images"), "image_shape": [1, 2, 1]}
    example(tmp_path / "images", image=[0.5, 0.25], mask=[0.0, 2.0])
    with pytest.raises(DataError, match="class 2"):
        build_dataset("segmentation", images, "train")[0]


def test_where_there_are_no_records(tmp_path: Path, texts: Path) -> None:
    gpt = {"data_dir": str(texts), "data_processor": "GptTfRecordsProcessor"}
    with pytest.raises(DataError, match="no TFRecord files") as caught:
        build_dataset("causal_lm", gpt, "train")
    assert "--output tfrecord" in caught.value.hint
    (tmp_path / "a.tfrecord").write_bytes(b"")
    with pytest.raises(DataError, match="no record"):
        build_dataset("causal_lm", {"data_dir": str(tmp_path)}, "train")
    # A processor of other files reads those.
    text = {"data_dir": str(texts), "data_processor": "GptTextDataProcessor", "tokenizer": "byte"}
    (tmp_path / "text").mkdir()
    assert "tokens of" in build_dataset("causal_lm", text, "train").info.source


def test_labels_of_records(tmp_path: Path) -> None:
    row = {"input_ids": [2, 7, 8, 3, 0, 0, 0, 0], "label_ids": [0, 1, 0, 0, 0, 0, 0, 0]}
    row |= {"input_mask": [1, 1, 1, 1, 0, 0, 0, 0], "segment_ids": [0] * 8}
    section = {**example(tmp_path, **row), "max_sequence_length": 8}
    with pytest.raises(ConfigError, match="names are not known") as caught:
        build_dataset("token_classification", section, "train")
    assert caught.value.where == "train_input.label_vocab_file"
    (tmp_path / "names.json").write_text(json.dumps({"O": 0, "B-X": 1}))
    section["label_vocab_file"] = str(tmp_path / "names.json")
    dataset = build_dataset("token_classification", section, "train")
    assert dataset.info.label_names == ("O", "B-X")
    assert dataset[0]["loss_mask"].tolist() == row["input_mask"]


def test_predictions_without_answers(tmp_path: Path) -> None:
    row = {"input_ids": [2, 7, 3, 0], "input_mask": [1, 1, 1, 0], "segment_ids": [0, 0, 0, 0]}
    section = example(tmp_path, **row, unique_ids=[1000])
    item = build_dataset("question_answering", section, "predict")[0]
    assert item["labels"].tolist() == [0, 0]
    assert item["label_weights"].tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="start_positions"):
        build_dataset("question_answering", section, "eval")[0]


def test_labels_at_every_position(tmp_path: Path) -> None:
    """`gather_mlm_labels: False`, as some heads want them."""
    section = {**small("causal_lm"), "disable_nsp": True}
    original = build_dataset("masked_lm", section, "train")
    write_records(Few(original, 4), "BertMlmOnlyTfRecordsStaticMaskProcessor", tmp_path, seed=3)  # type: ignore[arg-type]
    spread = {**section, "gather_mlm_labels": False}
    found = build_dataset("masked_lm", {**spread, "data_dir": str(tmp_path)}, "train")
    expected = build_dataset("masked_lm", spread, "train").batch(range(4), 3)
    batch = found.batch(range(4), 0)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_an_unknown_layout(tmp_path: Path) -> None:
    dataset = build_dataset("causal_lm", small("causal_lm"), "train")
    with pytest.raises(ConfigError, match="no TFRecords") as caught:
        write_records(dataset, "GptTfRecordProcessor", tmp_path)
    assert "GptTfRecordsProcessor" in caught.value.hint
    assert {layout.task for layout in LAYOUTS.values()} == {task for task, _ in TASKS}
