"""report.html in a real browser: it runs without errors, draws, sorts and zooms."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from handmade_program import program_of
from openwafer.kernels import ExecutionMode, match
from openwafer.machine import load_machine
from openwafer.plan.layers import cut_layers
from openwafer.plan.plan import build_plan
from openwafer.plan.report_html import report_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

PROBE = """<script>
addEventListener("error", (event) => { document.documentElement.dataset.failed = event.message; });
</script>"""
ACTIONS = """<script>
const out = {}, figure = document.querySelector("figure.floor"), svg = figure.querySelector("svg");
const press = (key) => figure.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
press("+"); out.zoomed = svg.getAttribute("viewBox") !== svg.dataset.all;
press("ArrowLeft"); press("0"); out.all = svg.getAttribute("viewBox") === svg.dataset.all;
const shape = svg.querySelectorAll("rect")[1];
shape.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
out.pointed = figure.querySelector(".pointed").textContent.length > 20;
const before = shape.style.fill, byLayer = figure.querySelector("[data-color=l]");
byLayer?.click(); out.colored = !byLayer || shape.style.fill !== before;
const head = [...document.querySelectorAll("th button")].find((b) => b.textContent === "PEs");
head.click(); const column = head.parentElement.cellIndex;
const rows = [...head.closest("table").tBodies[0].rows];
const cells = rows.map((r) => Number(r.cells[column].dataset.v));
out.sorted = cells.every((v, i) => i === 0 || cells[i - 1] <= v);
out.drawn = svg.getBoundingClientRect().height > 50;
document.body.dataset.result = JSON.stringify(out);
</script>"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["layer_pipelined", "weight_streaming"])
def test_the_report_works_in_a_browser(mode: ExecutionMode, tmp_path: Path) -> None:
    program = program_of(Net(), torch.zeros(4, 12))
    plan = build_plan(
        program, cut_layers(program), match(program, execution_mode=mode), load_machine("tiny"),
        plan_hash="0" * 64,
    )  # fmt: skip
    html = report_html(plan).replace("<head>", "<head>" + PROBE, 1)
    page = tmp_path / "report.html"
    page.write_text(html.replace("</body>", ACTIONS + "</body>", 1), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert 'data-ready="yes"' in done.stdout
    assert "data-failed" not in done.stdout
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found is not None
    assert "false" not in found.group(1), found.group(1)
    for name in ("zoomed", "all", "pointed", "colored", "sorted", "drawn"):
        assert f"{name}&quot;:true" in found.group(1)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.slow
def test_the_report_prints(tmp_path: Path) -> None:
    program = program_of(Net(), torch.zeros(4, 12))
    plan = build_plan(
        program, cut_layers(program), match(program), load_machine("tiny"), plan_hash="0" * 64
    )
    page, paper = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write_text(report_html(plan), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [*command, f"--print-to-pdf={paper}", page.as_uri()],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    assert paper.read_bytes()[:5] == b"%PDF-"
    assert paper.stat().st_size > 5000
