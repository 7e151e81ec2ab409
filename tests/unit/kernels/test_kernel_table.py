"""The library as a table, a page and JSON; the report as JSON; names folded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from handmade_program import program_of
from openwafer.cli import main
from openwafer.errors import ConfigError, PlanError
from openwafer.kernels import KERNELS
from openwafer.kernels.document import document_text
from openwafer.kernels.document import main as document
from openwafer.kernels.folding import fold_names, folding_key
from openwafer.kernels.table import kernel_operations, select_kernels
from openwafer.plan.validation import validation_report, write_validation

PAGE = Path(__file__).parents[3] / "docs" / "kernels.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == document_text(), "run python -m openwafer.kernels.document"


def test_the_page_command_writes_and_checks(tmp_path, capsys) -> None:
    path = tmp_path / "kernels.md"
    assert document([str(path), "--check"]) == 1
    assert "not current" in capsys.readouterr().err
    assert document([str(path)]) == 0
    assert document([str(path), "--check"]) == 0


def test_every_kernel_says_what_the_table_needs() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for kernel in KERNELS:
        assert kernel.summary
        assert kernel.sources
        assert kernel.dtypes
        assert kernel.modes
        assert kernel_operations(kernel)
        assert f"| {kernel.name} |" in document_text()


def test_the_command_lists_and_filters(capsys) -> None:
    assert main(["kernels"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) == 1 + len(KERNELS)
    assert main(["kernels", "--op", "gelu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "gelu" in {entry["kernel"] for entry in found}
    assert main(["kernels", "--family", "conv", "--mode", "weight_streaming"]) == 0
    assert capsys.readouterr().out.count("both") == 2


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [({"family": "convv"}, "conv"), ({"op": "gelo"}, "gelu"), ({"mode": "x"}, "")],
)
def test_a_wrong_filter_is_explained(wrong, hint) -> None:
    with pytest.raises(ConfigError) as caught:
        select_kernels(**wrong)
    assert hint in str(caught.value)


def test_names_fold() -> None:
    assert fold_names(["h.0.mlp", "h.1.mlp", "h.2.mlp"]) == "h.{0..2}.mlp"
    assert fold_names(["h.0", "h.1"]) == "h.{0,1}"
    assert fold_names(["a.0.b.4", "a.2.b.4", "a.4.b.4"]) == "a.{0..4 by 2}.b.4"
    assert fold_names(["h.0", "h.1", "h.5"]) == "h.{0,1,5}"
    assert fold_names(["conv2.weight"]) == "conv2.weight"
    assert fold_names([""]) == ""


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_folded_names_say_every_number(numbers) -> None:
    names = [f"layer.{number}.norm1" for number in numbers]
    assert len({folding_key(name) for name in names}) == 1
    inside = fold_names(names).removeprefix("layer.").removesuffix(".norm1").strip("{}")
    if ".." in inside:
        first, _, rest = inside.partition("..")
        last, _, step = rest.partition(" by ")
        said = list(range(int(first), int(last) + 1, int(step or 1)))
    else:
        said = list(map(int, inside.split(",")))
    assert said == sorted(numbers)


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rrelu(self.linear(x), training=True).sum()


def test_the_report_as_json(tmp_path) -> None:
    report = validation_report(program_of(Noise(), torch.zeros(2, 4)), "weight_streaming")
    write_validation(report, tmp_path / "validate" / "validate.json")
    read = json.loads((tmp_path / "validate" / "validate.json").read_text())
    assert read == json.loads(json.dumps(report.to_json()))
    assert not read["ok"]
    assert read["refusals"][0]["op"] == "aten.rrelu.default"
    assert read["refusals"][0]["line"] > 0
    assert {"kernel": "linear", "module": "linear", "count": 1} in read["kernels"]
    totals = [entry["num_operations"] for entry in read["modules"]]
    assert sum(totals) == read["num_operations"]
    assert read["coverage"] == pytest.approx(1 - 1 / read["num_operations"])
    assert [path.name for path in (tmp_path / "validate").iterdir()] == ["validate.json"]


def test_a_report_that_cannot_be_written_is_explained(tmp_path) -> None:
    report = validation_report(program_of(Noise(), torch.zeros(2, 4)), "weight_streaming")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be written"):
        write_validation(report, tmp_path / "file" / "validate.json")
