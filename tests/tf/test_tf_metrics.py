"""The documented streaming metrics, against scikit-learn and plain sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, fbeta_score, matthews_corrcoef

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from openwafer.errors import ConfigError  # noqa: E402
from openwafer.tf import CerebrasEstimator, CSEstimatorSpec, CSRunConfig  # noqa: E402
from openwafer.tf.metrics import (  # noqa: E402
    accuracy_metric,
    bits_per_x_metric,
    calculate_accuracy,
    dice_coefficient_metric,
    ece_loss_metric,
    entity_f1_metric,
    f1_score_metric,
    fbeta_score_metric,
    mcc_metric,
    perplexity_metric,
    rouge_score_metric,
)

CLASSES = 4
Arrays = dict[str, np.ndarray]


def streamed(metric: Callable[..., Any], batches: Sequence[Arrays], **options: Any) -> float:
    """A metric's value after the updates of all batches."""
    with tf.Graph().as_default():
        places = {
            name: tf.compat.v1.placeholder(array.dtype, array.shape)
            for name, array in batches[0].items()
        }
        value, update = metric(**places, **options)
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.local_variables_initializer())
            for batch in batches:
                seen = session.run(update, {places[name]: batch[name] for name in batch})
            result = session.run(value)
    assert seen == result
    return float(result)


def answers(classes: int, *, weighted: bool, seed: int = 0) -> tuple[list[Arrays], Arrays]:
    """Three batches of labels and predictions (and weights 0 or 1), and all that count."""
    random = np.random.RandomState(seed)
    batches: list[Arrays] = []
    for _ in range(3):
        labels = random.randint(0, classes, (5, 7))
        wrong = random.rand(5, 7) < 0.4
        predictions = np.where(wrong, random.randint(0, classes, (5, 7)), labels)
        batches.append({"labels": labels, "predictions": predictions})
        if weighted:
            batches[-1]["weights"] = random.randint(0, 2, (5, 7))
    joined = {name: np.concatenate([b[name].ravel() for b in batches]) for name in batches[0]}
    kept = joined.pop("weights", np.ones_like(joined["labels"])) > 0
    return batches, {"y_true": joined["labels"][kept], "y_pred": joined["predictions"][kept]}


@pytest.mark.parametrize("weighted", [False, True])
def test_counts_of_answers_as_in_scikit_learn(weighted: bool) -> None:
    batches, all_of_them = answers(CLASSES, weighted=weighted)
    classes = {"num_classes": CLASSES}
    # The Dice coefficient of a class is its F1 score.
    dice = f1_score(**all_of_them, average="macro")
    assert streamed(accuracy_metric, batches) == pytest.approx(accuracy_score(**all_of_them))
    assert streamed(mcc_metric, batches, **classes) == pytest.approx(
        matthews_corrcoef(**all_of_them)
    )
    assert streamed(dice_coefficient_metric, batches, **classes) == pytest.approx(dice)
    for average in ("micro", "macro"):
        for ignored in (None, [0, 2]):
            kept = [c for c in range(CLASSES) if c not in (ignored or [])]
            expected = fbeta_score(**all_of_them, beta=2, labels=kept, average=average)
            options = {"beta": 2, "average_type": average, "ignore_labels": ignored, **classes}
            assert streamed(fbeta_score_metric, batches, **options) == pytest.approx(expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_two_classes_as_in_scikit_learn(weighted: bool) -> None:
    batches, all_of_them = answers(2, weighted=weighted)
    assert streamed(f1_score_metric, batches) == pytest.approx(f1_score(**all_of_them))
    assert streamed(mcc_metric, batches) == pytest.approx(matthews_corrcoef(**all_of_them))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=12
    )
)
def test_any_answers_as_in_scikit_learn(entries: list[tuple[int, int, bool]]) -> None:
    """Also classes that do not occur, and nothing that counts."""
    labels, predictions, weights = (np.array(column) for column in zip(*entries, strict=True))
    batch = {"labels": labels, "predictions": predictions, "weights": weights.astype(np.float32)}
    kept = weights > 0
    counted = {"y_true": labels[kept], "y_pred": predictions[kept]}
    occurring = sorted({*labels[kept], *predictions[kept]})
    macro = (
        f1_score(**counted, labels=[0, 1, 2], average="macro", zero_division=0)
        if any(kept)
        else 0.0
    )
    dice = f1_score(**counted, labels=occurring, average="macro") if occurring else 0.0
    found = streamed(fbeta_score_metric, [batch], num_classes=3, average_type="macro")
    assert found == pytest.approx(macro)
    assert streamed(dice_coefficient_metric, [batch], num_classes=3) == pytest.approx(dice)


