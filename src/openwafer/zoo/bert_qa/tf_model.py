"""BERT that marks the answer to a question in a text, in TensorFlow: the twin of torch_model.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import accuracy_metric, squad_metric
from openwafer.zoo.bert.tf_model import Backbone, initial_dense
from openwafer.zoo.bert_qa.torch_model import BertQAConfig
from openwafer.zoo.tf.losses import cross_entropies, weighted_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "BertQATF"]

_ENDS = ("start", "end")
_KINDS = ("exact_match", "f1")


class BertQATF(TFZooModel[BertQAConfig]):
    """A start and an end for each question."""

    def build_model(self, features: Features, mode: str) -> Outputs:
        """`start` and `end` [batch, seq], from input_ids, attention_mask, token_type_ids."""
        hidden, _ = Backbone(self.config, self.policy, with_pooler=False).of_batch(features, mode)
        both = initial_dense(self.config, 2, "classifier", self.policy)(hidden)
        return {"start": both[..., 0], "end": both[..., 1]}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """Mean cross entropy of both ends, labels [batch, 2], where label_weights [batch, 2] is 1.

        The softmax is over every position, padding too, as in the published model.
        """
        losses = [
            cross_entropies(model_outputs[end], features["labels"][:, index])
            for index, end in enumerate(_ENDS)
        ]
        return weighted_loss(tf.stack(losses, 1), features["label_weights"], "num_tokens")

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """How often both ends of a window's answer are right; where the data know the answers'
        words, also their exact match and F1, each question once."""
        assert features is not None, "the labels are in the batch"
        places = features["labels"]
        likeliest = [tf.argmax(model_outputs[end], -1, places.dtype) for end in _ENDS]
        wrong = tf.reduce_sum(tf.abs(tf.stack(likeliest, 1) - places), -1)
        weights = tf.reduce_min(features["label_weights"], -1)
        found = {"eval/accuracy": accuracy_metric(tf.zeros_like(wrong), wrong, weights)}
        if self.info is not None and self.info.answers is not None:
            windows = (features["unique_ids"], *(model_outputs[end] for end in _ENDS))
            for kind in _KINDS:
                found[f"eval/{kind}"] = squad_metric(*windows, answers=self.info.answers, kind=kind)
        return found

    def build_predictions(self, model_outputs: Outputs, features: Features) -> Outputs:
        """The likeliest `start` and `end` together, and `score`, the sum of their logits: in the
        second segment, the end at most `max_answer_length` - 1 after the start, or both 0: there is
        no answer."""
        length = model_outputs["start"].shape[1]
        places = np.arange(length)
        distance = places[None, :] - places[:, None]
        is_short = (distance >= 0) & (distance < self.config.max_answer_length)
        is_none = (places[:, None] == 0) & (places[None, :] == 0)
        in_text = tf.equal(features["token_type_ids"] * features["attention_mask"], 1)
        is_answer = in_text[:, :, None] & in_text[:, None, :] & is_short
        start, end = (tf.cast(model_outputs[name], tf.float32) for name in _ENDS)
        scores = start[:, :, None] + end[:, None, :]
        scores = tf.where(is_answer | is_none, scores, tf.float32.min)
        flat = tf.reshape(scores, [-1, length * length])
        best = tf.argmax(flat, -1)
        return {
            "start": best // length,
            "end": best % length,
            "score": tf.reduce_max(flat, -1),
        }


MODEL = BertQATF
