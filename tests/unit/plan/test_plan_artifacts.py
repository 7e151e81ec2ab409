"""The plan's JSON, its text and page, and the cache that keeps them."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from handmade_program import program_of
from openwafer.errors import PlanError
from openwafer.graph.text import program_text
from openwafer.kernels import ExecutionMode, match
from openwafer.machine import load_machine
from openwafer.plan import artifacts
from openwafer.plan.artifacts import find_plan, plan_dir, plan_key, read_plan, write_plan
from openwafer.plan.layers import cut_layers
from openwafer.plan.plan import Plan, WeightStreamingSchedule, build_plan
from openwafer.plan.report_html import report_html
from openwafer.plan.text import compile_report, fold_layers, format_bytes, plan_text

Golden = Callable[[str, str], None]
MODES: tuple[ExecutionMode, ...] = ("layer_pipelined", "weight_streaming")


class TinyMlp(nn.Module):
    def __init__(self, depth: int = 3, width: int = 12) -> None:
        super().__init__()
        widths = [8] + [width] * depth
        self.fc_layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.fc_layers:
            x = F.dropout(F.relu(layer(x)), 0.1, self.training)
        log_p = F.log_softmax(self.last(x), -1)
        return F.nll_loss(log_p, y), (log_p.argmax(-1) == y).sum()


def make_plan(
    mode: ExecutionMode = "layer_pipelined", *, training: bool = True, depth: int = 3
) -> Plan:
    program = program_of(
        TinyMlp(depth), torch.zeros(4, 8), torch.zeros(4, dtype=torch.long), training=training
    )
    graph = match(program, execution_mode=mode)
    machine = load_machine("tiny")
    key = plan_key(program_text(program), machine, {"mode": mode})
    return build_plan(program, cut_layers(program), graph, machine, plan_hash=key)


PLANS = {mode: make_plan(mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_json_round_trip_is_exact(mode: ExecutionMode, training: bool) -> None:
    plan = make_plan(mode, training=training)
    text = json.dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)) == plan
    assert json.dumps(Plan.from_json(json.loads(text)).to_json()) == text


@given(st.data())
def test_a_changed_json_is_refused_or_gives_another_plan(data: st.DataObject) -> None:
    value = PLANS["layer_pipelined"].to_json()
    name = data.draw(st.sampled_from(sorted(value)))
    value[name] = data.draw(st.sampled_from([None, "x", 7, 1.5, [], {}]))
    try:
        plan = Plan.from_json(value)
    except ValueError:
        return
    assert plan != PLANS["layer_pipelined"]


def test_the_schedules() -> None:
    schedule = PLANS["weight_streaming"].schedule
    assert isinstance(schedule, WeightStreamingSchedule)
    names = tuple(layer.name for layer in PLANS["weight_streaming"].layers)
    assert schedule.forward == names
    assert schedule.backward == names[::-1]
    assert schedule.slot_bytes == (12 * 12 + 12) * 4
    assert make_plan("weight_streaming", training=False).schedule.backward == ()  # type: ignore[union-attr]


def test_memory_by_hand() -> None:
    count = (8 * 12 + 12) + 2 * (12 * 12 + 12) + (12 * 4 + 4)
    pipelined, streamed = PLANS["layer_pipelined"].memory, PLANS["weight_streaming"].memory
    assert pipelined["device"]["weights"] == pipelined["device"]["gradients"] == 4 * count
    assert pipelined["device"]["optimizer"] == 8 * count
    assert sum(pipelined["store"].values()) == 0
    assert streamed["device"]["weights"] == 2 * (12 * 12 + 12) * 4
    assert streamed["store"] == {**pipelined["device"], "activations": 0}
    assert streamed["device"]["activations"] == pipelined["device"]["activations"] > 0


def test_layers_hold_the_kernels_and_the_work() -> None:
    plan = PLANS["layer_pipelined"]
    kernels = [name for layer in plan.layers for name in layer.kernels]
    assert kernels == [row.name for row in plan.kernels]
    macs = 4 * (8 * 12 + 2 * 12 * 12 + 12 * 4)
    assert sum(layer.forward_macs for layer in plan.layers) == macs
    assert sum(layer.backward_macs for layer in plan.layers) == 2 * macs - 4 * 8 * 12
    assert sum(layer.num_parameters for layer in plan.layers) == plan.num_parameters


@pytest.mark.parametrize("mode", MODES)
def test_golden_texts(mode: ExecutionMode, golden: Golden) -> None:
    golden(f"tiny_mlp_{mode}_compile_report.txt", compile_report(PLANS[mode]))
    text = plan_text(PLANS[mode])
    golden(f"tiny_mlp_{mode}_plan.txt", re.sub(r"plan [0-9a-f]{12}", "plan HASH", text))


def test_a_missing_golden_fails(golden: Golden, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        pytest.skip("it would be written")
    with pytest.raises(pytest.fail.Exception, match="--update-golden"):
        golden("there_is_no_such_file.txt", "")


def test_copies_are_folded() -> None:
    groups = fold_layers(make_plan(depth=11).layers)
    labels = [group.label for group in groups]
    assert len(groups) < 12
    assert any(re.search(r"fc_layers\.1 … (9|10) ×(9|10)$", label) for label in labels), labels


def test_bytes_read_well() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 30)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 GiB",
    ]  # fmt: skip


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("mode", MODES)
def test_the_page_is_whole_and_needs_no_network(mode: ExecutionMode) -> None:
    plan = replace(PLANS[mode], model_name="<b>&mlp")
    html = report_html(plan)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.links == []
    assert "http" not in html
    assert "&lt;b&gt;&amp;mlp" in html
    assert "<b>&" not in html
    assert page.tags.count("svg") >= 1
    sentence = plan.predicted.bottleneck
    assert sentence[1:] in html


def test_the_floorplan_is_to_scale() -> None:
    plan = PLANS["layer_pipelined"]
    html = report_html(plan)
    found = re.findall(r"<rect x='(\d+)' y='(\d+)' width='(\d+)' height='(\d+)' style", html)
    expected = [(r.x, r.y, r.width, r.height) for r in plan.fabric.rectangles]
    assert [tuple(map(int, place)) for place in found] == expected
    assert f"viewBox='0 0 {plan.fabric.fabric_cols} {plan.fabric.fabric_rows}'" in html
    for row in plan.kernels:
        assert f"{row.name} (" in html


# ---------------------------------------------------------------------------------------- cache


def test_the_files_can_be_grepped(tmp_path: Path) -> None:
    plan = PLANS["layer_pipelined"]
    directory = write_plan(plan, tmp_path)
    assert directory == tmp_path / f"cs_{plan.hash}"
    assert re.fullmatch(r"cs_[0-9a-f]{64}", directory.name)
    names = {path.name for path in directory.iterdir()}
    assert names == {"plan.json", "deltat_estimate.json", "compile_report.txt", "report.html"}
    text = (directory / "plan.json").read_text()
    found = re.search(r'"total_utilization":([0-9.e-]+)', text)
    assert found is not None
    assert float(found.group(1)) == plan.fabric.active_fraction
    deltat = (directory / "deltat_estimate.json").read_text()
    assert f'"estimated_deltat":{plan.predicted.delta_t_cycles},' in deltat
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]  # nothing left over


def test_the_same_key_hits_and_any_change_misses(tmp_path: Path) -> None:
    machine = load_machine("tiny")
    options = {"mode": "layer_pipelined", "depth": 1}

    def text(width: int = 8, dtype: torch.dtype = torch.float32) -> str:
        batch = (torch.zeros(4, 8, dtype=dtype), torch.zeros(4, dtype=torch.long))
        return program_text(program_of(TinyMlp(1, width).to(dtype), *batch))

    keys = [
        plan_key(text(), machine, options),
        plan_key(text(width=9), machine, options),
        plan_key(text(dtype=torch.float64), machine, options),
        plan_key(text(), replace(machine, clock_hz=1), options),
        plan_key(text(), replace(machine, fabric_cols=9), options),
        plan_key(text(), machine, {**options, "depth": 2}),
        plan_key(text(), machine, {**options, "new": None}),
    ]
    assert len(set(keys)) == len(keys)
    assert plan_key(text(), machine, dict(reversed(options.items()))) == keys[0]
    assert plan_key(text(), replace(machine, description="other words"), options) == keys[0]
    plan = replace(PLANS["layer_pipelined"], hash=keys[0])
    write_plan(plan, tmp_path)
    assert find_plan(tmp_path, keys[0]) == plan
    assert all(find_plan(tmp_path, key) is None for key in keys[1:])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def _flip(path: Path) -> None:
    path.write_text(path.read_text().replace('"active_pes":', '"active_pes":1', 1))


def _new_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version":2', '"version":1', 1))


def _other_type(path: Path) -> None:
    path.write_text("[1]")


def _not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, _new_version, _other_type, _not_text, Path.unlink]
)
def test_a_damaged_directory_is_logged_and_replaced(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    plan = PLANS["layer_pipelined"]
    directory = write_plan(plan, tmp_path)
    damage(directory / "plan.json")
    with caplog.at_level(logging.WARNING, logger="openwafer"):
        assert find_plan(tmp_path, plan.hash) is None
    assert "compiling again" in caplog.text
    write_plan(plan, tmp_path)
    assert find_plan(tmp_path, plan.hash) == plan
    assert len(list(tmp_path.iterdir())) == 1


def test_every_single_byte_is_guarded(tmp_path: Path) -> None:
    """Any changed character of plan.json is noticed (or leaves the content as it was)."""
    plan = PLANS["layer_pipelined"]
    path = write_plan(plan, tmp_path) / "plan.json"
    text = path.read_text()
    for position in range(0, len(text) - 1, max(1, len(text) // 150)):
        other = "7" if text[position] != "7" else "8"
        path.write_text(text[:position] + other + text[position + 1 :])
        assert read_plan(path.parent) in (None, plan)


def test_a_crash_while_writing_leaves_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS["layer_pipelined"]

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "report_html", fail)
    with pytest.raises(PlanError, match="No space left"):
        write_plan(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert find_plan(tmp_path, plan.hash) is None


def test_a_plan_under_another_plans_name_is_not_used(tmp_path: Path) -> None:
    plan = PLANS["layer_pipelined"]
    directory = write_plan(plan, tmp_path)
    other = "0" * 64
    shutil.copytree(directory, plan_dir(tmp_path, other))
    assert find_plan(tmp_path, other) is None


@pytest.mark.parametrize("damaged_before", [False, True])
def test_many_writers_at_once(tmp_path: Path, damaged_before: bool) -> None:
    plan = PLANS["layer_pipelined"]
    if damaged_before:
        _truncate(write_plan(plan, tmp_path) / "plan.json")
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def write() -> None:
        start.wait()
        try:
            for _ in range(3):
                write_plan(plan, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert find_plan(tmp_path, plan.hash) == plan
    assert len(list(tmp_path.iterdir())) == 1