def test_labels_that_are_no_class_are_left_out() -> None:
    batch = {"labels": np.array([-100, 0, 1, 1]), "predictions": np.array([0, 0, 1, 0])}
    rest = {"y_true": [0, 1, 1], "y_pred": [0, 1, 0]}
    assert streamed(mcc_metric, [batch]) == pytest.approx(matthews_corrcoef(**rest))


def test_likelihoods_of_all_tokens_together() -> None:
    random = np.random.RandomState(1)
    logits = torch.from_numpy(random.randn(3, 6, 11).astype(np.float32))
    labels = torch.from_numpy(random.randint(0, 11, (3, 6)))
    mask = torch.from_numpy(random.randint(0, 2, (3, 6)).astype(np.float32))
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * mask
    batches = [
        {"total_loss_per_batch": loss.sum().numpy(), "num_tokens": counted.sum().numpy()}
        for loss, counted in zip(losses, mask, strict=True)
    ]
    mean = float(losses.double().sum() / mask.double().sum())
    assert streamed(ece_loss_metric, batches) == pytest.approx(mean)
    assert streamed(perplexity_metric, batches) == pytest.approx(np.exp(mean))
    per_word = streamed(bits_per_x_metric, batches, bits_per_type="per_word")
    assert per_word == pytest.approx(mean / np.log(2))
    # A quarter of a token for each byte.
    assert streamed(bits_per_x_metric, batches, dataset=0.25) == pytest.approx(per_word / 4)
    pile = streamed(bits_per_x_metric, batches)
    assert pile == pytest.approx(per_word * 0.29335)


def test_sums_are_exact_beyond_the_whole_numbers_of_float32() -> None:
    big = {"total_loss_per_batch": np.float32(2**24), "num_tokens": np.float32(2**24)}
    one = {"total_loss_per_batch": np.float32(1), "num_tokens": np.float32(0)}
    assert streamed(ece_loss_metric, [big, one]) == 1 + 2**-24


def test_nothing_counted_is_zero() -> None:
    nothing = {"total_loss_per_batch": np.float32(0), "num_tokens": np.float32(0)}
    for metric in (perplexity_metric, ece_loss_metric, bits_per_x_metric):
        assert streamed(metric, [nothing]) == 0


def test_accuracy_of_one_batch() -> None:
    logits = np.eye(5, dtype=np.float32)[[[0, 1, 2], [3, 4, 0]]]
    labels = np.array([[0, 1, 1], [3, 0, 0]])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        whole = session.run(calculate_accuracy(logits, tf.constant(labels)))
        part = session.run(calculate_accuracy(logits, tf.constant(labels), [2, 1]))
    assert whole == pytest.approx(4 / 6)
    assert part == pytest.approx(1)


def test_results_are_added_to_collections() -> None:
    with tf.Graph().as_default() as graph:
        value, update = accuracy_metric(
            tf.constant([1]), tf.constant([1]), None, ["values"], ["updates"], "share"
        )
        assert graph.get_collection("values") == [value]
        assert graph.get_collection("updates") == [update]
        assert value.op.name == "share/value"


def test_refusals() -> None:
    labels = np.array([0, 1])
    with pytest.raises(ConfigError, match="outside of a graph"):
        accuracy_metric(labels, labels)
    with tf.Graph().as_default():
        with pytest.raises(ConfigError, match="tokens per byte of dataset 'books'"):
            bits_per_x_metric(1.0, 1.0, dataset="books")
        with pytest.raises(ConfigError, match="unknown bits_per_type 'per_bite'"):
            bits_per_x_metric(1.0, 1.0, bits_per_type="per_bite")
        with pytest.raises(ConfigError, match="average_type"):
            fbeta_score_metric(labels, labels, 2, average_type="weighted")
        with pytest.raises(ConfigError, match="a metric of 1 classes"):
            dice_coefficient_metric(labels, labels, 1)


