"""`openwafer sweep`: which plans are made, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from openwafer.cli import main
from openwafer.errors import ConfigError
from openwafer.zoo import what_if
from openwafer.zoo.what_if import sweep_model


@pytest.mark.slow
def test_one_plan_for_each_combination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "fc_mnist/tiny", "--set", "model.hidden_sizes=[16],[16, 16]"]
    assert main([*command, "--machine", "wse2,tiny", "--batch_size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("[16")]
    assert [row[:-1][0] for row in rows] == ["[16]", "[16]", "[16,", "[16,"]
    page = (tmp_path / "runs/fc_mnist/tiny/sweep.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    single = sweep_model("fc_mnist/tiny", ["model.hidden_sizes=[16]"], {"batch_size": "8"})
    (point,) = single.points
    assert point.num_parameters == 64 * 16 + 16 + 16 * 10 + 10
    assert point.samples_per_second > 0


@pytest.mark.parametrize("setting", ["model.layers", "=3", "model.layers=1,,2"])
def test_settings_without_values(setting: str) -> None:
    with pytest.raises(ConfigError):
        sweep_model("gpt2/tiny", [setting], {})


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="the page cannot be written") as caught:
        what_if._write(tmp_path / "file" / "page.html", "text")
    assert "--out" in str(caught.value)
