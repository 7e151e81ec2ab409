"""Prepared text: complete, resumable, the same however it is cut, damaged files refused."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openwafer.data import build_dataset
from openwafer.data.prepare import prepare
from openwafer.data.text_files import documents_of, documents_of_range, sentences_of
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.errors import ConfigError, DataError

EOS = 1


def documents_in(folder: Path) -> list[str]:
    """The documents of prepared tokens, decoded."""
    shards, tokenizer = TokenShards(folder), load_tokenizer(folder)
    starts = shards.starts("documents").tolist()
    return [tokenizer.decode(shards.read(begin, end - begin)) for begin, end in pairwise(starts)]


def test_documents_come_back(texts: Path, tmp_path: Path) -> None:
    originals = [path.read_text() for path in sorted(texts.iterdir())]
    for tokenizer, size in (("byte", 1), ("bpe", 1 << 14)):
        out = tmp_path / tokenizer
        result = prepare([texts], out, tokenizer=tokenizer, vocab_size=300, shard_bytes=700 * size)
        assert documents_in(out) == originals
        shards = TokenShards(out)
        assert result.num_tokens == shards.num_tokens
        assert result.num_bytes == shards.num_bytes == sum(len(t.encode()) for t in originals)
        assert result.num_documents == len(originals)
        ends = shards.starts("documents")[1:] - 1
        assert [int(shards.read(int(end), 1)[0]) for end in ends] == [EOS] * len(originals)
        assert "12 documents" in str(result)
    assert result.num_shards == 1


def test_sentences_are_kept_for_wordpiece(texts: Path, tmp_path: Path) -> None:
    prepare([texts], tmp_path, tokenizer="wordpiece", vocab_size=200, do_lower=True)
    shards, tokenizer = TokenShards(tmp_path), load_tokenizer(tmp_path)
    starts = shards.starts("sentences").tolist()
    first = [tokenizer.decode(shards.read(a, b - a)) for a, b in pairwise(starts[:3])]
    assert first[1] == "the cat0 sat on the mat."
    assert set(shards.starts("documents").tolist()) <= set(starts)


@given(
    documents=st.lists(
        st.text(st.sampled_from("ab é\n"), max_size=12).filter(str.strip), min_size=1, max_size=5
    ),
    size=st.integers(1, 40),
    cut=st.sampled_from(["lines", "blank_lines"]),
)
@settings(max_examples=60)
def test_ranges_of_a_file_give_each_document_once(
    documents: list[str], size: int, cut: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8", newline="")
    length = path.stat().st_size
    whole = list(documents_of(path, cut))
    parts = [
        document
        for start in range(0, length, size)
        for document in documents_of_range(path, start, min(start + size, length), cut)
    ]
    assert [d.strip() for d in parts] == [d.strip() for d in whole]


@given(text=st.text(st.sampled_from("ab \n\r\t"), max_size=30))
def test_sentences_are_the_document(text: str) -> None:
    sentences = sentences_of(text)
    assert "".join(sentences) == text
    assert all(sentence.strip() for sentence in sentences[1:]) or not text.strip()


def test_held_out_documents_are_nowhere_else(texts: Path, tmp_path: Path) -> None:
    prepare([texts], tmp_path, tokenizer="byte", eval_fraction=0.3)
    train, held_out = documents_in(tmp_path / "train"), documents_in(tmp_path / "eval")
    originals = sorted(path.read_text() for path in texts.iterdir())
    assert sorted(train + held_out) == originals
    assert 0 < len(held_out) < len(train)
    dataset = build_dataset(
        "causal_lm", {"data_dir": str(tmp_path), "max_sequence_length": 8}, "eval"
    )
    assert "eval" in dataset.info.source


def test_a_killed_run_goes_on(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole shards are not made again; the result is that of a run that was not killed."""
    module = sys.modules["openwafer.data.tokenized_text"]
    real, made = module.write_shard, []

    def dying(folder: Path, name: str, **kwargs: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(name)
        return real(folder, name, **kwargs)

    options: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 290, "shard_bytes": 700}
    monkeypatch.setattr(module, "write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], tmp_path / "out", **options)
    with pytest.raises(DataError, match="not a folder of tokens"):
        TokenShards(tmp_path / "out")
    monkeypatch.setattr(module, "write_shard", real)
    result = prepare([texts], tmp_path / "out", **options)
    assert result.num_skipped_shards == 3 < result.num_shards
    prepare([texts], tmp_path / "whole", **options)
    for path in (tmp_path / "whole").glob("tokens-*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert prepare([texts], tmp_path / "out", **options).num_skipped_shards == result.num_shards
    changed = prepare([texts], tmp_path / "out", **{**options, "shard_bytes": 1500})
    assert changed.num_skipped_shards == 0
    assert documents_in(tmp_path / "out") == documents_in(tmp_path / "whole")


@pytest.mark.slow
def test_processes_write_the_same(texts: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        out = tmp_path / str(number)
        prepare([texts], out, tokenizer="byte", shard_bytes=500, num_workers=number)
    assert documents_in(tmp_path / "1") == documents_in(tmp_path / "2")


def test_damaged_shards_are_refused(texts: Path, tmp_path: Path) -> None:
    prepare([texts], tmp_path, tokenizer="byte")
    path = tmp_path / "tokens-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="bytes") as caught:
        TokenShards(tmp_path)
    assert caught.value.where == str(path)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        TokenShards(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "tokens-00000.documents").write_bytes(b"")
    with pytest.raises(DataError, match="starts of documents"):
        TokenShards(tmp_path).starts("documents")
    # The hint keeps its promise: prepared again, it is whole.
    assert prepare([texts], tmp_path, tokenizer="byte").num_skipped_shards == 0
    assert len(TokenShards(tmp_path).starts("documents")) == 13
    meta = tmp_path / "meta.json"
    meta.write_text(meta.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match="version 2"):
        TokenShards(tmp_path)


@given(data=st.data())
@settings(max_examples=30)
def test_tokens_are_read_across_shards(data: st.DataObject, own_cache: Path) -> None:
    folder = own_cache / "across"
    if not folder.exists():
        source = own_cache / "across.txt"
        source.write_text("".join(f"line {n}\n" for n in range(40)))
        prepare([source], folder, tokenizer="byte", documents="lines", shard_bytes=37)
    shards = TokenShards(folder)
    whole = np.concatenate([shards.read(i, 1) for i in range(shards.num_tokens)])
    start = data.draw(st.integers(0, shards.num_tokens))
    count = data.draw(st.integers(0, shards.num_tokens - start))
    np.testing.assert_array_equal(shards.read(start, count), whole[start : start + count])


def test_wrong_text_is_said_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("gut\nsch\u00f6n\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8") as caught:
        prepare([path], tmp_path / "out", tokenizer="byte")
    assert caught.value.where == f"{path}:2"
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "good"}\n{"txet": "bad"}\n')
    with pytest.raises(DataError, match="no text in this line") as caught:
        prepare([path], tmp_path / "out", tokenizer="byte")
    assert caught.value.where == f"{path}:2"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no text file"):
        prepare([empty], tmp_path / "out", tokenizer="byte")
    with pytest.raises(ConfigError, match="documents"):
        prepare([path], tmp_path / "out", documents="words")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eval_fraction"):
        prepare([path], tmp_path / "out", eval_fraction=1.0)


def test_hdf5_layout(texts: Path, tmp_path: Path) -> None:
    """The documented layout, written and read back: the same examples as from the shards."""
    prepare([texts], tmp_path, tokenizer="byte", output="hdf5", max_sequence_length=32)
    with h5py.File(next(tmp_path.glob("*.h5"))) as file:
        count = int(file.attrs["n_examples"])
        assert np.asarray(file[f"example_{count - 1}"]).shape == (3, 32)
    shards = tmp_path / "shards"
    prepare([texts], shards, tokenizer="byte")
    params: dict[str, Any] = {"max_sequence_length": 32}
    hdf5 = {**params, "data_dir": str(tmp_path), "data_processor": "GptHDF5DataProcessor"}
    first = build_dataset("causal_lm", hdf5, "train")
    second = build_dataset("causal_lm", {**params, "data_dir": str(shards)}, "train")
    assert len(first) == len(second) == count
    one, other = first.batch([0, count - 1], 0), second.batch([0, count - 1], 0)
    assert all((one[name] == other[name]).all() for name in other)
    with pytest.raises(DataError, match="max_sequence_length") as caught:
        build_dataset("causal_lm", {**hdf5, "max_sequence_length": 16}, "train")[0]
    assert "example_0" in caught.value.where


def test_bert_csv_layout(texts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tokenizer": "wordpiece",
        "vocab_size": 200,
        "max_sequence_length": 32,
    }
    prepare([texts], tmp_path, do_lower=True, output="csv", **options)
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "data_processor": "BertCSVDynamicMaskDataProcessor",
        "max_sequence_length": 32,
        "max_predictions_per_seq": 5,
        "dynamic_mlm_scale": True,
    }
    dataset = build_dataset("masked_lm", params, "train")
    name, number = (tmp_path / "meta.dat").read_text().split()
    assert (tmp_path / name).is_file()
    assert len(dataset) == int(number)
    batch = dataset.example_batch(4)
    mask = batch["masked_lm_mask"]
    original = batch["input_ids"].clone()
    for row in range(4):
        places = batch["masked_lm_positions"][row][mask[row] == 1]
        original[row, places] = batch["labels"][row][mask[row] == 1]
    tokenizer = load_tokenizer(tmp_path)
    assert (original[:, 0] == tokenizer.ids.cls).all()
    assert ((original == tokenizer.ids.sep).sum(dim=1) == 2).all()
    assert float(batch["mlm_loss_scale"][0]) == pytest.approx(4 / int(mask.sum()))
    assert set(batch["next_sentence_label"].flatten().tolist()) <= {0, 1}
    (tmp_path / "meta.dat").write_text(f"{name} {int(number) + 1}\n")
    with pytest.raises(DataError, match="rows"):
        build_dataset("masked_lm", {**params, "masked_lm_prob": 0.2}, "train")
