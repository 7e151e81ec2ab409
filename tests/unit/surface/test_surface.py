"""`import openwafer`: fast, and what it offers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import openwafer

SCRIPT = """
import json, sys, time
began = time.process_time()
import openwafer
seconds = time.process_time() - began
names = dir(openwafer)
print(json.dumps([seconds, [m for m in ("torch", "numpy", "yaml") if m in sys.modules], names]))
"""


def test_importing_is_fast_and_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    seconds, loaded, names = json.loads(done.stdout)
    assert loaded == []
    assert seconds < 0.3
    assert names == sorted(openwafer.__all__)


def test_every_name_is_there_and_documented() -> None:
    for name in openwafer.__all__:
        value = getattr(openwafer, name)
        if not isinstance(value, str):
            assert inspect.getdoc(value), name
            assert value.__module__.startswith("openwafer.")
    assert set(openwafer._HOMES) | {"__version__"} == set(openwafer.__all__)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        openwafer.trian  # noqa: B018


def test_every_name_is_seen_by_type_checkers() -> None:
    """The block under TYPE_CHECKING imports what `__getattr__` gives."""
    source = inspect.getsource(openwafer)
    block = source[source.index("if TYPE_CHECKING") : source.index("__version__")]
    for name, home in openwafer._HOMES.items():
        line = next(line for line in block.splitlines() if f"from {home} import" in line)
        assert name in line
