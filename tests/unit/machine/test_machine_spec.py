"""The specification files and how wrong ones are refused."""

from dataclasses import fields
from pathlib import Path

import pytest

from openwafer.errors import ConfigError
from openwafer.machine import Machine, load_machine, machine_names


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", machine_names())
def test_every_number_of_a_shipped_machine_has_a_source(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    numbers = {f.name for f in fields(Machine)} - {"name", "description", "sources"}
    assert numbers == {field for field, source in machine.sources if source}


def test_wse2_adds_up_to_the_published_totals() -> None:
    machine = load_machine("wse2")
    assert machine.num_pes == 745_500
    assert machine.clock_hz == 850_000_000
    # 850,000 PEs x 48 KB are published as 40 GB (binary units).
    assert 850_000 * machine.sram_bytes_per_pe / 2**30 == pytest.approx(40, rel=0.05)
    # Peak fp16: 8 FLOP per cycle and PE.
    assert machine.peak_macs_per_cycle.of("bfloat16") * 2 == 8
    assert load_machine("wse2_r16_floor").num_pes == 307_840


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean `wse2`") as caught:
        load_machine("wse-2")
    assert "tiny" in caught.value.allowed


def test_a_file_that_extends_and_a_fabric_config_override(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.yaml",
        "extends: wse2\nname: mine\nclock_hz: {value: 1.1e9, source: brochure}\n",
    )
    mine = load_machine(str(path))
    assert (mine.name, mine.clock_hz, mine.num_pes) == ("mine", 1_100_000_000, 745_500)
    assert mine.source_of("clock_hz") == "brochure"
    fabric = write(tmp_path / "fabric.yaml", "fabric_rows: 10\nfabric_cols: 20\n")
    cut = load_machine("wse2", fabric)
    assert cut.num_pes == 200
    assert cut.source_of("fabric_rows") == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: wse2\nclok_hz: 5\n", "did you mean `clock_hz`"),
        ("extends: wse2\nclock_hz: fast\n", "not a number"),
        ("extends: wse2\nstreams_overlap: 1.5\n", "streams_overlap is 1.5"),
        ("extends: wse2\nclock_hz: 0\n", "out of range"),
        ("extends: wse2\nclock_hz: .inf\n", "out of range"),
        ("extends: wse2\nfabric_rows: 2.5\n", "out of range"),
        ("extends: wse2\nfabric_rows: true\n", "not a number"),
        ("extends: wse2\npeak_macs_per_cycle: 4\n", "not a table of rates"),
        ("extends: wse2\nplanning_macs_per_cycle: {float32: 2, float16: 2}\n", "above the peak"),
        ("extends: wse2\nsram_reserved_bytes_per_pe: 49152\n", "nothing is left"),
        ("extends: wse2\nclock_hz: {value: 5, sorce: x}\n", "unknown keys"),
        ("clock_hz: 5\n", "lacks `name`"),
        ("[1, 2]\n", "is a mapping"),
        ("a: [\n", "not a YAML file"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=message):
        load_machine(path)


def test_loops_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    write(path, f"extends: {path}\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_machine(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_machine(tmp_path / "none.yaml")
