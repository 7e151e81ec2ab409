"""What T5 and Transformer share in TensorFlow: seq2seq.py's batches, loss, predictions and metrics.

Decides neither what an encoder nor what a decoder is. Greedy decoding is in PyTorch alone: convert
a checkpoint for it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.metrics import accuracy_metric, perplexity_metric
from openwafer.zoo.seq2seq import Seq2SeqConfig
from openwafer.zoo.tf.losses import token_losses, weighted_token_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["Seq2SeqTFModel"]

S = TypeVar("S", bound=Seq2SeqConfig)


class Seq2SeqTFModel(TFZooModel[S]):
    """An encoder and a decoder; subclasses give the two."""

    @abstractmethod
    def encode(self, token_ids: Any, mask: Any, training: bool) -> Any:
        """[batch, src_seq] → [batch, src_seq, d_model]; `mask` is 1 where a token is real."""

    @abstractmethod
    def decode(
        self, token_ids: Any, mask: Any, memory: Any, memory_mask: Any, training: bool
    ) -> Any:
        """The logits of every target position, [batch, tgt_seq, tokens].

        Args:
            token_ids, mask: [batch, tgt_seq].
            memory: the encoder's output; memory_mask: of the source.
        """

    def build_model(self, features: Features, mode: str) -> Outputs:
        training, source_mask = mode == tf.estimator.ModeKeys.TRAIN, features["attention_mask"]
        memory = self.encode(features["input_ids"], source_mask, training)
        token_ids, mask = features["decoder_input_ids"], features["decoder_attention_mask"]
        return {"logits": self.decode(token_ids, mask, memory, source_mask, training)}

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        config, weights = self.config, tf.cast(features["decoder_attention_mask"], tf.float32)
        scaling: str = config.loss_scaling
        if "loss_weight" in features:
            weights, scaling = weights * features["loss_weight"], "batch_size"
        return weighted_token_loss(
            model_outputs["logits"],
            features["labels"],
            weights,
            scaling,
            config.lm_loss_weight,
            label_smoothing=config.label_smoothing,
        )

    def build_predictions(self, model_outputs: Outputs, features: Features) -> Outputs:
        """The most likely token at each target position, given the right ones before it; 0 behind
        the target's end."""
        mask = features["decoder_attention_mask"]
        return {"prediction": tf.argmax(model_outputs["logits"], -1, mask.dtype) * mask}

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """Those of Seq2SeqMetrics."""
        assert features is not None, "the labels are among the features"
        logits, labels = model_outputs["logits"], features["labels"]
        predicted = tf.argmax(logits, -1, labels.dtype)
        mask = tf.cast(features["decoder_attention_mask"], tf.float32)
        total_loss = tf.reduce_sum(token_losses(logits, labels) * mask)
        wrong = tf.cast(tf.not_equal(predicted, labels), tf.float32) * mask
        mistakes = tf.reduce_sum(wrong, -1)
        return {
            "eval/accuracy_lm": accuracy_metric(labels, predicted, mask),
            "eval/perplexity_lm": perplexity_metric(total_loss, tf.reduce_sum(mask)),
            "eval/accuracy_sequence": accuracy_metric(
                tf.zeros_like(mistakes), mistakes, tf.reduce_max(mask, -1)
            ),
        }
