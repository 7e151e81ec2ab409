"""`openwafer prepare records MODEL`, and training on what it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from openwafer.cli import main
from openwafer.data import build_dataset
from openwafer.data.prepare import prepare
from openwafer.errors import ConfigError, DataError
from openwafer.zoo.catalog import load
from openwafer.zoo.records import write_model_records

WORDS = ("Anna B-PER", "lives O", "in O", "Bern B-LOC", ". O")


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """CoNLL files of twelve and four sentences."""
    folder = tmp_path / "conll"
    folder.mkdir()
    for name, count in (("train", 12), ("dev", 4)):
        lines = ["\n".join([f"{n} O", *WORDS[n % 4 :]]) + "\n\n" for n in range(count)]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def last_loss(text: str) -> str:
    return next(line for line in reversed(text.splitlines()) if "Loss=" in line).split()[-2]


def test_a_model_trains_on_its_records_as_on_its_data(
    sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"{section}.tokenizer=byte" for section in ("train_input", "eval_input")]
    changes += [f"{section}.vocab_size=null" for section in ("train_input", "eval_input")]
    data = [f"{section}.data_dir={sentences}" for section in ("train_input", "eval_input")]
    out = tmp_path / "records"
    command = ["prepare", "records", "bert_ner/tiny", "--out", str(out)]
    assert main([*command, "--set", *changes, *data]) == 0
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        "examples-00000.tfrecord",
        "labels.json",
        "meta.json",
        "tokenizer.json",
    ]
    losses: list[str] = []
    processor = ["train_input.data_processor=NerDataProcessor", "train_input.shuffle_seed=1"]
    # All tokens count in records; in CoNLL files the first piece of each word.
    every = ["train_input.include_padding_in_loss=True", "eval_input.include_padding_in_loss=True"]
    for number, folder in enumerate((sentences, out)):
        run = ["train", "bert_ner/tiny", "--data_dir", str(folder), "--max_steps", "2", "--cpu"]
        run += ["--batch_size", "4", "-o", str(tmp_path / f"run{number}")]
        capsys.readouterr()
        assert main([*run, "--set", "runconfig.log_steps=2", *processor, *changes, *every]) == 0
        losses.append(last_loss(capsys.readouterr().out))
    assert losses[0] == losses[1]


def test_records_know_the_bytes_of_their_tokens(tmp_path: Path) -> None:
    """So that bits per byte are those of the text, whatever the data are read from."""
    changes = [f"{split}_input.embedded_bytes=20000" for split in ("train", "eval")]
    write_model_records("gpt2/tiny", tmp_path, overrides=changes)
    section = load("gpt2/tiny", changes).raw["eval_input"]
    expected = build_dataset("causal_lm", section, "eval").info.bytes_per_token
    assert expected > 0.9
    read = {**section, "data_dir": str(tmp_path)}
    assert build_dataset("causal_lm", read, "eval").info.bytes_per_token == expected
    of_others, broken = (shutil.copytree(tmp_path / "eval", tmp_path / name) for name in "ab")
    (of_others / "meta.json").write_text('{"format": "another"}')
    read["data_dir"] = str(of_others)
    assert build_dataset("causal_lm", read, "eval").info.bytes_per_token == 0
    (broken / "meta.json").write_text('{"format": "openwafer-records"}')
    with pytest.raises(DataError, match="write the records again") as caught:
        build_dataset("causal_lm", {**read, "data_dir": str(broken)}, "eval")
    assert caught.value.where == str(broken / "meta.json")


def test_prepared_text_is_not_replaced(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text, " * 50)
    prepare([text], tmp_path / "out" / "train", tokenizer="byte")
    with pytest.raises(ConfigError, match="prepare text"):
        write_model_records("gpt2/tiny", tmp_path / "out")


def test_what_has_no_records(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"release 1\.6 has no TFRecords of t5/tiny"):
        write_model_records("t5/tiny", tmp_path)
    with pytest.raises(ConfigError, match="are not made into") as caught:
        write_model_records("gpt2/tiny", tmp_path, processor="BertTfRecordsProcessor")
    assert caught.value.allowed == "GptTfRecordsProcessor"
    with pytest.raises(ConfigError, match="no `token_type_ids`"):
        write_model_records(
            "linformer/tiny",
            tmp_path,
            overrides=[f"{s}_input.embedded_bytes=4000" for s in ("train", "eval")],
            processor="BertTfRecordsProcessor",
        )
