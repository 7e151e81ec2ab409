"""docs/parameters.md is made from the code; and --appliance is a run in weight streaming."""

from __future__ import annotations

from pathlib import Path

from openwafer.config.document import parameters_page
from openwafer.config.params import resolve

PAGE = Path(__file__).parents[3] / "docs" / "parameters.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == parameters_page(), (
        "run: python -m openwafer.config.document docs/parameters.md"
    )


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in parameters_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.rstrip(" |").endswith("|")]


def _params(**runconfig: object) -> object:
    raw = {
        "train_input": {"batch_size": 4},
        "model": {},
        "optimizer": {"optimizer_type": "SGD", "learning_rate": 0.1},
        "runconfig": {"max_steps": 1, **runconfig},
    }
    return resolve(raw, lambda path: ".".join(map(str, path)))


def test_appliance_means_weight_streaming_here() -> None:
    params = _params(appliance=True)
    assert params.runconfig.cs_ip == "local"
    assert params.runconfig.execution_mode == "weight_streaming"
    assert any("appliance" in notice for notice in params.notices)


def test_what_is_planned_only_is_said() -> None:
    for key, value in (("multireplica", True), ("num_replicas", 2), ("num_csx", 4)):
        assert any(f"`{key}`" in notice for notice in _params(**{key: value}).notices), key
    assert _params().notices == ()
