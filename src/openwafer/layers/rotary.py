"""Rotary position embedding (RoFormer, arXiv:2104.09864), with the pairs side by side as in GPT-J.

Decides how queries and keys are rotated. Which layers do so is their argument.
"""

from __future__ import annotations

import torch

from openwafer.layers.arguments import argument_error, check_positive

__all__ = ["RotaryPositionEmbeddingHelper"]

_BASE = 10000.0


class RotaryPositionEmbeddingHelper:
    """Rotates the first `rotary_dim` features of each head by angles that grow with the position.

    Features 2i and 2i+1 at position p are turned by p · 10000^(-2i / rotary_dim). It holds no
    weights, so it is no module: hand the same one to all layers.

    Args:
        max_position_embeddings: number of positions.
        rotary_dim: an even number of features; the others of a head pass unchanged.
    """

    def __init__(self, max_position_embeddings: int, rotary_dim: int) -> None:
        check_positive(max_position_embeddings=max_position_embeddings, rotary_dim=rotary_dim)
        if rotary_dim % 2:
            raise argument_error(f"rotary_dim is {rotary_dim}", allowed="an even number")
        self.max_position_embeddings = max_position_embeddings
        self.rotary_dim = rotary_dim

    def create_fixed_pos_emb(
        self, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sine and cosine of every angle, [position, rotary_dim / 2] each, float32."""
        return self._sin_cos(0, self.max_position_embeddings, device)

    def rotate_tensor(self, x: torch.Tensor, real_seq_length: int, offset: int = 0) -> torch.Tensor:
        """Rotate queries or keys.

        Args:
            x: [batch, head, seq, head_dim].
            real_seq_length: length of the whole sequence, cached positions included.
            offset: position of the first row of `x`.

        Raises:
            ConfigError: wrong dimensions, or more positions than there are.
        """
        if x.dim() != 4 or x.shape[-1] < self.rotary_dim:
            raise argument_error(
                f"cannot rotate {self.rotary_dim} features of a tensor of shape {list(x.shape)}",
                allowed=f"[batch, head, seq, head_dim] with head_dim of {self.rotary_dim} or more",
            )
        end = offset + x.shape[2]
        if end > real_seq_length or end > self.max_position_embeddings:
            raise argument_error(
                f"positions {offset} to {end - 1} are asked for",
                allowed=f"positions below {min(real_seq_length, self.max_position_embeddings)}",
                hint="raise max_position_embeddings",
            )
        sin, cos = self._sin_cos(offset, end, x.device)
        even, odd = x[..., : self.rotary_dim].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        turned = turned.flatten(-2).to(x.dtype)  # 16-bit inputs were turned in 32 bits
        if x.shape[-1] == self.rotary_dim:
            return turned
        return torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)

    def _sin_cos(
        self, begin: int, end: int, device: torch.device | str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / _BASE ** (features / self.rotary_dim)
        positions = torch.arange(begin, end, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies
        return torch.sin(angles), torch.cos(angles)
