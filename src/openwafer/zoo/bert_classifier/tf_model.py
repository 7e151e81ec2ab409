"""BERT with a classifier of texts, in TensorFlow: the twin of torch_model.py."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import accuracy_metric, mcc_metric
from openwafer.zoo.bert.tf_model import Backbone, initial_dense, is_training, rows_that_count
from openwafer.zoo.bert_classifier.torch_model import BertClassifierConfig
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.losses import cross_entropies, weighted_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "BertClassifierTF"]

_PARTS = ("matched", "mismatched")


class BertClassifierTF(TFZooModel[BertClassifierConfig]):
    """A class for each text, from its pooled first token."""

    def build_model(self, features: Features, mode: str) -> Outputs:
        """`logits` [batch, num_labels], from input_ids, attention_mask, token_type_ids."""
        config = self.config
        _, pooled = Backbone(config, self.policy, with_pooler=True).of_batch(features, mode)
        pooled = dropout(pooled, config.task_dropout, is_training(mode))
        classifier = initial_dense(config, config.num_labels, "classifier", self.policy)
        return {"logits": classifier(pooled)}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """Mean cross entropy with labels [batch]."""
        losses = cross_entropies(model_outputs["logits"], features["labels"])
        return weighted_loss(losses, rows_that_count(features["attention_mask"]), "num_tokens")

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Accuracy and Matthews correlation; on MNLI (is_matched, is_mismatched [batch]) also the
        accuracy on each of its two parts."""
        assert features is not None, "the labels are in the batch"
        classes, predictions = features["labels"], tf.argmax(model_outputs["logits"], -1)
        weights = tf.cast(rows_that_count(features["attention_mask"]), tf.float32)
        num_labels = self.config.num_labels
        found = {
            "eval/accuracy": accuracy_metric(classes, predictions, weights),
            "eval/matthews_correlation": mcc_metric(
                classes, predictions, weights, num_classes=num_labels
            ),
        }
        for part in _PARTS:
            if f"is_{part}" in features:
                chosen = weights * tf.cast(features[f"is_{part}"], tf.float32)
                found[f"eval/accuracy_{part}"] = accuracy_metric(classes, predictions, chosen)
        return found


MODEL = BertClassifierTF
