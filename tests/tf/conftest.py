"""Tests of the TensorFlow frontend: `make test-tf`, in an environment of their own.

Without TensorFlow each file is skipped, with the reason.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if importlib.util.find_spec("tensorflow") is not None:
    with warnings.catch_warnings():
        # TensorFlow 2.15 uses what Python and NumPy have deprecated since.
        warnings.simplefilter("ignore")
        import openwafer.tf  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.tf)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
