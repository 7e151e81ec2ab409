"""Files of the fine-tuning tasks: what is read, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openwafer.data import build_dataset, input_dataloader, measure_rate
from openwafer.data.conll import read_conll
from openwafer.data.squad import read_squad
from openwafer.data.summaries import choose_sentences, read_jsonl
from openwafer.data.tsv import read_tsv
from openwafer.errors import ConfigError, DataError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "##s",
    ".",
]


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return str(path)


def test_sst2(tmp_path: Path, vocab: str) -> None:
    (tmp_path / "train.tsv").write_text('sentence\tlabel\na cat "sat\t1\nthe mats .\t0\non\t0\n')
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe cat\t1\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tthe cat\n1\ta mat\n")
    params: dict[str, Any] = {
        "data_processor": "SST2DataProcessor",
        "data_dir": str(tmp_path),
        "vocab_file": vocab,
        "max_sequence_length": 8,
    }
    train = build_dataset("classification", params, "train")
    assert (train.info.label_names, train.info.majority_share) == (("0", "1"), 2 / 3)
    batch = train.example_batch(3)
    assert batch["input_ids"].tolist() == [
        [2, 5, 6, 1, 7, 3, 0, 0],
        [2, 9, 10, 11, 12, 3, 0, 0],
        [2, 8, 3, 0, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 6, 3]
    assert batch["labels"].tolist() == [1, 0, 0]
    assert "is_matched" not in build_dataset("classification", params, "eval").example_batch(1)
    assert len(build_dataset("classification", params, "predict")) == 2


def test_mnli(tmp_path: Path, vocab: str) -> None:
    head = "index\tsentence1\tsentence2\tgold_label\n"
    (tmp_path / "train.tsv").write_text(head + "0\ta cat\tthe mat\tentailment\n1\ta\tthe\t-\n")
    (tmp_path / "dev_matched.tsv").write_text(head + "0\ta\tcat\tneutral\n")
    (tmp_path / "dev_mismatched.tsv").write_text(head + "0\ta\tmat\tcontradiction\n")
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "vocab_file": vocab,
        "max_sequence_length": 8,
    }
    train = build_dataset("classification", params, "train")
    assert len(train) == 1
    assert train[0]["input_ids"].tolist() == [2, 5, 6, 3, 9, 10, 3, 0]
    assert train[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    batch = build_dataset("classification", params, "eval").example_batch(2)
    assert batch["labels"].tolist() == [2, 0]
    assert batch["is_matched"].tolist() == [1, 0]
    assert batch["is_mismatched"].tolist() == [0, 1]


def test_broken_tsv(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na cat\n")
    with pytest.raises(DataError, match="1 columns") as caught:
        read_tsv(path)
    assert caught.value.where == f"{path}:2"
    path.write_text("words\tlabel\na\t1\n")
    with pytest.raises(DataError, match="no column of text"):
        read_tsv(path)
    with pytest.raises(DataError, match="no file of the eval split"):
        build_dataset("classification", {"data_dir": str(tmp_path)}, "eval")


CONLL = "-DOCSTART- -X- O\n\nthe DT O\ncats NN B-ANI\nsat VB O\n\na\tI-ANI\n"


def test_conll(tmp_path: Path, vocab: str) -> None:
    (tmp_path / "train.txt").write_text(CONLL)
    assert read_conll(tmp_path / "train.txt") == [
        (["the", "cats", "sat"], ["O", "B-ANI", "O"]),
        (["a"], ["I-ANI"]),
    ]
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "vocab_file": vocab,
        "max_sequence_length": 8,
    }
    dataset = build_dataset("token_classification", params, "train")
    assert dataset.info.label_names == ("O", "B-ANI", "I-ANI")
    item = dataset[0]
    assert item["input_ids"].tolist() == [2, 9, 6, 11, 7, 3, 0, 0]
    assert item["labels"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    # The second token of a word does not count, nor do cls and sep.
    assert item["loss_mask"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    all_count = build_dataset(
        "token_classification", {**params, "include_padding_in_loss": True}, "train"
    )
    assert all_count[0]["loss_mask"].tolist() == [1] * 8
    path = tmp_path / "train.txt"
    path.write_text("the O\ncat\n")
    with pytest.raises(DataError, match="no label") as caught:
        read_conll(path)
    assert caught.value.where == f"{path}:2"


def test_long_sentences_go_on(tmp_path: Path, vocab: str) -> None:
    (tmp_path / "train.txt").write_text("".join(f"cats B-X{n % 2}\n" for n in range(10)))
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "vocab_file": vocab,
        "max_sequence_length": 9,
    }
    dataset = build_dataset("token_classification", params, "train")
    counted = torch.cat(
        [dataset[i]["labels"][dataset[i]["loss_mask"] == 1] for i in range(len(dataset))]
    )
    assert [dataset.info.label_names[i] for i in counted.tolist()] == ["B-X0", "B-X1"] * 5
    assert len(dataset) == 4


def test_documented_rows_of_labels(tmp_path: Path, vocab: str) -> None:
    labels = tmp_path / "label2id.json"
    labels.write_text(json.dumps({"O": 0, "B": 1}))
    (tmp_path / "part.csv").write_text('tokens,labels\n"[CLS] cat ##s [SEP]","O B B O"\n')
    (tmp_path / "meta.dat").write_text("part.csv 1\n")
    params: dict[str, Any] = {
        "data_processor": "BertTokenClassifierDataProcessor",
        "data_dir": str(tmp_path),
        "vocab_file": vocab,
        "label_vocab_file": str(labels),
        "max_sequence_length": 8,
    }
    item = build_dataset("token_classification", params, "train")[0]
    assert item["input_ids"].tolist() == [2, 6, 11, 3, 0, 0, 0, 0]
    assert item["labels"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert item["loss_mask"].tolist() == item["attention_mask"].tolist() == [1] * 4 + [0] * 4
    (tmp_path / "part.csv").write_text("tokens,labels\ncat,X\n")
    with pytest.raises(DataError, match="unknown label") as caught:
        build_dataset("token_classification", {**params, "max_sequence_length": 9}, "train")
    assert caught.value.where.endswith("part.csv:2")


def squad_file(path: Path, context: str, questions: list[dict[str, Any]]) -> Path:
    path.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": context, "qas": questions}]}]})
    )
    return path


CONTEXT = "On Monday the old cat sat on a mat. Later, in the evening, the dog ate a bone in Oslo."


def test_squad_windows_hold_the_answer(tmp_path: Path) -> None:
    """In every window the labels point at the answer's own words, and each text is read whole."""
    questions = [
        {"id": "q1", "question": "who sat ?", "answers": [{"text": "old cat", "answer_start": 14}]},
        {
            "id": "q2",
            "question": "where ?",
            "answers": [{"text": "Oslo", "answer_start": CONTEXT.index("Oslo")}],
        },
        {"id": "q3", "question": "why ?", "is_impossible": True, "answers": []},
    ]
    squad_file(tmp_path / "train-v2.json", CONTEXT, questions)
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "tokenizer": "byte",
        "do_lower": False,
        "max_sequence_length": 48,
        "doc_stride": 11,
    }
    dataset: Any = build_dataset("question_answering", params, "train")
    answered: dict[str, int] = {}
    for index in range(len(dataset)):
        item = dataset[index]
        start, end = item["labels"].tolist()
        window = dataset.answers._windows[index]
        name = ("q1", "q2", "q3")[window.example]
        if (start, end) == (0, 0):
            continue
        answered[name] = answered.get(name, 0) + 1
        text = dataset.info.tokenizer.decode(item["input_ids"][start : end + 1].numpy())
        assert text == {"q1": "old cat", "q2": "Oslo"}[name]
        starts, ends = torch.zeros(48), torch.zeros(48)
        starts[start], ends[end] = 9.0, 9.0
        assert dataset.answers.best(index, starts, ends)[:2] == (name, text)
    assert set(answered) == {"q1", "q2"}
    assert max(answered.values()) > 1
    # Where no answer is likeliest, and some questions have none, there is none.
    starts = torch.zeros(48)
    starts[0] = 20.0
    assert dataset.answers.best(0, starts, starts)[1] == ""


