"""One side of a comparison in a process of its own, stepped from outside.

Decides how a benchmark starts a side, has it take a step, and learns how long that took: the child
times itself, so that the messages do not count. Both sides of a comparison live at once and step in
turn, so that both see the same machine. What a child prints is kept for when it fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

__all__ = ["ChildError", "Step", "TimedChild", "serve_steps"]

Step = Callable[[int], Mapping[str, Any]]
"""Takes the step of this number, from 0; gives its loss, and what else there is to tell."""

_CHANNEL = "BENCHMARK_CHANNEL"


class ChildError(Exception):
    """A side ended; says how, with the last it printed."""


class TimedChild:
    """A running side. Use as a context manager; leaving it ends the process.

    Args:
        module: run with `-m`; it calls `serve_steps`.
        python: the interpreter; this one by default.
        env: variables besides this process's.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        python: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._printed = TemporaryFile()  # noqa: SIM115  closed in __exit__
        to_child, self._ask = os.pipe()
        self._answers, from_child = os.pipe()
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-m", module, *arguments],
            env={**os.environ, **(env or {}), _CHANNEL: f"{to_child},{from_child}"},
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            pass_fds=(to_child, from_child),
            cwd=Path(__file__).resolve().parents[1],
        )
        os.close(to_child)
        os.close(from_child)
        self._reader = os.fdopen(self._answers, encoding="utf-8")

    def __enter__(self) -> TimedChild:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._ask)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.close()
        self._printed.close()

    def step(self) -> dict[str, Any]:
        """Have it take one step: `seconds`, and whatever else its step gives.

        Raises:
            ChildError: the process has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # its last words come below
            os.write(self._ask, b"s")
        line = self._reader.readline()
        if not line:
            raise ChildError(f"exit code {self._process.wait()}: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        self._printed.seek(0)
        return self._printed.read().decode(errors="replace")[-2000:]


def serve_steps(step: Step) -> None:
    """In the child: take a step whenever asked, until the other side is gone."""
    asked, answer = (int(number) for number in os.environ[_CHANNEL].split(","))
    numbers = itertools.count()
    with os.fdopen(answer, "w", encoding="utf-8") as writer:
        while os.read(asked, 1):
            start = time.perf_counter()
            given = step(next(numbers))
            seconds = time.perf_counter() - start
            writer.write(json.dumps({"seconds": seconds, **given}) + "\n")
            writer.flush()
