"""F1 of whole named entities, as the CoNLL-2003 task counts them.

Decides what an entity is in BIO (or plain) labels, and that one counts only if its type and both
its ends are right. Source: Tjong Kim Sang and De Meulder, CoNLL-2003 shared task, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs

__all__ = ["EntityF1Metric", "entities"]


def entities(names: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, after the last) of each entity in a sequence of labels.

    `B-X` begins an entity, `I-X` goes on with one of its type or begins one, other labels end it.
    A bare `B` or `I` is of the type "".
    """
    found: set[tuple[str, int, int]] = set()
    start, kind = -1, ""
    for position, name in enumerate([*names, "O"]):
        prefix, _, of = name.partition("-")
        goes_on = prefix == "I" and start >= 0 and of == kind
        if goes_on:
            continue
        if start >= 0:
            found.add((kind, start, position))
        start, kind = (position, of) if prefix in ("B", "I") else (-1, "")
    return found


class EntityF1Metric(CBMetric):
    """Call with labels and predictions [batch, seq], and weights (0: not a word's first token).

    Args:
        label_names: the name of each class, such as O, B-PER, I-PER.
    """

    def __init__(self, label_names: Sequence[str], name: str | None = None) -> None:
        self._names = tuple(label_names)
        super().__init__(name or "entity_f1")

    def init_state(self) -> None:
        self.num_right = self.num_found = self.num_wanted = 0

    def update_on_device(
        self, labels: torch.Tensor, predictions: torch.Tensor, weights: torch.Tensor
    ) -> DeviceOutputs:
        return DeviceOutputs(args=[labels, predictions, weights])

    def update_on_host(
        self, labels: torch.Tensor, predictions: torch.Tensor, weights: torch.Tensor
    ) -> None:
        for label, prediction, weight in zip(labels, predictions, weights, strict=True):
            counted = weight > 0
            wanted = entities([self._names[i] for i in label[counted].tolist()])
            found = entities([self._names[i] for i in prediction[counted].tolist()])
            self.num_right += len(wanted & found)
            self.num_found += len(found)
            self.num_wanted += len(wanted)

    def compute(self) -> float:
        total = self.num_found + self.num_wanted
        return 2 * self.num_right / total if total else 0.0
