"""Where the time of a step goes: what is recorded, how it is shared out, predicted and written."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwafer.errors import OpenWaferError
from openwafer.runtime.timing.breakdown import KINDS, break_down
from openwafer.runtime.timing.step_model import StepParts, predict_step_seconds
from openwafer.runtime.timing.step_times import StepTimes
from openwafer.runtime.timing.summary import RunSummary
from openwafer.runtime.timing.timeline import NO_RECORDER, Span, StepRecord, Timeline
from openwafer.runtime.timing.trace_file import TraceFile, trace_events

MAIN = 1


def span(kind: Any, layer: str, start: float, end: float, detail="", thread=MAIN) -> Span:
    return Span(kind, layer, detail, thread, start, end)


def record(*spans: Span, end: float, start: float = 0.0, step: int = 0) -> StepRecord:
    ordered = tuple(sorted(spans, key=lambda s: s.start))
    return StepRecord(step=step, start=start, end=end, thread=MAIN, spans=ordered)


# ---------------------------------------------------------------- recording


def test_a_step_has_the_spans_that_ended_in_it_from_every_thread() -> None:
    ticks = itertools.count()
    steps: list[StepRecord] = []

    class Sink:
        add = staticmethod(steps.append)

    timeline = Timeline([Sink()], clock=lambda: float(next(ticks)))
    with timeline.span("compute", "evaluation"):
        pass  # no step has begun: not recorded
    timeline.begin_step(4)
    with timeline.span("input", "batches"):
        pass

    def fetch() -> None:
        with timeline.span("fetch", "h.0", "forward"):
            pass

    other = threading.Thread(target=fetch)
    other.start()
    other.join()
    late = timeline.span("update", "h.1")
    late.__enter__()
    timeline.end_step()
    timeline.begin_step(5)
    late.__exit__(None, None, None)
    timeline.end_step()
    timeline.begin_step(6)
    timeline.abandon_step()
    timeline.end_step()
    assert [(s.step, [(e.kind, e.layer) for e in s.spans]) for s in steps] == [
        (4, [("input", "batches"), ("fetch", "h.0")]),
        (5, [("update", "h.1")]),
    ]
    assert steps[0].spans[0].thread == steps[0].thread != steps[0].spans[1].thread
    assert steps[0].start < steps[0].spans[0].start < steps[0].spans[0].end < steps[0].end
    assert steps[1].spans[0].start < steps[0].end  # it began a step earlier


def test_without_a_recorder_nothing_is_kept() -> None:
    first = NO_RECORDER.span("compute", "a")
    assert first is NO_RECORDER.span("fetch", "b")
    with first, NO_RECORDER.span("update", "c"):
        NO_RECORDER.begin_step(0)
        NO_RECORDER.end_step()


# ---------------------------------------------------------------- shared out


@st.composite
def records(draw: st.DrawFn) -> StepRecord:
    spans: list[Span] = []
    for _ in range(draw(st.integers(0, 8))):
        begin = draw(st.integers(-3, 19))
        end = draw(st.integers(max(begin, 0) + 1, 24))
        kind = draw(st.sampled_from(KINDS))
        spans.append(span(kind, draw(st.sampled_from("abc")), begin, end))
    return record(*spans, end=20.0)


def _slow_shares(step: StepRecord) -> dict[str, int]:
    """Second by second: who was it?"""
    shares = dict.fromkeys((*KINDS, "other"), 0)
    for second in range(20):
        now = [s for s in step.spans if s.start <= second < s.end]
        following = [s.layer for s in step.spans if s.kind == "compute" and s.start > second]
        layer = following[0] if following else None
        wanted: list[tuple[str, str | None]] = [("compute", None), ("input", None)]
        wanted += [(k, layer) for k in ("fetch", "update", "return") if layer]
        wanted += [("update", None), ("return", None), ("fetch", None)]
        found = (
            kind
            for kind, of in wanted
            if any(s.kind == kind and of in (None, s.layer) for s in now)
        )
        shares[next(found, "other")] += 1
    return shares


@given(records())
def test_every_moment_of_a_step_goes_to_one_kind(step: StepRecord) -> None:
    found = break_down(step)
    assert {**found.exposed_seconds, "other": found.other_seconds} == _slow_shares(step)
    cut = [(s.kind, min(s.end, 20) - max(s.start, 0)) for s in step.spans if s.start < 20]
    assert found.busy_seconds == {k: sum(n for kind, n in cut if kind == k) for k in KINDS}


# ---------------------------------------------------------------- predicted


def parts(
    compute: list[int],
    fetch: list[int],
    update: list[int],
    *,
    late: bool = False,
    threads: tuple[frozenset[Any], ...] = (frozenset({"fetch", "update", "return"}),),
    alone: float = 0.0,
) -> StepParts:
    names = [f"h.{i}" for i in range(len(compute))]
    order = [(name, "forward") for name in names] + [(n, "backward") for n in reversed(names)]
    return StepParts(
        order=tuple(order),  # type: ignore[arg-type]
        compute={item: compute[names.index(item[0])] for item in order},  # type: ignore[misc]
        fetch={item: fetch[names.index(item[0])] for item in order},  # type: ignore[misc]
        recompute={},
        give_back={},
        update=dict(zip(names, update, strict=True)),
        threads=threads,
        updates_late=late,
        alone_seconds=alone,
    )


def test_worked_cases_of_the_model() -> None:
    idle = [0, 0, 0]
    # Nothing to wait for: the compute, and what the thread does besides.
    assert predict_step_seconds(parts([5, 7, 9], idle, idle, alone=2), prefetch_depth=1) == 44
    # Fetched when needed: everything one after another.
    assert predict_step_seconds(parts([5, 7, 9], [1, 2, 3], idle), prefetch_depth=0) == 42 + 12
    # Fetched one ahead and shorter than the compute: only each pass's first fetch shows.
    assert predict_step_seconds(parts([5, 7, 9], [1, 2, 3], idle), prefetch_depth=1) == 42 + 1 + 3
    # A slow store, fetched ahead: its thread is never idle but for each pass's last layer.
    slow = predict_step_seconds(parts([1, 1, 1], [10, 10, 10], idle), prefetch_depth=2)
    assert slow == 60 + 2
    # Updates that a thread of its own does behind the backward pass: only the last one, of the
    # first layer, holds the next step up.
    two = (frozenset({"fetch"}), frozenset({"update"}))
    behind = parts([10, 10, 10], idle, [4, 4, 4], threads=two)
    assert predict_step_seconds(behind, prefetch_depth=1) == 60 + 4
    # Updates longer than the compute: it waits for them, but for the last layer's and one more.
    assert (
        predict_step_seconds(
            replace(behind, update=dict.fromkeys(behind.update, 25.0)), prefetch_depth=1
        )
        == 30 + 10 + 25 + 25 + 25
    )
    # Put off to the next fetch: the same for the first layer, hidden for the others.
    assert predict_step_seconds(replace(behind, updates_late=True), prefetch_depth=1) == 60 + 4


@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=6),
    st.booleans(),
    st.integers(0, 4),
)
def test_bounds_of_the_model(layers: list[tuple[int, ...]], late: bool, depth: int) -> None:
    compute, fetch, update = (list(column) for column in zip(*layers, strict=True))
    given_parts = parts(compute, fetch, update, late=late, alone=1.0)
    seconds = predict_step_seconds(given_parts, prefetch_depth=depth)
    work = 2 * sum(fetch) + sum(update)
    assert seconds >= 2 * sum(compute) + 1
    assert seconds >= work
    assert seconds <= 2 * sum(compute) + 1 + work
    # On one thread, more fetches ahead may stand before an update that is waited for.
    apart = replace(given_parts, threads=(frozenset({"fetch"}), frozenset({"update", "return"})))
    shallow, deep = (predict_step_seconds(apart, prefetch_depth=d) for d in (depth, depth + 1))
    assert deep <= shallow


# ---------------------------------------------------------------- summed up


def played(compute: int, fetch: int, update: int, wait: int = 0) -> list[StepRecord]:
    """Steps of a run of three layers that fetches when needed, seconds as given."""
    steps: list[StepRecord] = []
    now = 0.0
    for step in range(3):
        begin, spans = now, [span("input", "batches", now, now + wait)]
        now += wait
        names = ["a", "b", "c"]
        order = [(n, "forward") for n in names] + [(n, "backward") for n in names[::-1]]
        for name, which in order:
            spans.append(span("fetch", name, now, now + fetch, which, thread=2))
            spans.append(span("compute", name, now + fetch, now + fetch + compute, which))
            now += fetch + compute
            if which == "backward":
                spans.append(span("update", name, now, now + update, thread=2))
                now += update
        steps.append(record(*spans, start=begin, end=now, step=step))
    return steps


@pytest.mark.parametrize(
    ("seconds", "bound_by", "change"),
    [
        ((9, 0, 0, 0), "compute", None),
        ((4, 5, 0, 0), "fetch", "prefetch depth 1"),
        ((1, 90, 0, 0), "fetch", "--weight_store ram"),
        ((1, 0, 9, 0), "update", "microbatches"),
        ((2, 0, 0, 40), "input", "workers"),
    ],
)
def test_the_summary_names_the_bound_and_what_to_change(
    seconds: tuple[int, int, int, int], bound_by: str, change: str | None
) -> None:
    summary = RunSummary(on_disk=True)
    assert summary.result(prefetch_depth=0) is None
    for step in played(*seconds):
        summary.add(step)
    found = summary.result(prefetch_depth=0)
    assert found is not None
    assert found.num_steps == 2
    assert found.bound_by == bound_by
    assert found.line.count("\n") == 0
    assert (change or "nothing here") in found.line
    assert json.loads(json.dumps(found.fields()))["bound_by"] == bound_by


def test_running_forward_again_is_weighed() -> None:
    summary = RunSummary(on_disk=False)
    for number in range(2):
        start = 100.0 * number
        spans = [
            span("compute", "a", start, start + 10, "forward"),
            span("compute", "a", start + 10, start + 20, "recompute"),
            span("compute", "a", start + 20, start + 40, "backward"),
        ]
        summary.add(record(*spans, start=start, end=start + 40, step=number))
    found = summary.result(prefetch_depth=1)
    assert found is not None
    assert found.predicted_seconds == 40
    assert found.changes == (
        ("keep activations (more device memory, or --activations spill)", 30.0),
    )


def test_the_line_as_a_user_sees_it() -> None:
    summary = RunSummary(on_disk=True)
    for step in played(4, 2, 0, 1):
        summary.add(step)
    found = summary.result(prefetch_depth=0)
    assert found is not None
    assert found.line == (
        "Step 37.000 s: compute 24.000, fetch 12.000, return 0.000, update 0.000, input 1.000 s; "
        "not hidden behind compute: fetch 12.000, input 1.000 s. Bound by compute (65%). "
        "The model of its parts predicts 37.000 s (+0%). "
        "To change: --weight_store ram, or a faster disk (to 25.000 s); or fetch further ahead "
        "(prefetch depth 1; needs device memory for one more layer) (to 29.000 s)."
    )


# ---------------------------------------------------------------- written


def _check_trace(document: Any) -> None:
    """The rules of the Trace Event Format for what we use of it: the object form, complete and
    metadata events, and no two events of one track that overlap without one holding the other."""
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named: set[tuple[int, int]] = set()
    for event in document["traceEvents"]:
        place = (event["pid"], event["tid"])
        assert all(type(number) is int for number in place)
        assert isinstance(event["name"], str)
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            key = "sort_index" if event["name"] == "thread_sort_index" else "name"
            assert isinstance(event["args"][key], int if key == "sort_index" else str)
            if event["name"] == "thread_name":
                named.add(place)
            continue
        assert event["ph"] == "X"
        assert event["name"]
        assert isinstance(event["cat"], str)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        tracks.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(tracks) == named
    for spans in tracks.values():
        for (start, end), (later, last) in itertools.pairwise(sorted(spans)):
            assert later >= end - 0.002 or last <= end or start == later


def test_the_trace_file_has_the_first_steps_and_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "new" / "timeline.json"
    trace = TraceFile(path, max_steps=2)
    first, second, third = played(4, 2, 1, 1)
    trace.add(first)
    assert not path.exists()
    trace.add(second)
    written = path.read_bytes()
    trace.add(third)
    trace.write()
    assert path.read_bytes() == written
    assert [entry.name for entry in path.parent.iterdir()] == ["timeline.json"]
    document = json.loads(written)
    _check_trace(document)
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in events if e["cat"] == "step"} == {"step 1", "step 2"}
    assert len(events) == 2 + len(first.spans) + len(second.spans)
    backward = next(e for e in events if e["name"] == "b backward")
    assert backward["args"] == {"step": 1, "layer": "b", "kind": "compute"}
    assert (backward["ts"], backward["dur"]) == (28e6, 4e6)
    labels = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert labels == {"steps", "compute", "store", "optimizer", "input"}


def test_threads_of_one_kind_have_tracks_of_their_own() -> None:
    step = record(span("fetch", "a", 0, 4, thread=2), span("fetch", "b", 1, 5, thread=3), end=6.0)
    events = trace_events([step])
    _check_trace({"traceEvents": events, "displayTimeUnit": "ms"})
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["steps", "store", "store 2"]


def test_a_trace_that_cannot_be_written_is_an_error_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    times = StepTimes(
        on_disk=False,
        trace=TraceFile(tmp_path / "file" / "timeline.json", max_steps=5),
    )
    times.recorder.begin_step(0)
    times.recorder.end_step()
    with pytest.raises(OpenWaferError, match="timeline cannot be written"):
        times.close()
    times.close()  # said once
    assert times.summary() is not None
