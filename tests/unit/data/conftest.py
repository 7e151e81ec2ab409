"""A cache of the tests' own, and texts that several tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENWAFER_CACHE", str(folder))
        yield folder


STORY = (
    "The cat sat on the mat.\nIt was a grey day, and nothing moved.\nThen the dog came home.\n"
    'He said: "good evening".\nThe cat did not answer him.\n'
)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve small documents, no two alike."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        words = f"Chapter {number}: the {number * 17} cats.\n"
        story = STORY.replace("cat", f"cat{number}") * (1 + number % 3)
        (folder / f"{number:02d}.txt").write_text(words + story, encoding="utf-8")
    return folder