@pytest.mark.parametrize("as_host_call", [False, True])
def test_in_a_compiled_evaluation(tmp_path: Path, as_host_call: bool) -> None:
    """TensorFlow alone and the compiled model give the same; as eval_metric_ops and host_call."""
    random = np.random.RandomState(2)
    data = {"x": random.randn(48, 6).astype(np.float32)}
    classes = random.randint(0, CLASSES, 48)

    def metrics(labels: Any, logits: Any, losses: Any) -> dict[str, Any]:
        given = (labels, tf.argmax(logits, -1))
        return {
            "accuracy": accuracy_metric(*given),
            "fbeta": fbeta_score_metric(*given, CLASSES, beta=0.5),
            "mcc": mcc_metric(*given, num_classes=CLASSES),
            "dice": dice_coefficient_metric(*given, CLASSES),
            "perplexity": perplexity_metric(tf.reduce_sum(losses), losses.shape[0]),
        }

    def model_fn(features: Any, labels: Any, mode: str) -> Any:
        logits = tf.keras.layers.Dense(CLASSES)(features["x"])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        loss, given = tf.reduce_mean(losses), (labels, logits, losses)
        if mode == "train":
            optimizer = tf.compat.v1.train.GradientDescentOptimizer(0.1)
            step = tf.compat.v1.train.get_global_step()
            return CSEstimatorSpec(mode, loss=loss, train_op=optimizer.minimize(loss, step))
        if as_host_call:
            return CSEstimatorSpec(mode, loss=loss, host_call=(metrics, list(given)))
        return CSEstimatorSpec(mode, loss=loss, eval_metric_ops=metrics(*given))

    def input_fn() -> Any:
        dataset = tf.data.Dataset.from_tensor_slices((data, classes))
        return dataset.batch(16, drop_remainder=True)

    def estimator(**config: Any) -> Any:
        return CerebrasEstimator(
            model_fn, model_dir=str(tmp_path), config=CSRunConfig(tf_random_seed=1, **config)
        )

    estimator().train(input_fn, steps=1)
    plain = estimator().evaluate(input_fn)
    ours = estimator(cs_ip="local").evaluate(input_fn, use_cs=True)
    assert plain["perplexity"] == pytest.approx(np.exp(plain["loss"]), rel=1e-5)
    for name in ("accuracy", "fbeta", "mcc", "dice", "perplexity", "loss"):
        assert ours[name] == pytest.approx(plain[name], rel=1e-6), name


def test_whole_entities_by_hand_and_anew_in_each_evaluation() -> None:
    """Of three entities two are found, and one more that is none: F1 is 4 / 6."""
    names = ("O", "B-PER", "I-PER", "B-LOC")
    labels = np.array([[1, 2, 0, 3, 0], [1, 0, 0, 0, 0]])
    predictions = np.array([[1, 2, 0, 3, 0], [0, 0, 3, 0, 1]])
    weights = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.float32)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        places = [tf.compat.v1.placeholder(a.dtype, [1, 5]) for a in (labels, predictions, weights)]
        value, update = entity_f1_metric(*places, names)
        for _ in range(2):
            session.run(tf.compat.v1.local_variables_initializer())
            assert session.run(value) == 0
            for row in range(2):
                arrays = (labels[[row]], predictions[[row]], weights[[row]])
                assert session.run(update, dict(zip(places, arrays, strict=True))) == row + 1
            assert session.run(value) == pytest.approx(4 / 6)


def test_summaries_by_hand_with_logits_of_16_bits() -> None:
    """The second sentence is chosen, the first is wanted; they share one of two tokens."""
    given = {
        "labels": [[1, 0, 0]],
        "cls_indices": [[0, 4, 0]],
        "cls_weights": [[1.0, 1.0, 0.0]],
        "input_ids": [[1, 7, 8, 2, 1, 8, 9, 2, 0]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 1, 1, 0]],
    }
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        arguments = {name: tf.constant(value) for name, value in given.items()}
        logits = tf.constant([[0.0, 1.0, 9.0]], tf.bfloat16)
        found = {
            kind: rouge_score_metric(**arguments, logits=logits, kind=kind, num_sentences=1)
            for kind in ("rouge1", "rouge2")
        }
        session.run(tf.compat.v1.local_variables_initializer())
        session.run([update for _, update in found.values()])
        assert session.run(found["rouge1"][0]) == pytest.approx(0.5)
        assert session.run(found["rouge2"][0]) == 0
    with pytest.raises(ConfigError, match="kind"):
        rouge_score_metric(**given, logits=logits, kind="rouge3")
