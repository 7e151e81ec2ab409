"""`openwafer zoo`: every model with its size and how it would run.

Decides the columns, and that counting allocates nothing and reads no data that take long. Does not
decide what a model is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from openwafer.pipeline import auto_mode
from openwafer.zoo.catalog import family_of, load, model_config, names
from openwafer.zoo.outline import count_parameters

__all__ = ["ModelEntry", "entries", "listing_json", "listing_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One line. `sequence_length` is None where samples are not sequences; `execution_mode` is what
    `auto` takes on this machine."""

    name: str
    parameters: int
    sequence_length: int | None
    execution_mode: str
    title: str


def entries(family: str | None = None) -> tuple[ModelEntry, ...]:
    """All models, or those of one family, the smallest of each family first.

    Raises:
        ConfigError: there is no such family.
    """
    if family is not None:
        family = family_of(family).name
    chosen = [name for name in names() if family in (None, name.partition("/")[0])]
    found = [_entry(name) for name in chosen]
    return tuple(sorted(found, key=lambda e: (e.name.partition("/")[0], e.parameters, e.name)))


def _entry(name: str) -> ModelEntry:
    family, loaded = family_of(name), load(name)
    # The held-out data say the same of the model as the others, and are fewer.
    config = model_config(family, loaded.raw, loaded.locate, section="eval_input")
    parameters = count_parameters(family, config)
    return ModelEntry(
        name=name,
        parameters=parameters,
        sequence_length=_sequence_length(loaded.raw),
        execution_mode=auto_mode(parameters, torch.device("cpu")),
        title=family.title,
    )


def _sequence_length(raw: Mapping[str, Any]) -> int | None:
    section = raw.get("train_input") or {}
    keys = ("max_sequence_length", "src_max_sequence_length")
    return next((int(section[key]) for key in keys if section.get(key)), None)


def listing_text(found: Sequence[ModelEntry]) -> str:
    """A table for a terminal."""
    rows = [("name", "parameters", "sequence", "auto takes", "")]
    rows += [
        (
            entry.name,
            f"{entry.parameters:,}",
            str(entry.sequence_length or ""),
            entry.execution_mode,
            entry.title,
        )
        for entry in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:<{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    )


def listing_json(found: Sequence[ModelEntry]) -> str:
    return json.dumps([asdict(entry) for entry in found], indent=2)
