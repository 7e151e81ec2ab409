"""The compile cache: one directory `cs_<hash>/` for each distinct plan.

Decides what a plan's hash covers, which files a directory holds and how they are written and
checked. Does not decide what is in a plan. docs/artifacts.md lists every field.

A directory appears whole or not at all: it is written beside its place, flushed and renamed. Of two
writers of the same plan the first wins, and both have the same content. A damaged directory is
reported, read as absent, and replaced by the next write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from openwafer.errors import PlanError
from openwafer.machine.spec import Machine
from openwafer.plan.plan import Plan
from openwafer.plan.report_html import report_html
from openwafer.plan.text import compile_report

__all__ = ["PLAN_VERSION", "find_plan", "plan_dir", "plan_key", "read_plan", "write_plan"]

PLAN_VERSION = 2
"""Version of plan.json and of what the hash covers; raised when either changes."""

_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
"""What renaming a directory fails with where something is already there."""

_log = logging.getLogger("openwafer")


def plan_key(program_text: str, machine: Machine, options: Mapping[str, Any]) -> str:
    """64 hex digits that differ whenever a plan could: sha256 of the program's text (with shapes
    and dtypes), the machine's numbers, the options (JSON values) and the plan version."""
    content = {
        "version": PLAN_VERSION,
        "program": program_text,
        "machine": machine.numbers(),
        "options": dict(options),
    }
    return _sha256(_compact(content, sort_keys=True))


def plan_dir(compile_dir: Path, key: str) -> Path:
    """Where the plan of that key is, or will be."""
    return compile_dir / f"cs_{key}"


def find_plan(compile_dir: Path, key: str) -> Plan | None:
    """The cached plan of that key, or None if it is not there or damaged (the log says why)."""
    directory = plan_dir(compile_dir, key)
    if not directory.exists():
        return None
    plan = read_plan(directory)
    if plan is not None and plan.hash != key:
        _log.warning("%s holds another plan (%s); compiling again", directory, plan.hash)
        return None
    return plan


def read_plan(directory: Path) -> Plan | None:
    """The plan in a `cs_<hash>` directory; None, with the reason in the log, if it is unusable."""
    path = directory / "plan.json"
    try:
        return _parse_plan(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be used, compiling again: %s", path, error)
        return None


def write_plan(plan: Plan, compile_dir: Path) -> Path:
    """Write the plan's directory and return it. Safe with several writers at once.

    Raises:
        PlanError: it cannot be written.
    """
    final = plan_dir(compile_dir, plan.hash)
    try:
        compile_dir.mkdir(parents=True, exist_ok=True)
        temporary = compile_dir / f".cs_{plan.hash[:12]}.{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            _write_files(plan, temporary)
            _move_into_place(temporary, final, plan)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise PlanError(
            f"the plan cannot be written: {error}", where=str(final), hint="another --compile_dir"
        ) from error
    return final


def _parse_plan(text: str) -> Plan:
    content: Any = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    fields = cast(dict[str, Any], content)
    if fields.get("version") != PLAN_VERSION:
        raise ValueError(f"version {fields.get('version')}, this release reads {PLAN_VERSION}")
    checksum = fields.pop("checksum", None)
    if checksum != _checksum(fields):
        raise ValueError("its checksum does not fit its content")
    return Plan.from_json(fields.get("plan"))


def _plan_fields(plan: Plan) -> dict[str, Any]:
    """plan.json: the summary that people grep for, then the whole plan."""
    total, fabric = plan.predicted, plan.fabric
    fields: dict[str, Any] = {
        "version": PLAN_VERSION,
        "execution_mode": plan.execution_mode,
        "machine": plan.machine,
        "model": plan.model_name,
        "total_utilization": fabric.active_fraction,
        "compute_utilization": fabric.utilization,
        "active_pes": fabric.active_pes,
        "samples_per_sec": total.samples_per_second,
        "compute_samples_per_sec": total.compute_samples_per_second,
        "transmission_samples_per_sec": total.transmission_samples_per_second,
        "input_samples_per_sec": total.input_samples_per_second,
        "batch_samples_per_sec": total.batch_samples_per_second,
        "num_layers": len(plan.layers),
        "num_parameters": plan.num_parameters,
        "memory_bytes": {tier: sum(uses.values()) for tier, uses in plan.memory.items()},
        "plan": plan.to_json(),
    }
    return {**fields, "checksum": _checksum(fields)}


def _deltat_fields(plan: Plan) -> dict[str, Any]:
    total = plan.predicted
    return {
        "version": PLAN_VERSION,
        "estimated_deltat": total.delta_t_cycles,
        "unit": "cycles per sample",
        "compute_deltat": total.compute_delta_t_cycles,
        "transmission_deltat": total.transmission_delta_t_cycles,
        "input_deltat": total.input_delta_t_cycles,
        "placement_bound_deltat": plan.fabric.area_bound_cycles,
        "Frequency": float(total.clock_hz),
        "est_samples_per_sec": total.samples_per_second,
        "bottleneck": total.bottleneck,
        "kernels": {
            row.name: {"compute": row.compute_cycles, "transmission": row.transmission_cycles}
            for row in plan.fabric.kernels
        },
    }


def _write_files(plan: Plan, directory: Path) -> None:
    files = {
        "plan.json": _compact(_plan_fields(plan)) + "\n",
        "deltat_estimate.json": _compact(_deltat_fields(plan)) + "\n",
        "compile_report.txt": compile_report(plan),
        "report.html": report_html(plan),
    }
    for name, text in files.items():
        with open(directory / name, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    _sync_directory(directory)


def _move_into_place(temporary: Path, final: Path, plan: Plan) -> None:
    """Rename; where another directory is already there, keep it if it is whole."""
    for _ in range(10):  # each round lost means that another writer was at the same place
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            existing = read_plan(final) if final.is_dir() else None
            if existing == plan:
                return
            _discard(final)
        else:
            _sync_directory(final.parent)
            return
    raise OSError(f"other writers keep replacing {final}")


def _discard(path: Path) -> None:
    """Take a damaged directory out of the way. Another writer may have done it already."""
    trash = path.parent / f".cs_trash.{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):
        path.rename(trash)
    if trash.is_dir():
        shutil.rmtree(trash, ignore_errors=True)
    else:  # a file that stood in the way
        trash.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(fields: Mapping[str, Any]) -> str:
    """sha256 of all other fields in a fixed form, so that neither order nor spaces matter."""
    return _sha256(_compact(fields, sort_keys=True))


def _compact(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(
        value, separators=(",", ":"), sort_keys=sort_keys, ensure_ascii=False, allow_nan=False
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
