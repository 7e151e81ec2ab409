"""RoBERTa (arXiv:1907.11692): BERT on masked tokens alone, with one segment.

Decides where positions begin: after the padding token's number, as the published weights have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from openwafer.config.schema import limits
from openwafer.zoo.bert.torch_model import Bert, BertConfig

__all__ = ["Roberta", "RobertaConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RobertaConfig(BertConfig):
    """The `model` section; only what differs from BERT.

    pad_token_id: number of the padding token. Rows of the position table up to that one stay
        unused. Padding comes after the tokens.
    """

    disable_nsp: bool = True
    num_segments: int = 1
    pad_token_id: int = field(default=1, metadata=limits(minimum=0))

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token takes."""
        return self.pad_token_id + 1


class Roberta(Bert):
    """RoBERTa with its masked-token head."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
