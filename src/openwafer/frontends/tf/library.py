"""TensorFlow itself, imported in one place.

Decides which TensorFlow is taken (2.15, the last with `tf.estimator`), that its start-up notices
stay off the terminal, and what a user reads where it is missing. It is `Any` to the type checker:
TensorFlow has no stubs, and is no requirement of the package.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from openwafer.errors import ConfigError

__all__ = ["tf"]

_HINT = (
    "pip install 'openwafer[tf]' in an environment of its own, with Python 3.10 or 3.11: "
    "TensorFlow 2.15 needs numpy below 2"
)


def _tensorflow() -> Any:
    # Notices about CPU instructions and missing GPUs, which no user can act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        tensorflow: Any = importlib.import_module("tensorflow")
    except ImportError as error:
        raise ConfigError(f"TensorFlow cannot be imported: {error}", hint=_HINT) from error
    if not hasattr(tensorflow, "estimator"):
        raise ConfigError(
            f"TensorFlow {tensorflow.__version__} has no tf.estimator",
            allowed="2.15, the last release with it",
            hint=_HINT,
        )
    return tensorflow


tf: Any = _tensorflow()
