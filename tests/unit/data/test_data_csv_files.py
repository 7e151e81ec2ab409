"""CSV rows at random places, against Python's own reader."""

from __future__ import annotations

import csv
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.data import build_dataset, csv_files
from openwafer.data.csv_files import CsvRows, integers_of
from openwafer.errors import ConfigError, DataError

CELLS = st.text(st.sampled_from('ab,"\n é'), max_size=6)


@settings(max_examples=50)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), block=st.integers(1, 20))
def test_any_row_by_its_number(
    rows: list[tuple[str, str]], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("x", "y"), *rows])
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", block)
        found = CsvRows([path], ("x",))
    assert [tuple(found[i].values()) for i in range(len(found))] == rows
    assert found.where(0) == f"{path}:2"


def test_several_files_and_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    (tmp_path / "b.csv").write_text("x\n3")
    (tmp_path / "meta.dat").write_text("b.csv 1\na.csv 2\n")
    rows = CsvRows([tmp_path], ("x",))
    assert rows[1] == {"x": "1"}
    copy = pickle.loads(pickle.dumps(rows))
    assert [copy[i]["x"] for i in range(3)] == ["3", "1", "2"]
    assert rows.where(2) == f"{tmp_path / 'a.csv'}:3"


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,2\n3\n")
    rows = CsvRows([path], ())
    with pytest.raises(DataError, match="1 columns") as caught:
        rows[1]
    assert caught.value.where == f"{path}:3"
    with pytest.raises(DataError, match="no column z"):
        CsvRows([path], ("z",))
    meta = tmp_path / "meta.dat"
    for content, message in (
        ("a.csv\n", "not a file"),
        ("none.csv 3\n", "there is no"),
        ("a.csv 9\n", "2 rows"),
    ):
        meta.write_text(content)
        with pytest.raises(DataError, match=message):
            CsvRows([tmp_path], ())
    with pytest.raises(DataError, match="whole numbers") as caught:
        integers_of("[1, b]", "here:1")
    assert caught.value.where == "here:1"
    assert integers_of("[1, 22]", "").tolist() == integers_of("1 22", "").tolist() == [1, 22]


def masked_rows(tmp_path: Path, **more: Any) -> dict[str, Any]:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    return {
        "data_dir": str(tmp_path),
        "max_sequence_length": 8,
        "max_predictions_per_seq": 2,
        **more,
    }


def test_rows_that_were_masked_when_written(tmp_path: Path) -> None:
    values = {
        "input_ids": "[2, 4, 5, 3, 6, 3, 0, 0]",
        "attention_mask": "[1, 1, 1, 1, 1, 1, 0, 0]",
        "labels": "[5, 0]",
        "masked_lm_weights": "[1, 0]",
        "masked_lm_positions": "[1, 0]",
        "token_type_ids": "[0, 0, 0, 0, 1, 1, 0, 0]",
        "next_sentence_label": "[1]",
    }
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([list(values), list(values.values())])
    params = masked_rows(tmp_path, data_processor="BertCSVDataProcessor")
    item = build_dataset("masked_lm", params, "train")[0]
    assert item["input_ids"].tolist() == [2, 4, 5, 3, 6, 3, 0, 0]
    assert item["next_sentence_label"].tolist() == [1]
    assert item["masked_lm_mask"].tolist() == [1, 0]
    wrong = build_dataset("masked_lm", {**params, "max_predictions_per_seq": 3}, "train")
    with pytest.raises(DataError, match="2 values") as caught:
        wrong[0]
    assert caught.value.where.endswith("a.csv:2")


def test_rows_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "tokens,segment_ids,is_random_next\n"
        "\"['[CLS]', 'a', '[SEP]', 'b', '[SEP]']\",\"[0, 0, 0, 1, 1]\",True\n"
        "[CLS] b [SEP] x [SEP],0 0 0 1 1,0\n"
        "\"['a', b\",[0],0\n"
    )
    dataset = build_dataset("masked_lm", masked_rows(tmp_path, masked_lm_prob=0.0), "train")
    batch = dataset.batch([0, 1], 3)
    assert batch["next_sentence_label"].tolist() == [[1], [0]]
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert batch["labels"][1, 0] in (6,)  # the only word that is known and not special
    with pytest.raises(DataError, match="not a list of tokens") as caught:
        dataset[2]
    assert caught.value.where.endswith("a.csv:4")
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match="vocabulary"):
        build_dataset("masked_lm", {"data_dir": str(tmp_path / "a.csv")}, "eval")
