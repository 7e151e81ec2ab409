"""A fully connected classifier of small images, and its loss."""

import tensorflow as tf

from openwafer.tf import CSEstimatorSpec, TFBaseModel, Trainer


class MNISTModel(TFBaseModel):
    """`depth` hidden layers of `hidden_size`, or one for each of `hidden_sizes`."""

    def __init__(self, params):
        super().__init__(mixed_precision=False)
        model_params = params["model"]
        size, depth = model_params.get("hidden_size", 50), model_params.get("depth", 10)
        self.hidden_sizes = model_params.get("hidden_sizes", [size] * depth)
        self.activation = model_params.get("activation_fn", "relu")
        self.dropout = model_params.get("dropout", 0.0)
        self.trainer = Trainer(params["optimizer"])

    def build_model(self, features, mode):
        """images [batch, pixels] -> logits [batch, 10]"""
        hidden = features
        for size in self.hidden_sizes:
            hidden = tf.keras.layers.Dense(size, self.activation, name="fc_layers")(hidden)
            if self.dropout:
                layer = tf.keras.layers.Dropout(self.dropout, name="dropout")
                hidden = layer(hidden, training=mode == tf.estimator.ModeKeys.TRAIN)
        return tf.keras.layers.Dense(10, name="last_layer")(hidden)

    def build_total_loss(self, model_outputs, features, labels, mode):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model_outputs)
        return tf.reduce_mean(losses)

    def build_train_ops(self, total_loss):
        return self.trainer.build_train_ops(total_loss)

    def build_eval_metric_ops(self, model_outputs, labels, features=None):
        predictions = tf.argmax(model_outputs, axis=-1)
        return {"accuracy": tf.compat.v1.metrics.accuracy(labels, predictions)}


def model_fn(features, labels, mode, params):
    model = MNISTModel(params)
    logits = model(features, mode)
    if mode == tf.estimator.ModeKeys.PREDICT:
        predictions = {"logits": logits, "classes": tf.argmax(logits, axis=-1)}
        return CSEstimatorSpec(mode, predictions=predictions)
    loss = model.build_total_loss(logits, features, labels, mode)
    if mode == tf.estimator.ModeKeys.TRAIN:
        return CSEstimatorSpec(mode, loss=loss, train_op=model.build_train_ops(loss))

    def metrics(labels, logits):
        return model.build_eval_metric_ops(logits, labels)

    return CSEstimatorSpec(mode, loss=loss, host_call=(metrics, [labels, logits]))
