"""Predictions of `--mode predict`, written to a file.

Decides that a sink gets its tensors the way a metric does, in the plain loop and from a captured
graph alike, and that the file appears whole when it is closed: one JSON object a line, by id. Does
not decide what is predicted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from openwafer.errors import OpenWaferError
from openwafer.files import replacing
from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs

__all__ = ["PredictionWriter"]

ToRecord = Callable[[int, Mapping[str, Any]], Mapping[str, Any]]


class PredictionWriter(CBMetric):
    """Call it in the model with `unique_ids` [batch] and any tensors [batch, ...] by name.

    An id that is given twice is written once, as given last; a negative one is left out (a row
    that only filled its batch). Its value as a metric is the number of predictions.

    Args:
        path: of the file, usually `<model_dir>/predict/predictions.jsonl`.
        to_record: makes of an id and its row (numbers, or nested lists of them) what is written;
            without it, that itself.
    """

    def __init__(
        self,
        path: str | Path,
        to_record: ToRecord | None = None,
        name: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._to_record = to_record
        super().__init__(name or "predictions")

    def init_state(self) -> None:
        self._lines: dict[int, str] = {}

    def update_on_device(self, unique_ids: torch.Tensor, **tensors: torch.Tensor) -> DeviceOutputs:
        return DeviceOutputs(kwargs={"unique_ids": unique_ids, **tensors})

    def update_on_host(self, unique_ids: torch.Tensor, **tensors: torch.Tensor) -> None:
        ids = unique_ids.reshape(-1).tolist()
        columns: dict[str, list[Any]] = {name: t.tolist() for name, t in tensors.items()}
        for place, number in enumerate(ids):
            if number < 0:
                continue
            row = {name: column[place] for name, column in columns.items()}
            record = self._to_record(number, row) if self._to_record else row
            self._lines[number] = json.dumps({"unique_id": number, **record}, ensure_ascii=False)

    def compute(self) -> float:
        return float(len(self._lines))

    def close(self) -> Path:
        """Write the file; returns its path.

        Raises:
            OpenWaferError: it cannot be written.
        """
        try:
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(f"{self._lines[number]}\n" for number in sorted(self._lines))
        except OSError as error:
            raise OpenWaferError(
                f"the predictions cannot be written: {error.strerror}",
                where=str(self.path),
                hint="another --model_dir, or free some space",
            ) from error
        return self.path
