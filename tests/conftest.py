"""Text goldens for all tests; and no test of ours fails for being slow on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# CI draws the same examples each time: what it says depends on the change, not on luck. Elsewhere
# the tests draw new ones.
settings.register_profile("openwafer", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("openwafer")

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("name.txt", text)` compares with tests/golden/name.txt. A missing file fails."""

    def check(name: str, text: str) -> None:
        path = GOLDEN_DIR / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden {path}; `pytest --update-golden` writes it")
        assert text == path.read_text("utf-8"), f"{path} differs; --update-golden if it is meant"

    return check