def test_best_answers_against_every_pair(tmp_path: Path) -> None:
    squad_file(
        tmp_path / "train.json",
        CONTEXT,
        [{"id": "q", "question": "who ?", "answers": [{"text": "old cat", "answer_start": 14}]}],
    )
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "tokenizer": "byte",
        "max_sequence_length": 64,
        "max_answer_length": 5,
    }
    dataset: Any = build_dataset("question_answering", params, "train")
    generator = torch.Generator().manual_seed(0)
    for index in range(len(dataset)):
        starts, ends = torch.randn(2, 64, generator=generator)
        window = dataset.answers._windows[index]
        size = len(window.offsets)
        best = max(
            (float(starts[window.first + i].double() + ends[window.first + j].double()), i, j)
            for i in range(size)
            for j in range(i, min(size, i + 5))
        )
        _, text, score = dataset.answers.best(index, starts, ends)
        assert score == pytest.approx(best[0])
        assert text == CONTEXT[window.offsets[best[1], 0] : window.offsets[best[2], 1]]


def test_broken_squad(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"data": [\n{"paragraphs": ]')
    with pytest.raises(DataError, match="not JSON") as caught:
        read_squad(path)
    assert caught.value.where == f"{path}:2"
    squad_file(path, "a cat", [{"id": "q", "question": "who ?", "answers": [{"text": "cat"}]}])
    with pytest.raises(DataError, match="answer_start") as caught:
        read_squad(path)
    assert "data[0].paragraphs[0].qas[0].answers[0]" in caught.value.where
    squad_file(
        path,
        "a cat",
        [{"id": "q9", "question": "?", "answers": [{"text": "cat", "answer_start": 1}]}],
    )
    with pytest.raises(DataError, match="not at character 1") as caught:
        build_dataset(
            "question_answering", {"data_dir": str(tmp_path), "tokenizer": "byte"}, "train"
        )
    assert "q9" in caught.value.where


def test_squad_rows(tmp_path: Path) -> None:
    row = '"[2, 5, 3, 6]","[1, 1, 1, 1]","[0, 0, 0, 1]",'
    rows = f"{row}3,3,7\n{row},,8\n"
    head = "input_ids,input_mask,segment_ids,start_position,end_position,unique_id\n"
    (tmp_path / "a.csv").write_text(head + rows)
    (tmp_path / "meta.dat").write_text("a.csv 2\n")
    params: dict[str, Any] = {"data_processor": "BertQADataProcessor", "data_dir": str(tmp_path)}
    with pytest.raises(DataError, match="4 values") as caught:
        build_dataset("question_answering", {**params, "max_sequence_length": 8}, "train")[0]
    assert caught.value.where.endswith("a.csv:2")
    (tmp_path / "a.csv").write_text(head + rows.replace("]", ", 0, 0, 0, 0]"))
    batch = build_dataset(
        "question_answering", {**params, "max_sequence_length": 8}, "eval"
    ).example_batch(2)
    assert batch["labels"].tolist() == [[3, 3], [0, 0]]
    assert batch["label_weights"].tolist() == [[1, 1], [0, 0]]


def test_summaries(tmp_path: Path, vocab: str) -> None:
    lines = [
        {"sentences": ["a cat sat .", "on the mat", "the cats"], "labels": [1, 0, 1]},
        {"sentences": ["a mat", "the cat sat"], "summary": "the cat sat on"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    params: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "vocab_file": vocab,
        "max_sequence_length": 12,
        "max_cls_tokens": 4,
    }
    batch = build_dataset("summarization", params, "train").example_batch(2)
    # The third sentence does not fit into twelve tokens.
    assert batch["cls_indices"].tolist() == [[0, 6, 0, 0], [0, 4, 0, 0]]
    assert batch["cls_weights"].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert batch["input_ids"][0].tolist() == [2, 5, 6, 7, 12, 3, 2, 8, 9, 10, 3, 0]
    assert batch["token_type_ids"][0].tolist() == [0] * 6 + [1] * 5 + [0]
    path.write_text('{"sentences": ["a"], "labels": [1, 0]}\n')
    with pytest.raises(DataError, match="1 sentences and 2 labels") as caught:
        read_jsonl(path)
    assert caught.value.where == f"{path}:1"


def test_chosen_sentences_are_the_best_ones() -> None:
    sentences = ["red apples fall", "green pears", "red apples", "blue plums fall"]
    assert choose_sentences(sentences, "red apples fall far") == [1, 0, 0, 0]
    assert choose_sentences(sentences, "green pears and blue plums") == [0, 1, 0, 1]
    assert choose_sentences(sentences, "nothing") == [0, 0, 0, 0]


def test_rows_of_summaries(tmp_path: Path) -> None:
    row = '"[2, 5, 3, 2, 6, 3]","[1, 0]","[0, 0, 0, 1, 1, 1]","[0, 3]"'
    head = "input_token_ids,labels,segment_ids,cls_indices"
    (tmp_path / "a.csv").write_text(f"{head}\n{row}\n")
    params: dict[str, Any] = {
        "data_processor": "BertSumCSVDataProcessor",
        "data_dir": str(tmp_path),
        "max_sequence_length": 8,
        "max_cls_tokens": 3,
    }
    item = build_dataset("summarization", params, "train")[0]
    assert item["cls_weights"].tolist() == [1, 1, 0]
    assert item["attention_mask"].tolist() == [1] * 6 + [0, 0]


def test_translation_files(tmp_path: Path) -> None:
    words = ["<pad>", "</s>", "<unk>", "<s>", "ja", "nein", "yes", "no"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "de").write_text("ja nein\nnein\nja ja ja ja ja ja ja ja ja\n")
    (tmp_path / "en").write_text("yes no\nno\nyes\n")
    params: dict[str, Any] = {
        "data_processor": "TransformerDynamicDataProcessor",
        "src_data_dir": str(tmp_path / "de"),
        "tgt_data_dir": str(tmp_path / "en"),
        "vocab_file": str(tmp_path / "vocab.txt"),
        "src_max_sequence_length": 5,
        "tgt_max_sequence_length": 4,
    }
    batch = build_dataset("translation", params, "train").example_batch(2)
    assert batch["input_ids"].tolist() == [[4, 5, 1, 0, 0], [5, 1, 0, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[3, 6, 7, 0], [3, 7, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 1, 0], [7, 1, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    (tmp_path / "en").write_text("yes no\n")
    with pytest.raises(DataError, match="3 source lines and 1"):
        build_dataset("translation", {**params, "batch_size": 1, "do_lower": True}, "train")
    (tmp_path / "pairs.tsv").write_text("ja\tyes\nnein\n")
    tsv = {"data_dir": str(tmp_path / "pairs.tsv"), "vocab_file": params["vocab_file"]}
    with pytest.raises(DataError, match="1 parts") as caught:
        build_dataset("translation", tsv, "train")
    assert caught.value.where.endswith("pairs.tsv:2")
    with pytest.raises(ConfigError, match="without targets"):
        build_dataset("translation", {**params, "tgt_data_dir": None}, "train")


def test_rate_counts_samples_and_bytes() -> None:
    params = {"image_shape": [4, 4, 1], "batch_size": 10}
    rate = measure_rate(input_dataloader("segmentation", params, "train"), max_batches=6)
    assert rate.num_batches == 5
    assert rate.samples_per_sec * rate.seconds == pytest.approx(50)
    assert rate.bytes_per_sec / rate.samples_per_sec == pytest.approx(16 * 4 + 16 * 8)
    assert str(rate).startswith("input pipeline: ")
    alone = measure_rate([(torch.zeros(3, 2), [torch.zeros(3)])])
    assert alone.num_batches == 1
    assert alone.samples_per_sec * alone.seconds == pytest.approx(3)


@pytest.mark.slow
def test_digits_are_whole_and_apart() -> None:
    parts = [build_dataset("digits", {}, split) for split in ("train", "eval")]
    assert [len(part) for part in parts] == [1437, 360]
    batch = parts[0].example_batch(4)
    assert batch["images"].shape[0] == 4
    assert 0 <= float(batch["images"].min()) <= float(batch["images"].max()) <= 1
    images = [part.batch(np.arange(len(part)), 0)["images"].flatten(1) for part in parts]
    assert not {tuple(row.tolist()) for row in images[1][:50]} <= {
        tuple(r.tolist()) for r in images[0]
    }
