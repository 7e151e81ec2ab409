"""Likelihood, SQuAD and ROUGE metrics against slow or published values; predictions to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from openwafer.errors import ConfigError
from openwafer.frontends.torch.capture import capture_step, flatten_batch
from openwafer.frontends.torch.metrics import (
    AccuracyMetric,
    BitsPerByteMetric,
    BitsPerTokenMetric,
    F1Metric,
    PerplexityMetric,
    PredictionWriter,
    RougeScoreMetric,
    SquadMetric,
    compute_all_metrics,
    forget_all_metrics,
    reset_all_metrics,
)
from openwafer.frontends.torch.metrics.text_scores import (
    exact_match,
    normalized_answer,
    rouge_l,
    rouge_n,
    rouge_words,
    word_f1,
)
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import compile_layers
from openwafer.runtime.randomness import DrawKey


@pytest.fixture(autouse=True)
def no_metrics() -> Iterator[None]:
    forget_all_metrics()
    yield
    forget_all_metrics()


@given(
    batches=st.lists(
        st.lists(st.tuples(st.floats(0, 9), st.booleans()), min_size=1, max_size=7),
        min_size=1,
        max_size=4,
    )
)
def test_likelihoods_are_of_all_tokens(batches: list[list[tuple[float, bool]]]) -> None:
    """Not means of batch means: batches of different sizes and paddings weigh as their tokens."""
    metrics = (PerplexityMetric(), BitsPerTokenMetric(), BitsPerByteMetric(2.5))
    counted: list[float] = []
    for batch in batches:
        losses, keep = (torch.tensor(column) for column in zip(*batch, strict=True))
        for metric in metrics:
            metric(torch.zeros(1, len(batch)), (losses * keep).sum(), weights=keep.float()[None])
        counted += losses[keep].tolist()
    mean = sum(counted) / len(counted) if counted else None
    expected = (
        [math.exp(mean), mean / math.log(2), mean / math.log(2) / 2.5]
        if mean is not None
        else [0.0] * 3
    )
    for metric, value in zip(metrics, expected, strict=True):
        assert metric.compute() == pytest.approx(value, rel=1e-4, abs=1e-6)
    forget_all_metrics()


def test_perplexity_of_a_broken_model_is_infinite() -> None:
    perplexity = PerplexityMetric()
    perplexity(torch.zeros(1), torch.tensor(5000.0))
    assert perplexity.compute() == math.inf
    with pytest.raises(ConfigError, match="bytes per token"):
        BitsPerByteMetric(0.0)


def test_weighted_accuracy_is_the_masked_one() -> None:
    accuracy = AccuracyMetric("accuracy_masked_lm")
    labels, predictions = torch.tensor([[4, 5, 0], [6, 0, 0]]), torch.tensor([[4, 9, 0], [6, 0, 0]])
    accuracy(labels=labels, predictions=predictions, weights=torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert accuracy.compute() == pytest.approx(2 / 3)
    accuracy.set_metric_state({"total_correct": 1.0, "total": 4.0})
    assert accuracy.compute() == 0.25
    with pytest.raises(ConfigError, match="total_corect"):
        accuracy.set_metric_state({"total_corect": 1.0})


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


def subsequences(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {c for n in range(len(words) + 1) for c in combinations(words, n)}


@given(first=WORDS, second=WORDS)
def test_rouge_against_all_subsequences(first: list[str], second: list[str]) -> None:
    longest = max(len(common) for common in subsequences(first) & subsequences(second))
    total = len(first) + len(second)
    assert rouge_l(first, second) == pytest.approx(2 * longest / total if longest else 0.0)
    for n in (1, 2):
        ours = [tuple(first[i : i + n]) for i in range(len(first) - n + 1)]
        theirs = [tuple(second[i : i + n]) for i in range(len(second) - n + 1)]
        left = list(theirs)
        common = 0
        for gram in ours:
            if gram in left:
                left.remove(gram)
                common += 1
        expected = 2 * common / (len(ours) + len(theirs)) if common else 0.0
        assert rouge_n(first, second, n) == pytest.approx(expected)


def test_rouge_of_the_paper() -> None:
    """Lin (2004), section 3.1: `police killed the gunman` against two candidates."""
    reference = rouge_words("police killed the gunman")
    assert rouge_l(rouge_words("Police kill the gunman."), reference) == pytest.approx(0.75)
    assert rouge_l(rouge_words("the gunman kill police"), reference) == pytest.approx(0.5)


def test_answers_of_squad() -> None:
    assert normalized_answer("The  Old, cat!") == "old cat"
    assert exact_match("the old cat", ["a dog", "Old cat."]) == 1.0
    assert exact_match("old cats", ["old cat"]) == 0.0
    assert word_f1("the old grey cat", ["old cat", "dog"]) == pytest.approx(2 * 2 / 5)
    assert (exact_match("", []), word_f1("", []), word_f1("cat", [])) == (1.0, 1.0, 0.0)


class FakeAnswers:
    """Item n is window n of question n // 2; the answer is the words between the highest logits."""

    references: Mapping[str, Sequence[str]] = {"q0": ["red"], "q1": ["blue sky"], "q2": []}
    words = ("red", "green", "blue", "sky")

    def best(
        self, unique_id: int, start: torch.Tensor, end: torch.Tensor
    ) -> tuple[str, str, float]:
        first, last = int(start.argmax()), int(end.argmax())
        score = float(start.max() + end.max())
        return f"q{unique_id // 2}", " ".join(self.words[first : last + 1]), score


