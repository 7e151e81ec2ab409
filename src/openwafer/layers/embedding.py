"""Token embeddings, with those of positions and segments.

Decides which tables there are and how they are added. Rotary and relative positions act inside
attention and are not here.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from openwafer.errors import nearest
from openwafer.layers.arguments import argument_error, check_positive
from openwafer.layers.initializers import InitializerSpec, create_initializer

__all__ = ["EmbeddingLayer", "sinusoids"]

_POSITION_TYPES = ("learned", "fixed", "rotary")


class EmbeddingLayer(nn.Module):
    """The sum of a token's, its position's and its segment's embedding.

    Args:
        vocab_size, embedding_size: rows and columns of the token table.
        pad_token_id: a row that begins at zero and gets no gradient.
        segment_embedding_size: columns of the segment table; None for `embedding_size`.
        embeddings_initializer, position_embeddings_initializer, segment_embeddings_initializer:
            initial values of the three tables.
        max_position_embeddings: number of positions; needed unless there are none.
        position_embedding_type: `learned`, `fixed` (sinusoids, sine and cosine side by side, with
            wavelengths from 2π `min_timescale` to 2π `max_timescale`), or None. `rotary` adds none
            here: see RotaryPositionEmbeddingHelper.
        num_segments: rows of the segment table; None or 0 for no table.

    Raises:
        ConfigError: an argument that does not fit.
    """

    position_embeddings: nn.Module | torch.Tensor | None

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        pad_token_id: int | None = None,
        segment_embedding_size: int | None = None,
        embeddings_initializer: InitializerSpec = "uniform",
        max_position_embeddings: int | None = None,
        position_embedding_type: str | None = "learned",
        min_timescale: float = 1.0,
        max_timescale: float = 1.0e4,
        position_embeddings_initializer: InitializerSpec = "uniform",
        num_segments: int | None = None,
        segment_embeddings_initializer: InitializerSpec = "uniform",
        device: torch.device | str | None = None,
    ) -> None:
        check_positive(vocab_size=vocab_size, embedding_size=embedding_size)
        _check_pad_token(pad_token_id, vocab_size)
        num_positions = _num_positions(position_embedding_type, max_position_embeddings)
        super().__init__()
        self.position_embedding_type = position_embedding_type
        self.max_position_embeddings = max_position_embeddings
        self._initializers = (
            create_initializer(embeddings_initializer),
            create_initializer(position_embeddings_initializer),
            create_initializer(segment_embeddings_initializer),
        )
        self.word_embeddings: nn.Module = nn.Embedding(
            vocab_size, embedding_size, padding_idx=pad_token_id, device=device
        )
        if position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(num_positions, embedding_size, device=device)
        elif position_embedding_type == "fixed":
            _check_timescales(min_timescale, max_timescale)
            self._timescales = (min_timescale, max_timescale)
            table = torch.empty(num_positions, embedding_size, device=device)
            self.register_buffer("position_embeddings", table, persistent=False)
        else:
            self.position_embeddings = None
        self.segment_embeddings = None
        if num_segments:
            num_columns = segment_embedding_size or embedding_size
            self.segment_embeddings = nn.Embedding(num_segments, num_columns, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new tables; the row of the padding token becomes zero. Fill the fixed positions."""
        tables = (self.word_embeddings, self.position_embeddings, self.segment_embeddings)
        for table, initializer in zip(tables, self._initializers, strict=True):
            if isinstance(table, nn.Embedding):
                initializer(table.weight.data)
                if table.padding_idx is not None:
                    with torch.no_grad():
                        table.weight[table.padding_idx].zero_()
            elif isinstance(table, torch.Tensor) and not table.is_meta:
                num_positions, size = table.shape
                table.copy_(sinusoids(num_positions, size, *self._timescales))

    def get_input_embeddings(self) -> nn.Module:
        """The token table, for tying the output layer to it."""
        return self.word_embeddings

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the token table."""
        self.word_embeddings = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        segment_ids: torch.Tensor | None = None,
        past_length: int = 0,
    ) -> torch.Tensor:
        """Look up.

        Args:
            input_ids: [batch, seq], int32 or int64.
            segment_ids: [batch, seq], any integer type; has no effect where there is no segment
                table.
            past_length: the position of the first token.

        Returns:
            [batch, seq, embedding_size].

        Raises:
            ConfigError: more positions than there are, or a segment table of another width.
        """
        embeddings = self.word_embeddings(input_ids)
        positions = self._positions(past_length, input_ids.shape[-1], input_ids.device)
        if positions is not None:
            embeddings = embeddings + positions
        if segment_ids is None or self.segment_embeddings is None:
            return embeddings
        segments = self.segment_embeddings(segment_ids.long())
        if segments.shape[-1] != embeddings.shape[-1]:
            raise argument_error(
                f"segment embeddings of size {segments.shape[-1]} cannot be added to token "
                f"embeddings of size {embeddings.shape[-1]}",
                allowed="segment_embedding_size equal to embedding_size",
                hint="leave segment_ids out, and project .segment_embeddings yourself",
            )
        return embeddings + segments

    def _positions(self, begin: int, length: int, device: torch.device) -> torch.Tensor | None:
        """[seq, embedding_size], the same for every sequence of the batch."""
        table = self.position_embeddings
        if table is None:
            return None
        end, available = begin + length, self.max_position_embeddings or 0
        if end > available:
            raise argument_error(
                f"the sequence reaches position {end - 1}",
                allowed=f"positions below max_position_embeddings, {available}",
            )
        if isinstance(table, torch.Tensor):
            return table if (begin, end) == (0, available) else table[begin:end]
        return table(torch.arange(begin, end, device=device))


def sinusoids(
    num_positions: int, size: int, min_timescale: float = 1.0, max_timescale: float = 1.0e4
) -> torch.Tensor:
    """Fixed positions [position, size]: sin and cos of position / timescale in turn, the timescales
    in geometric progression (arXiv:1706.03762, with both ends reached); an odd last column is 0."""
    num_timescales = size // 2
    growth = math.log(max_timescale / min_timescale) / max(1, num_timescales - 1)
    timescales = min_timescale * torch.exp(growth * torch.arange(num_timescales))
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] / timescales
    table = torch.zeros(num_positions, size)
    table[:, 0 : 2 * num_timescales : 2] = torch.sin(angles)
    table[:, 1 : 2 * num_timescales : 2] = torch.cos(angles)
    return table


def _check_timescales(min_timescale: float, max_timescale: float) -> None:
    if not 0 < min_timescale <= max_timescale:
        raise argument_error(
            f"min_timescale is {min_timescale}, max_timescale is {max_timescale}",
            allowed="0 < min_timescale <= max_timescale",
        )


def _num_positions(position_type: str | None, max_position_embeddings: int | None) -> int:
    if position_type is None:
        return 0
    if position_type not in _POSITION_TYPES:
        raise argument_error(
            f"position_embedding_type is {position_type!r}",
            allowed=", ".join((*_POSITION_TYPES, "None")),
            hint=nearest(str(position_type), _POSITION_TYPES),
        )
    if max_position_embeddings is None:
        raise argument_error(
            f"position_embedding_type {position_type!r} without max_position_embeddings",
            allowed="the number of positions, the longest sequence",
            hint="give max_position_embeddings, or position_embedding_type=None",
        )
    check_positive(max_position_embeddings=max_position_embeddings)
    return max_position_embeddings


def _check_pad_token(pad_token_id: int | None, vocab_size: int) -> None:
    if pad_token_id is not None and not -vocab_size <= pad_token_id < vocab_size:
        raise argument_error(
            f"pad_token_id is {pad_token_id}", allowed=f"a token, 0 to {vocab_size - 1}"
        )
