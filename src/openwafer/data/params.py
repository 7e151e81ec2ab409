"""The keys of `train_input`, `eval_input` and `predict_input`, typed.

Decides which keys every reader of data knows, how a wrong value is reported, and which documented
keys have no effect here. Does not decide what a task's own keys mean: its module does.

Source of the keys: CS-2 software 1.6, the data processors of its model zoo.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from openwafer.errors import ConfigError, nearest

__all__ = ["COMMON_KEYS", "NO_EFFECT", "InputParams", "Split"]

_log = logging.getLogger("openwafer")

Split = Literal["train", "eval", "predict"]

COMMON_KEYS: dict[str, Any] = {
    "data_processor": None,
    "data_dir": None,
    "batch_size": 8,
    "train_batch_size": None,
    "eval_batch_size": None,
    "shuffle": None,
    "shuffle_seed": None,
    "num_workers": 0,
    "prefetch_factor": 10,
    "persistent_workers": True,
    "drop_last": None,
    "pad_last_batch": None,
    "embedded": None,
    "embedded_bytes": None,
}
"""With their defaults; None where the default depends on the split or the task."""

_WITHOUT_EFFECT = """
    shuffle_buffer shuffle_buffer_size repeat use_multiple_workers n_parallel_reads skip_steps
    map_before_batch num_parallel_calls scale_mlm_weights mixed_precision buckets
    description to_float16 use_fake_data
    input_pad_id labels_pad_id attn_mask_pad_id segment_pad_id mlm_pad_id pack_sequences
    oov_token mask_token document_separator_token exclude_from_masking
"""
NO_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""Documented keys that are accepted and change nothing: data are read at random places (no shuffle
buffer), every batch has one shape (no buckets), padding is 0 with a mask of 0, and the special
tokens are those of the tokenizer."""


class InputParams:
    """One `*_input` section.

    Args:
        values: the section.
        keys: all keys that the task knows, with their defaults.
        split: names the section in errors, and decides defaults.

    Raises:
        ConfigError: a key that the task does not know.
    """

    def __init__(self, values: Mapping[str, Any], keys: Mapping[str, Any], split: Split) -> None:
        self.split: Split = split
        self._keys = dict(keys)
        self._values = {key: value for key, value in values.items() if value is not None}
        without_effect = sorted(set(self._values) & NO_EFFECT - set(keys))
        for key in self._values:
            if key not in keys and key not in NO_EFFECT:
                raise ConfigError(
                    f"`{key}` is not a key of these data",
                    where=self.where(key),
                    allowed=", ".join(sorted(keys)),
                    hint=nearest(key, keys),
                )
        if without_effect:
            _log.info("%s_input: no effect here: %s", split, ", ".join(without_effect))

    def where(self, key: str) -> str:
        return f"{self.split}_input.{key}"

    def get(self, key: str) -> Any:
        """The value or its default, unchecked."""
        assert key in self._keys, f"{key} is not declared"
        return self._values.get(key, self._keys[key])

    def integer(self, key: str, *, minimum: int = 0) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(key, f"a whole number, at least {minimum}")
        return value

    def optional_integer(self, key: str, *, minimum: int = 0) -> int | None:
        return None if self.get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str, *, minimum: float, maximum: float) -> float:
        value = self.get(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not minimum <= value <= maximum:
            raise self.wrong(key, f"a number from {minimum} to {maximum}")
        return float(value)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """A boolean; `default` where neither the section nor the task gives one."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "True or False")
        return value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or isinstance(value, (str, Path)):
            return None if value is None else str(value)
        raise self.wrong(key, "a text")

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        value = self.get(key)
        if value not in allowed:
            raise self.wrong(key, ", ".join(allowed), nearest(str(value), allowed))
        return str(value)

    def paths(self, key: str) -> list[Path]:
        """The files and folders named by a string or a list of them; empty where there are none.

        Raises:
            ConfigError: one of them does not exist.
        """
        value = self.get(key)
        if value is None:
            return []
        names = cast("list[object]", value) if isinstance(value, (list, tuple)) else [value]
        paths: list[Path] = []
        for name in names:
            if not isinstance(name, (str, Path)):
                raise self.wrong(key, "a path, or a list of paths")
            path = Path(name).expanduser()
            if not path.exists():
                raise ConfigError(
                    f"there is no {path}",
                    where=self.where(key),
                    allowed="a file or folder that exists",
                    hint=f"relative to {Path.cwd()}; without {key} embedded data are used",
                )
            paths.append(path)
        return paths

    def wrong(self, key: str, allowed: str, hint: str = "") -> ConfigError:
        return ConfigError(
            f"`{key}` is {self.get(key)!r}", where=self.where(key), allowed=allowed, hint=hint
        )
