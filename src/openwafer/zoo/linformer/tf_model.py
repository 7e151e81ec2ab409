"""Linformer in TensorFlow: the twin of torch_model.py, under the same names."""

from __future__ import annotations

from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.zoo.bert.tf_model import BertTF, block_options, initial_dense
from openwafer.zoo.linformer.torch_model import LinformerConfig
from openwafer.zoo.tf.attention import attend, merge_heads, split_heads
from openwafer.zoo.tf.blocks import element
from openwafer.zoo.tf.encoder import EncoderLayer
from openwafer.zoo.tf.initializers import normal

__all__ = ["MODEL", "LinformerTF"]


class LinformerTF(BertTF):
    """Linformer with its masked-token head."""

    def _encoder(self) -> Any:
        assert isinstance(self.config, LinformerConfig)
        return LinformerEncoder(self.config, self.policy)


class LinformerEncoder(tf.keras.layers.Layer):
    """A stack of layers, and the matrix that they share where they do."""

    def __init__(self, config: LinformerConfig, dtype: Any) -> None:
        super().__init__(name="encoder", dtype=dtype)
        options = block_options(config, dtype)
        self.config = config
        self.layers = [
            EncoderLayer(
                options, name=element("layers", index), attention=LinformerAttention(config, dtype)
            )
            for index in range(config.num_hidden_layers)
        ]
        self.projection: Any = None
        self.norm = options.norm("norm") if config.use_pre_normalization else None

    def build(self, input_shape: Any) -> None:
        if self.config.attention_style == "linformer-shared-layers":
            self.projection = _add_projection(self, "projection", self.config)
        super().build(input_shape)

    def call(self, hidden: Any, bias: Any, training: bool = False) -> Any:
        """[batch, seq, hidden] → the same; `bias` [batch, 1, 1, seq] is 0 on tokens."""
        is_token = tf.cast(tf.equal(bias[:, 0, 0], 0.0), hidden.dtype)[..., None]
        for layer in self.layers:
            hidden = layer(hidden, is_token=is_token, shared=self.projection, training=training)
        return hidden if self.norm is None else self.norm(hidden)


class LinformerAttention(tf.keras.layers.Layer):
    """softmax(q (E k)ᵀ / √head_dim) F v: E and F mix the positions of keys and of values."""

    def __init__(self, config: LinformerConfig, dtype: Any) -> None:
        super().__init__(name="self_attn", dtype=dtype)
        self.config = config
        head_dim = config.hidden_size // config.num_heads
        self.scale = head_dim**-0.5 if config.attention_type == "scaled_dot_product" else 1.0

        def dense(letter: str, use_bias: bool) -> Any:
            name = f"proj_{letter}_dense_layer"
            return initial_dense(config, config.hidden_size, name, dtype, use_bias)

        self.proj_q = dense("q", config.use_projection_bias_in_attention)
        self.proj_k = dense("k", config.use_projection_bias_in_attention)
        self.proj_v = dense("v", config.use_projection_bias_in_attention)
        self.proj_output = dense("output", config.use_ffn_bias_in_attention)
        self.key_projection: Any = None
        self.value_projection: Any = None

    def build(self, input_shape: Any) -> None:
        config, style = self.config, self.config.attention_style
        num_heads = config.num_heads if style == "linformer" else None
        if style != "linformer-shared-layers":
            self.key_projection = _add_projection(self, "key_projection", config, num_heads)
            if style != "linformer-shared-kv":
                self.value_projection = _add_projection(self, "value_projection", config, num_heads)
        super().build(input_shape)

    def call(self, hidden: Any, is_token: Any, shared: Any = None, training: bool = False) -> Any:
        """[batch, seq, hidden] → the same.

        Args:
            is_token: [batch, seq, 1], 0 on padding.
            shared: [projected, max_seq]; serves where this layer has no matrix of its own.
        """
        of_keys = shared if self.key_projection is None else self.key_projection
        of_values = of_keys if self.value_projection is None else self.value_projection
        attended = attend(
            self._heads(self.proj_q(hidden)),
            _mixed(of_keys, self._heads(self.proj_k(hidden) * is_token)),
            _mixed(of_values, self._heads(self.proj_v(hidden) * is_token)),
            None,
            self.scale,
            self.config.attention_dropout_rate if training else 0.0,
        )
        return self.proj_output(merge_heads(attended))

    def _heads(self, x: Any) -> Any:
        return split_heads(x, self.config.num_heads)


def _mixed(projection: Any, x: Any) -> Any:
    """[projected, max_seq] or [head, projected, max_seq] times [batch, head, seq, head_dim] →
    [batch, head, projected, head_dim]."""
    return tf.matmul(tf.cast(projection, x.dtype)[..., : x.shape[2]], x)


def _add_projection(
    layer: Any, name: str, config: LinformerConfig, num_heads: int | None = None
) -> Any:
    """[projected, max_seq], or one for each head, [head, projected, max_seq]; normally distributed
    with variance 1 / projected, as the paper's theorem 2 has it."""
    shape = (config.projected_dims, config.max_position_embeddings)
    return layer.add_weight(
        name=name,
        shape=shape if num_heads is None else (num_heads, *shape),
        initializer=normal(config.projected_dims**-0.5)(),
    )


MODEL = LinformerTF
