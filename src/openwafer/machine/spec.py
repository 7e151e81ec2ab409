"""Machine: what the compiler knows of a wafer, each number beside its source.

Decides the fields, their units and how a specification file is read. Does not decide what anything
costs on it or where it is placed (plan/fabric/).

A specification is YAML, one entry a field:

    extends: wse2                 # optional: start from this one
    clock_hz: {value: 850000000, source: "where the number comes from"}
    name: my_wafer                # name and description need no source
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml

from openwafer.errors import ConfigError, nearest

__all__ = ["Machine", "Rates", "load_machine", "machine_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Operations per cycle and PE, by the width of the arithmetic."""

    float32: float
    float16: float

    def of(self, dtype: str) -> float:
        """The rate for a torch dtype name. bfloat16 runs as float16; integers and booleans are
        held in 32-bit words and run as float32."""
        return self.float16 if dtype in ("float16", "bfloat16") else self.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One wafer. `sources` has a (field, where the number comes from) pair for each number.

    Of the wafer:
    fabric_rows, fabric_cols: the rectangle of PEs that a model may use.
    sram_bytes_per_pe, sram_reserved_bytes_per_pe: memory of a PE, and what of it is not for data.
    sram_banks, sram_bank_bytes_per_cycle: its banks, and the width of each.
    sram_read_bytes_per_cycle, sram_write_bytes_per_cycle: of one PE, at most.
    clock_hz: cycles per second.
    peak_macs_per_cycle: multiply-accumulates per cycle and PE that the arithmetic unit can do.
    vector_ops_per_cycle: operations on elements of a long vector, per cycle and PE.
    vector_setup_cycles: what a vector instruction takes before its first element.
    link_bytes_per_cycle: one link between neighbours, per direction.
    ramp_bytes_per_cycle: between a PE and its router, per direction.
    hop_latency_cycles, ramp_latency_cycles: from router to router, and between a PE and its router.
    num_colors, reserved_colors: routes that a router tells apart, and those that models cannot use.
    io_lanes, io_bytes_per_second: links between the wafer and its hosts, and all of them together
        per direction.
    reduction_bytes_per_second: gradients of several systems summed on their way, per system.

    Of the software that was measured on it (fitted, see the sources):
    planning_macs_per_cycle: what dense kernels reach per PE: products with weights.
    activation_macs_per_cycle: the same for products of two activations, with their exchange.
    elementwise_ops_per_cycle: operations on elements as kernels reach them that pass one position
        of a sample at a time.
    transport_columns: columns of PEs beside a dense kernel that hand data in and out.
    max_fill: share of the floor that is given out to kernels, at most.
    waiting_per_step: samples that enter while one passes an operation that needs all of it.
    weight_bytes_per_second: weights and gradients between their store and the wafer, per direction.
    layer_switch_seconds, step_seconds: weight streaming: per layer and pass, and once per step.
    streams_overlap: weight streaming: 1 where a layer's weights and gradients move while layers
        are at work, 0 where one waits for the other; a number between for a part of them.
    """

    name: str
    description: str
    fabric_rows: int
    fabric_cols: int
    sram_bytes_per_pe: int
    sram_reserved_bytes_per_pe: int
    sram_banks: int
    sram_bank_bytes_per_cycle: int
    sram_read_bytes_per_cycle: int
    sram_write_bytes_per_cycle: int
    clock_hz: int
    peak_macs_per_cycle: Rates
    vector_ops_per_cycle: Rates
    vector_setup_cycles: int
    link_bytes_per_cycle: int
    ramp_bytes_per_cycle: int
    hop_latency_cycles: int
    ramp_latency_cycles: int
    num_colors: int
    reserved_colors: int
    io_lanes: int
    io_bytes_per_second: int
    reduction_bytes_per_second: int
    planning_macs_per_cycle: Rates
    activation_macs_per_cycle: Rates
    elementwise_ops_per_cycle: Rates
    transport_columns: int
    max_fill: float
    waiting_per_step: float
    weight_bytes_per_second: int
    layer_switch_seconds: float
    step_seconds: float
    streams_overlap: float
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.sram_reserved_bytes_per_pe >= self.sram_bytes_per_pe:
            raise ConfigError(
                f"machine `{self.name}`: nothing is left of a PE's memory",
                allowed="sram_reserved_bytes_per_pe below sram_bytes_per_pe",
            )
        if self.reserved_colors >= self.num_colors:
            raise ConfigError(
                f"machine `{self.name}`: no color is left for routes",
                allowed="reserved_colors below num_colors",
            )
        if self.streams_overlap > 1:
            raise ConfigError(
                f"machine `{self.name}`: streams_overlap is {self.streams_overlap:g}",
                allowed="0 to 1",
            )
        for name in ("planning_macs_per_cycle", "activation_macs_per_cycle"):
            for width in ("float32", "float16"):
                if getattr(self, name).of(width) > self.peak_macs_per_cycle.of(width):
                    raise ConfigError(
                        f"machine `{self.name}`: {name}.{width} is above the peak",
                        allowed=f"at most {self.peak_macs_per_cycle.of(width)}",
                    )

    @property
    def num_pes(self) -> int:
        """PEs that a model may use."""
        return self.fabric_rows * self.fabric_cols

    @property
    def data_bytes_per_pe(self) -> int:
        """Bytes of a PE's memory that can hold weights and activations."""
        return self.sram_bytes_per_pe - self.sram_reserved_bytes_per_pe

    @property
    def data_bytes(self) -> int:
        """Bytes of the whole wafer that can hold weights and activations."""
        return self.num_pes * self.data_bytes_per_pe

    @property
    def free_colors(self) -> int:
        """Colors that a model's routes may use at one router."""
        return self.num_colors - self.reserved_colors

    @property
    def fitted(self) -> tuple[tuple[str, str], ...]:
        """The numbers that come from fitting published results, with the rows they were fitted
        on: those whose source begins with `fitted`."""
        return tuple(item for item in self.sources if item[1].startswith("fitted"))

    def source_of(self, field_name: str) -> str:
        """Where a field's number comes from; empty if the specification does not say."""
        return dict(self.sources).get(field_name, "")

    def numbers(self) -> dict[str, Any]:
        """All that affects a plan, as plain JSON values: everything but texts."""
        return {k: v for k, v in asdict(self).items() if k not in ("description", "sources")}


