"""Where tokens enter the zoo's TensorFlow models, and where they leave: the embedding of
`openwafer.layers` and the output layer `lm_head`, under the same names.

Decides which tables there are, how they are added, and when the output layer is tied to one. The
sinusoids of fixed positions are those of `openwafer.layers`.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.layers import SharedWeightsDenseLayer
from openwafer.frontends.tf.library import tf
from openwafer.layers.embedding import sinusoids
from openwafer.zoo.tf.initializers import Initializer

__all__ = ["LanguageHead", "TokenEmbedding"]


class TokenEmbedding(tf.keras.layers.Layer):
    """Tokens' embeddings and those of positions and segments, added: [B, S] → [B, S, width].

    Args:
        num_positions: of the position table, or of the sinusoids.
        position_type: `learned`, `fixed`, or None for none.
        num_segments: rows of the segment table; 0 for none.
        scale: of the tokens' embeddings, before the others are added.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        name: str,
        initializer: Initializer,
        num_positions: int = 0,
        position_type: str | None = None,
        num_segments: int = 0,
        scale: float = 1.0,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.width, self.num_positions, self.scale = width, num_positions, scale
        self.position_type = position_type

        def table(rows: int, kind: str) -> Any:
            return tf.keras.layers.Embedding(
                rows,
                width,
                embeddings_initializer=initializer(),
                name=f"{kind}_embeddings",
                dtype=self._dtype_policy,
            )

        self.word_embeddings = table(vocab_size, "word")
        self.position_embeddings = (
            table(num_positions, "position") if position_type == "learned" else None
        )
        self.segment_embeddings = table(num_segments, "segment") if num_segments else None

    @property
    def table(self) -> Any:
        """The tokens' weight [vocab_size, width], for an output layer that is tied to it."""
        return self.word_embeddings.embeddings

    def call(self, token_ids: Any, segment_ids: Any = None, first_position: int = 0) -> Any:
        """
        Args:
            segment_ids: [B, S]; read where there is a segment table.
            first_position: of the first token.
        """
        hidden = self.word_embeddings(token_ids)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if self.position_type is not None:
            hidden = hidden + self._positions(first_position, token_ids.shape[1], hidden.dtype)
        if self.segment_embeddings is not None:
            hidden = hidden + self.segment_embeddings(segment_ids)
        return hidden

    def _positions(self, begin: int, length: int, dtype: Any) -> Any:
        """[S, width]"""
        end = begin + length
        if end > self.num_positions:
            raise ConfigError(
                f"the sequence reaches position {end - 1}",
                allowed=f"positions below max_position_embeddings, {self.num_positions}",
            )
        if self.position_embeddings is not None:
            return self.position_embeddings(tf.range(begin, end))
        waves = sinusoids(self.num_positions, self.width)[begin:end]
        return tf.constant(waves.numpy(), dtype)


class LanguageHead:
    """The output layer `lm_head`: [B, S, width] → [B, S, vocab_size].

    Args:
        tied_to: the Keras embedding whose table is the weight; None for a weight of its own.
        initializer: of that weight.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        tied_to: Any,
        initializer: Initializer,
        use_bias: bool = False,
        dtype: Any = None,
    ) -> None:
        self._tied_to = tied_to
        options: dict[str, Any] = {"use_bias": use_bias, "name": "lm_head", "dtype": dtype}
        self._layer: Any = (
            tf.keras.layers.Dense(vocab_size, kernel_initializer=initializer(), **options)
            if tied_to is None
            else SharedWeightsDenseLayer(vocab_size, **options)
        )

    def __call__(self, hidden: Any) -> Any:
        if self._tied_to is None:
            return self._layer(hidden)
        return self._layer(hidden, self._tied_to.embeddings)
