"""Sweeps: every combination, the ones that do not fit too; the page and the table show all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from handmade_program import program_of
from openwafer.graph.program import Program
from openwafer.kernels import match
from openwafer.machine import load_machine
from openwafer.plan.layers import cut_layers
from openwafer.plan.plan import Plan, build_plan
from openwafer.plan.sweep import sweep


@cache
def program(width: int) -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).sum()

    return program_of(Net(), torch.zeros(2, width))


def plan_of(settings: Mapping[str, object]) -> Plan:
    one = program(int(str(settings["width"])))
    machine = replace(load_machine("tiny"), fabric_cols=int(str(settings["cols"])))
    return build_plan(one, cut_layers(one), match(one), machine, plan_hash="0" * 64)


def test_every_combination_is_a_point() -> None:
    found = sweep("a < b", {"width": (8, 400), "cols": (1, 16)}, plan_of)
    assert [dict(p.settings) for p in found.points] == [
        {"width": 8, "cols": 1},
        {"width": 8, "cols": 16},
        {"width": 400, "cols": 1},
        {"width": 400, "cols": 16},
    ]
    small, large, too_large, fits = found.points
    assert large.samples_per_second > small.samples_per_second > 0
    assert "does not fit" in too_large.why_not
    assert not fits.why_not
    assert fits.num_parameters == 400 * 401
    text, html = found.text(), found.html()
    assert text.count("\n") == 5
    assert "does not fit" in text
    assert "a &lt; b" in html
    assert "http" not in html
    assert html.count("<rect") == 3 * 4
