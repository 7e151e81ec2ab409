"""The fully connected classifier of torch_model.py in TensorFlow, under the same names."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.tf.metrics import accuracy_metric
from openwafer.zoo.fc_mnist.torch_model import FcMnistConfig
from openwafer.zoo.tf.activations import activation, dropout
from openwafer.zoo.tf.initializers import linear_default
from openwafer.zoo.tf.losses import cross_entropies, weighted_loss
from openwafer.zoo.tf.model import Features, Outputs, TFZooModel

__all__ = ["MODEL", "FcMnistTFModel", "row_weights"]


class FcMnistTFModel(TFZooModel[FcMnistConfig]):
    """images [batch, pixels] float32, 0 to 1; labels [batch] int64."""

    def build_model(self, features: Features, mode: str) -> Outputs:
        config, training = self.config, mode == tf.estimator.ModeKeys.TRAIN
        sizes = config.hidden_sizes
        if sizes is None:
            sizes = (config.hidden_size,) * config.depth
        nonlinearity = activation(config.activation_fn)
        hidden = tf.cast(features["images"], self.policy.compute_dtype)
        for index, size in enumerate(sizes):
            hidden = nonlinearity(self._linear(hidden, size, f"fc_layers/{index}"))
            hidden = dropout(hidden, config.dropout, training)
        return {"logits": self._linear(hidden, config.num_classes, "last_layer")}

    def _linear(self, inputs: Any, size: int, name: str) -> Any:
        return tf.keras.layers.Dense(
            size,
            kernel_initializer=linear_default(inputs.shape[-1]),
            bias_initializer=linear_default(inputs.shape[-1]),
            name=name,
            dtype=self.policy,
        )(inputs)

    def build_total_loss(
        self, model_outputs: Outputs, features: Features, labels: Any, mode: str
    ) -> Any:
        losses = cross_entropies(model_outputs["logits"], features["labels"])
        weights = row_weights(features)
        if weights is None:
            return tf.reduce_mean(losses)
        return weighted_loss(losses, weights, "num_tokens")

    def build_eval_metric_ops(
        self, model_outputs: Outputs, labels: Any, features: Features | None = None
    ) -> dict[str, tuple[Any, Any]]:
        assert features is not None, "the labels are among the features"
        predictions = tf.argmax(model_outputs["logits"], -1)
        accuracy = accuracy_metric(features["labels"], predictions, row_weights(features))
        return {"accuracy": accuracy}


def row_weights(features: Features) -> Any:
    """1 for samples, 0 for rows that only fill the last batch, [batch]; None where none can."""
    if "unique_ids" not in features:
        return None
    return tf.cast(features["unique_ids"] >= 0, tf.float32)


MODEL = FcMnistTFModel
