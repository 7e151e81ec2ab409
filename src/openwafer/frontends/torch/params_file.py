"""`<model_dir>/<mode>/params_<mode>.yaml`: the merged parameters of a run, for the record.

Decides its place and form. Does not decide what the parameters are (config/).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from openwafer.config.params import Params
from openwafer.files import write_text
from openwafer.train.run_folder import in_run_folder

__all__ = ["write_params"]


def write_params(params: Params, mode: str) -> Path:
    """Write the file, whole or not at all.

    Raises:
        ConfigError: model_dir cannot be written.
    """
    path = params.runconfig.model_dir / mode / f"params_{mode}.yaml"
    with in_run_folder(path):
        write_text(path, yaml.safe_dump(_plain(params.raw), sort_keys=False))
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
