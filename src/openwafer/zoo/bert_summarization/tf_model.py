"""BERT that picks the sentences of a summary, in TensorFlow: the twin of torch_model.py."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import accuracy_metric, rouge_score_metric
from openwafer.zoo.bert.tf_model import Backbone, initial_dense, is_training
from openwafer.zoo.bert_summarization.torch_model import BertSummarizationConfig
from openwafer.zoo.tf.activations import dropout
from openwafer.zoo.tf.losses import weighted_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "BertSummarizationTF"]

_KINDS = ("rouge1", "rouge2", "rougeL")
_DOCUMENT = ("labels", "cls_indices", "cls_weights", "input_ids", "attention_mask")


class BertSummarizationTF(TFZooModel[BertSummarizationConfig]):
    """A score for each sentence."""

    def build_model(self, features: Features, mode: str) -> Outputs:
        """`logits` [batch, sentences].

        Batch: input_ids, attention_mask, token_type_ids [batch, seq]; cls_indices
        [batch, sentences], where the sentences begin.
        """
        config = self.config
        hidden, _ = Backbone(config, self.policy, with_pooler=False).of_batch(features, mode)
        firsts = tf.gather(hidden, features["cls_indices"], batch_dims=1)
        firsts = dropout(firsts, config.encoder_output_dropout_rate, is_training(mode))
        return {"logits": initial_dense(config, 1, "classifier", self.policy)(firsts)[..., 0]}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        """Binary cross entropy with labels [batch, sentences], 1 in the summary, where cls_weights
        [batch, sentences] is 1."""
        losses = tf.nn.sigmoid_cross_entropy_with_logits(
            labels=tf.cast(features["labels"], tf.float32),
            logits=tf.cast(model_outputs["logits"], tf.float32),
        )
        config = self.config
        weights = features["cls_weights"]
        return weighted_loss(losses, weights, config.loss_scaling, config.loss_weight)

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """ROUGE of the sentences with the highest scores against those of the summary, and how
        often a sentence is rightly taken or left."""
        assert features is not None, "the labels are in the batch"
        logits = model_outputs["logits"]
        taken = tf.cast(logits > 0, features["labels"].dtype)
        found = {
            "eval/accuracy": accuracy_metric(features["labels"], taken, features["cls_weights"])
        }
        if self.info is not None:
            tokenizer = self.info.tokenizer
            for kind in _KINDS:
                found[f"eval/{kind}"] = rouge_score_metric(
                    *(features[name] for name in _DOCUMENT),
                    logits=logits,
                    kind=kind,
                    tokenizer=tokenizer,
                )
        return found

    def build_predictions(self, model_outputs: Outputs, features: Features) -> Outputs:
        """`probability` [batch, sentences] of each sentence; 0 where there is none."""
        probability = tf.sigmoid(tf.cast(model_outputs["logits"], tf.float32))
        return {"probability": probability * tf.cast(features["cls_weights"], tf.float32)}


MODEL = BertSummarizationTF
