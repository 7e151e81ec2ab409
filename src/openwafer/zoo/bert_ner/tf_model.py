"""BERT with a classifier of each token, in TensorFlow: the twin of torch_model.py."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import (
    accuracy_metric,
    entity_f1_metric,
    fbeta_score_metric,
)
from openwafer.zoo.bert.tf_model import Backbone, initial_dense, is_training
from openwafer.zoo.bert_ner.torch_model import BertNerConfig
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.losses import weighted_token_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "BertNerTF"]


class BertNerTF(TFZooModel[BertNerConfig]):
    """A label for each token."""

    def build_model(self, features: Features, mode: str) -> Outputs:
        """`logits` [batch, seq, num_classes], from input_ids, attention_mask, token_type_ids."""
        config = self.config
        hidden, _ = Backbone(config, self.policy, with_pooler=False).of_batch(features, mode)
        hidden = dropout(hidden, config.encoder_output_dropout_rate, is_training(mode))
        classifier = initial_dense(config, config.num_classes, "classifier", self.policy)
        return {"logits": classifier(hidden)}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """Cross entropy with labels [batch, seq] where loss_mask [batch, seq] is 1."""
        config = self.config
        return weighted_token_loss(
            model_outputs["logits"],
            features["labels"],
            features["loss_mask"],
            config.loss_scaling,
            config.loss_weight,
        )

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Accuracy of labels, their F1 without the label `O`, and the F1 of whole entities."""
        assert features is not None, "the labels are in the batch"
        predictions = tf.argmax(model_outputs["logits"], -1)
        given = (features["labels"], predictions)
        weights = features["loss_mask"]
        found = {"eval/accuracy": accuracy_metric(*given, weights)}
        if self.info is not None:
            names = self.info.label_names
            outside = [number for number, name in enumerate(names) if name == "O"]
            found["eval/f1_labels"] = fbeta_score_metric(
                *given, self.config.num_classes, ignore_labels=outside, weights=weights
            )
            found["eval/f1_entities"] = entity_f1_metric(*given, weights, names)
        return found


MODEL = BertNerTF