_TEXTS = ("name", "description")
_RATES = tuple(f.name for f in fields(Machine) if f.type in (Rates, "Rates"))
_FRACTIONS = tuple(f.name for f in fields(Machine) if f.type in (float, "float"))
_MAY_BE_ZERO = (
    "sram_reserved_bytes_per_pe", "hop_latency_cycles", "ramp_latency_cycles", "reserved_colors",
    "vector_setup_cycles", "transport_columns", "waiting_per_step", "layer_switch_seconds",
    "step_seconds", "streams_overlap",
)  # fmt: skip
_FIELDS = tuple(f.name for f in fields(Machine) if f.name != "sources")


def machine_names() -> tuple[str, ...]:
    """The specifications that ship with the package."""
    folder = resources.files("openwafer.machine") / "specs"
    names = (item.name for item in folder.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_machine(name_or_path: str | Path, overrides: Path | None = None) -> Machine:
    """The machine of that name or in that file, with the fields of `overrides` put over it.

    `overrides` is a file of the same form that need not be complete (`fabric_config_file`).

    Raises:
        ConfigError: unknown name, unreadable file, unknown, missing or wrong field.
    """
    where = str(name_or_path)
    entries = _read_entries(name_or_path, extended_by=())
    if overrides is not None:
        where = f"{where} with {overrides}"
        entries = entries | _read_entries(Path(overrides), extended_by=())
    missing = [name for name in _FIELDS if name not in entries]
    if missing:
        raise ConfigError(
            f"the machine specification lacks {', '.join(f'`{name}`' for name in missing)}",
            where=where,
            hint="`extends: wse2` takes over every field that you do not give",
        )
    values = {name: value for name, (value, _) in entries.items()}
    sources = tuple((name, source) for name, (_, source) in entries.items() if source)
    return Machine(**values, sources=sources)


_Entries = dict[str, tuple[Any, str]]


def _read_entries(name_or_path: str | Path, extended_by: tuple[str, ...]) -> _Entries:
    text, where = _read_text(name_or_path)
    if where in extended_by:
        raise ConfigError("a machine specification extends itself", where=where)
    try:
        raw: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not a YAML file: {error}", where=where) from error
    if not isinstance(raw, dict):
        raise ConfigError("a machine specification is a mapping of fields", where=where)
    table = {str(key): value for key, value in cast(dict[Any, Any], raw).items()}
    entries: _Entries = {}
    base = table.pop("extends", None)
    if base is not None:
        entries = _read_entries(str(base), (*extended_by, where))
    for name, value in table.items():
        entries[name] = _entry(name, value, where)
    return entries


def _read_text(name_or_path: str | Path) -> tuple[str, str]:
    """Text and place of a specification: a shipped one by name, any other by its path."""
    if str(name_or_path) in machine_names():
        name = f"{name_or_path}.yaml"
        return (resources.files("openwafer.machine") / "specs" / name).read_text("utf-8"), name
    path = Path(name_or_path)
    try:
        return path.read_text("utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(name_or_path, Path) or path.suffix in (".yaml", ".yml"):
            raise ConfigError(f"the file cannot be read: {error}", where=str(path)) from error
        raise ConfigError(
            f"no machine is called `{name_or_path}`",
            allowed=", ".join(machine_names()) + ", or the path of a YAML file",
            hint=nearest(str(name_or_path), machine_names()),
        ) from error


def _entry(name: str, raw: Any, where: str) -> tuple[Any, str]:
    """One field as (value, source), checked."""
    if name not in _FIELDS:
        raise ConfigError(
            f"unknown field `{name}`", where=where, allowed=", ".join(_FIELDS),
            hint=nearest(name, _FIELDS),
        )  # fmt: skip
    if name in _TEXTS:
        return str(raw), ""
    source = ""
    if isinstance(raw, dict) and "value" in raw:
        item = cast(dict[str, Any], raw)
        unknown = set(item) - {"value", "source"}
        if unknown:
            raise ConfigError(
                f"`{name}` has unknown keys {sorted(unknown)}", where=where,
                allowed="value, source",
            )  # fmt: skip
        source, raw = str(item.get("source", "")), item["value"]
    place = f"{where}: {name}"
    if name in _RATES:
        return _rates(raw, place), source
    number = _number(raw, place, whole=name not in _FRACTIONS, zero=name in _MAY_BE_ZERO)
    return number, source


def _rates(raw: Any, where: str) -> Rates:
    names = ("float32", "float16")
    table = cast(Mapping[str, Any], raw) if isinstance(raw, dict) else None
    if table is None or set(table) != set(names):
        raise ConfigError(f"not a table of rates: {raw!r}", where=where, allowed=", ".join(names))
    return Rates(**{name: float(_number(table[name], where)) for name in names})


def _number(raw: Any, where: str, *, whole: bool = False, zero: bool = False) -> int | float:
    """A positive number. Text such as 1e9, which YAML does not read as a number, is one too."""
    kind = "a whole number" if whole else "a number"
    allowed = f"{kind}, {'0 or more' if zero else 'above 0'}"
    try:
        if isinstance(raw, bool):
            raise ValueError(raw)
        number = float(raw)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"not a number: {raw!r}", where=where, allowed=allowed) from error
    in_range = 0 <= number < float("inf") and (zero or number > 0)
    if not in_range or (whole and not number.is_integer()):
        raise ConfigError(f"out of range: {raw!r}", where=where, allowed=allowed)
    return int(number) if whole else number
