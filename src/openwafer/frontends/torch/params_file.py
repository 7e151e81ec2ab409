"""`<model_dir>/<mode>/params_<mode>.yaml`: the merged parameters of a run, for the record.

Decides its place and form. Does not decide what the parameters are (config/).
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from openwafer.config.params import Params
from openwafer.errors import ConfigError

__all__ = ["write_params"]


def write_params(params: Params, mode: str) -> Path:
    """Write the file, whole or not at all.

    Raises:
        ConfigError: model_dir cannot be written.
    """
    folder = params.runconfig.model_dir / mode
    path = folder / f"params_{mode}.yaml"
    temporary = folder / f".params_{mode}.yaml.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            yaml.safe_dump(_plain(params.raw), file, sort_keys=False)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"the run's folder cannot be written: {error.strerror}",
            where=str(path),
            hint="another --model_dir",
        ) from error
    return path


def _plain(value: Any) -> Any:
    """Mappings, lists and scalars; anything else a user's function put there as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