def test_questions_count_once_by_their_best_window() -> None:
    metrics = [SquadMetric(FakeAnswers(), kind) for kind in ("exact_match", "f1")]  # type: ignore[arg-type]
    logits = torch.eye(4)
    for ids, starts, ends in (
        ([0, 1], logits[[0, 1]], 2 * logits[[0, 1]] * torch.tensor([[1.0], [0.1]])),
        ([2, 3], logits[[2, 0]], logits[[2, 0]] * torch.tensor([[3.0], [1.0]])),
        ([-1], logits[[3]], logits[[3]]),
    ):
        for metric in metrics:
            metric(torch.tensor(ids), starts, ends)
    assert metrics[0].compute() == 0.5
    assert metrics[1].compute() == pytest.approx((1 + 2 / 3) / 2)
    assert metrics[0].num_updates == 3


def test_rouge_of_chosen_sentences() -> None:
    # cls 1, sep 2; sentences (5 6), (7), (8 9); a second row only fills the batch.
    ids = torch.tensor([[1, 5, 6, 2, 1, 7, 2, 1, 8, 9, 2, 0], [0] * 12])
    mask = (ids > 0).long()
    indices = torch.tensor([[0, 4, 7, 0], [0] * 4])
    weights = torch.tensor([[1.0, 1, 1, 0], [0] * 4])
    labels = torch.tensor([[1, 0, 1, 0], [0] * 4])
    logits = torch.tensor([[0.9, 0.8, -1.0, 5.0], [0] * 4])
    rouge = [RougeScoreMetric(kind, num_sentences=2) for kind in ("rouge1", "rouge2", "rougeL")]  # type: ignore[arg-type]
    for metric in rouge:
        metric(labels, indices, weights, ids, mask, logits)
    # 5 6 7 against 5 6 8 9.
    assert rouge[0].compute() == pytest.approx(2 * 2 / 7)
    assert rouge[1].compute() == pytest.approx(2 * 1 / 5)
    assert rouge[2].compute() == pytest.approx(2 * 2 / 7)
    with pytest.raises(ConfigError, match="kind"):
        RougeScoreMetric("rouge3")  # type: ignore[arg-type]


def test_predictions_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "predict" / "predictions.jsonl"
    writer = PredictionWriter(path, lambda number, row: {"name": f"item {number}", **row})
    writer(unique_ids=torch.tensor([3, 0]), label=torch.tensor([1, 2]), odds=torch.rand(2, 2))
    writer(
        unique_ids=torch.tensor([1, 3, -1]), label=torch.tensor([5, 6, 7]), odds=torch.rand(3, 2)
    )
    assert compute_all_metrics() == {"predictions": 3.0}
    assert not path.exists()
    assert writer.close() == path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["unique_id"], row["name"], row["label"]) for row in rows] == [
        (0, "item 0", 2),
        (1, "item 1", 5),
        (3, "item 3", 6),
    ]
    assert len(rows[0]["odds"]) == 2
    assert list(path.parent.iterdir()) == [path]
    reset_all_metrics()
    writer.close()
    assert path.read_text() == ""


def test_metrics_and_predictions_from_a_captured_graph(tmp_path: Path) -> None:
    """The compiled graph hands over what the plain call does; padding is left out in both."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    f1, bits = F1Metric(3), BitsPerTokenMetric("bits")
    writer = PredictionWriter(tmp_path / "out.jsonl")

    def call(batch: Any) -> torch.Tensor:
        logits = model(batch["x"])
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        predictions = logits.argmax(-1)
        f1(batch["labels"], predictions, batch["weights"])
        bits(batch["labels"], (losses * batch["weights"]).sum(), weights=batch["weights"])
        writer(unique_ids=batch["unique_ids"], predictions=predictions, logits=logits)
        return losses.mean()

    batch = {
        "x": torch.randn(5, 6),
        "labels": torch.tensor([0, 1, 2, 0, 0]),
        "weights": torch.tensor([1.0, 1, 1, 1, 0]),
        "unique_ids": torch.tensor([3, 2, 1, 0, -1]),
    }
    call(batch)
    direct = compute_all_metrics()
    plain = writer.close().read_text()
    reset_all_metrics()
    program = capture_step({"model": model}, call, batch, training=False, name="m").program
    compiled = compile_layers(program, cut_layers(program))
    values = compiled.feed(flatten_batch(batch), torch.device("cpu"))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    buffers = {b.node: b.value for b in program.buffers}
    for layer in compiled.layers:
        held = [weights[name] for name in layer.layer.parameters]
        layer.forward(DrawKey(0, 0, 0, 0), held, buffers, values)
    by_name = {metric.name: metric for metric in (f1, bits, writer)}
    for name, calls in compiled.metric_values(values).items():
        for tensors in calls:
            by_name[name].update_from_device(tensors)
    assert compute_all_metrics() == pytest.approx(direct)
    assert writer.close().read_text() == plain
    assert len(plain.splitlines()) == 4
