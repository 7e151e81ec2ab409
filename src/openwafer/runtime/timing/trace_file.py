"""The first steps of a run as a trace file that Perfetto and chrome://tracing show.

Decides the tracks, the names and how many steps are kept; the format is the JSON object form of the
Trace Event Format: complete events ("X", microseconds), and metadata events that name the process
and its tracks. Does not decide what is recorded (timeline.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openwafer.errors import OpenWaferError
from openwafer.files import write_text
from openwafer.runtime.timing.timeline import Kind, Span, StepRecord

__all__ = ["TraceFile", "trace_events"]

_TRACKS: dict[Kind, str] = {
    "compute": "compute",
    "fetch": "store",
    "return": "store",
    "update": "optimizer",
    "input": "input",
}
"""One track each, in this order from the top; further threads of a kind get tracks below it."""

_ORDER = ("steps", *dict.fromkeys(_TRACKS.values()))
_TRACKS_PER_NAME = 1000

Event = dict[str, Any]


class TraceFile:
    """Keeps the first steps and writes them once, when it has them or at the end of the run.

    Args:
        path: of the file; an existing one is replaced.
        max_steps: how many steps are kept, which bounds file and memory.
        process: number of this process among the run's, shown as its name.
    """

    def __init__(self, path: Path, *, max_steps: int, process: int = 0) -> None:
        self.path = path
        self._max_steps, self._process = max_steps, process
        self._records: list[StepRecord] = []
        self._written = False

    def add(self, record: StepRecord) -> None:
        """Take a step; writes the file after the last one that it keeps."""
        if self._written:
            return
        self._records.append(record)
        if len(self._records) == self._max_steps:
            self.write()

    def write(self) -> None:
        """Write what there is, whole or not at all; nothing if that has been done.

        Raises:
            OpenWaferError: the file cannot be written.
        """
        if self._written:
            return
        self._written = True
        records, self._records = self._records, []
        document = {
            "traceEvents": trace_events(records, process=self._process),
            "displayTimeUnit": "ms",
        }
        try:
            write_text(self.path, json.dumps(document, separators=(",", ":")))
        except OSError as error:
            raise OpenWaferError(
                f"the timeline cannot be written: {error.strerror or error}",
                where=str(self.path),
                hint="give --timeline a file in a folder that exists and has room",
            ) from error


def trace_events(records: list[StepRecord], *, process: int = 0) -> list[Event]:
    """The events of some steps: metadata first, then each step with its spans.

    Times count from the start of the first step; a span that began before it is cut there.
    """
    if not records:
        return []
    origin = min(record.start for record in records)
    tracks = _Tracks(process)
    events: list[Event] = []
    steps = tracks.number("steps", records[0].thread)
    for record in records:
        name = f"step {record.step + 1}"
        events.append(_event(name, "step", record.start, record.end, origin, process, steps))
        for span in record.spans:
            track = tracks.number(_TRACKS[span.kind], span.thread)
            event = _event(_name(span), span.kind, span.start, span.end, origin, process, track)
            event["args"] = {"step": record.step + 1, "layer": span.layer, "kind": span.kind}
            events.append(event)
    return [*tracks.metadata(), *events]


def _name(span: Span) -> str:
    """The layer, and what is done to it where the track does not say."""
    what = span.detail if span.kind == "compute" else f"{span.kind} {span.detail}".strip()
    return f"{span.layer} {what}".strip()


def _event(
    name: str, category: str, start: float, end: float, origin: float, process: int, track: int
) -> Event:
    begins = max(start, origin)
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": round((begins - origin) * 1e6, 3),
        "dur": round((end - begins) * 1e6, 3),
        "pid": process,
        "tid": track,
    }


class _Tracks:
    """Numbers of tracks: events on one must not overlap, so each thread of a name has its own."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._threads: dict[str, list[int]] = {}

    def number(self, name: str, thread: int) -> int:
        threads = self._threads.setdefault(name, [])
        if thread not in threads:
            threads.append(thread)
        return _ORDER.index(name) * _TRACKS_PER_NAME + threads.index(thread)

    def metadata(self) -> list[Event]:
        """Names of the process and of every track that has been used, and the tracks' order."""
        events = [self._meta("process_name", 0, {"name": f"openwafer {self._process}"})]
        for name in _ORDER:
            for index, thread in enumerate(self._threads.get(name, [])):
                number = self.number(name, thread)
                label = name if index == 0 else f"{name} {index + 1}"
                events.append(self._meta("thread_name", number, {"name": label}))
                events.append(self._meta("thread_sort_index", number, {"sort_index": number}))
        return events

    def _meta(self, name: str, track: int, arguments: dict[str, Any]) -> Event:
        return {"name": name, "ph": "M", "pid": self._process, "tid": track, "args": arguments}
