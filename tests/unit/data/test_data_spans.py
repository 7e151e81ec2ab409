"""Span corruption loses nothing: source and target together are the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwafer.data import build_dataset
from openwafer.data.spans import span_counts, window_length
from openwafer.errors import ConfigError


@given(
    length=st.integers(8, 60),
    density=st.sampled_from([0.1, 0.15, 0.3, 0.5]),
    mean=st.sampled_from([1.0, 2.0, 3.0, 5.0]),
    seed=st.integers(0, 9),
)
def test_source_and_target_are_the_text(
    length: int, density: float, mean: float, seed: int
) -> None:
    params: dict[str, Any] = {
        "embedded": "pairs",
        "src_max_sequence_length": length,
        "tgt_max_sequence_length": 80,
        "noise_density": density,
        "mean_noise_span_length": mean,
        "extra_ids": 40,
        "dynamic_loss_weight": True,
    }
    dataset: Any = build_dataset("span_corruption", params, "train")
    window, needed = window_length(length, density, mean)
    num_noise, num_spans = span_counts(window, density, mean)
    texts = np.empty((3, window), dtype=np.int64)
    dataset._fill(texts, np.array([4, 5, 6]))
    batch = dataset.batch([4, 5, 6], seed)
    first_sentinel = dataset.info.vocab_size - 1
    assert float(batch["loss_weight"][0]) == pytest.approx(1 / needed)
    for row in range(3):
        source = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        target = batch["labels"][row][batch["decoder_attention_mask"][row] == 1].tolist()
        assert len(source) == window - num_noise + num_spans + 1 <= length
        assert len(target) == needed
        assert source.pop() == target.pop() == 1  # eos
        assert batch["decoder_input_ids"][row].tolist()[:needed] == [3, *target]
        spans: dict[int, list[int]] = {}
        current = -1
        for token in target:
            if token > first_sentinel - num_spans:
                current = token
                spans[current] = []
            else:
                spans[current].append(token)
        assert list(spans) == [first_sentinel - k for k in range(num_spans)]
        assert all(spans.values())
        assert sum(map(len, spans.values())) == num_noise
        restored = [t for token in source for t in spans.get(token, [token])]
        assert restored == texts[row].tolist()


@given(length=st.integers(8, 600), density=st.floats(0.05, 0.5), mean=st.floats(1, 8))
def test_windows_are_as_long_as_fit(length: int, density: float, mean: float) -> None:
    def source_length(window: int) -> int:
        num_noise, num_spans = span_counts(window, density, mean)
        return window - num_noise + num_spans + 1

    window, target = window_length(length, density, mean)
    assert source_length(window) <= length
    assert source_length(window + 1) > length
    assert target == sum(span_counts(window, density, mean)) + 1


def test_published_lengths() -> None:
    """T5: inputs of 512 and targets of 114 (Raffel et al., their configuration)."""
    assert window_length(512, 0.15, 3.0) == (568, 114)


def test_spans_cover_every_place() -> None:
    params = {"embedded": "pairs", "src_max_sequence_length": 32}
    dataset: Any = build_dataset("span_corruption", params, "train")
    noise = dataset._noise(np.arange(4000), 1)
    share = noise.mean(axis=0)
    assert noise.sum(axis=1).tolist() == [noise[0].sum()] * 4000
    # As in T5 the first token is always kept and the last never; the others take their turns.
    assert (share[0], share[-1]) == (0, 1)
    assert share[1:].min() > 0.03


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="do not fit") as caught:
        build_dataset(
            "span_corruption", {"tgt_max_sequence_length": 5, "embedded": "pairs"}, "train"
        )
    assert "at least" in caught.value.allowed
    with pytest.raises(ConfigError, match="sentinels"):
        build_dataset("span_corruption", {"extra_ids": 2, "embedded": "pairs"}, "train")
    with pytest.raises(ConfigError, match="embedded"):
        build_dataset("span_corruption", {"embedded": "reverse"}, "train")


def test_documented_layout_of_words(tmp_path: Any) -> None:
    """Files of words between spaces, listed in meta.dat, with their vocabulary."""
    words = [f"word{n}" for n in range(30)]
    (tmp_path / "vocab.txt").write_text("\n".join(["<pad>", "</s>", "<unk>", "<s>", *words]))
    lines = [" ".join(words[n : n + 15]) for n in range(12)]
    (tmp_path / "part.txt").write_text("\n".join(lines))
    (tmp_path / "meta.dat").write_text("part.txt 12\n")
    params = {
        "data_processor": "T5DynamicDataProcessor",
        "src_data_dir": str(tmp_path),
        "src_vocab_file": str(tmp_path / "vocab.txt"),
        "src_max_sequence_length": 16,
        "extra_ids": 10,
    }
    dataset = build_dataset("span_corruption", params, "train")
    assert dataset.info.vocab_size == 44
    batch = dataset.example_batch(1)
    known = set(range(44))
    assert set(batch["input_ids"].flatten().tolist()) <= known
    assert batch["input_ids"][0, 0] == 4
