"""`openwafer sweep gpt2/small --set model.layers=6,12,24`: one plan for each combination.

Decides how settings with several values become combinations, and where the page goes. Does not
decide how a plan is made (run_model.py) nor how the results read (plan/sweep.py).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from openwafer.errors import ConfigError
from openwafer.files import write_text
from openwafer.plan.plan import Plan
from openwafer.plan.sweep import Sweep, sweep
from openwafer.zoo.run_model import plan_model

__all__ = ["run_sweep", "sweep_model"]

_FLAGS = ("batch_size", "machine", "execution_mode", "num_csx")
"""Flags of a run that may have several values too: `--batch_size 32,64`."""


def run_sweep(argv: Sequence[str]) -> int:
    """The subcommand: print the table, write the page; gives the exit code.

    Raises:
        ConfigError: a setting without values.
    """
    parser = argparse.ArgumentParser(
        prog="openwafer sweep", description="Predict a model's throughput for several settings."
    )
    parser.add_argument("name", metavar="NAME", help="a name that `openwafer zoo` lists")
    parser.add_argument(
        "--set", action="append", nargs="+", default=[], metavar="SECTION.KEY=A,B",
        help="a value of the parameters, or several, e.g. model.layers=6,12,24",
    )  # fmt: skip
    for flag in _FLAGS:
        parser.add_argument(f"--{flag}", metavar="A,B", help="as for a run, or several")
    parser.add_argument("--out", metavar="FILE", help="the page (runs/<name>/sweep.html)")
    arguments = parser.parse_args(list(argv))
    settings = [text for texts in arguments.set for text in texts]
    flags = {flag: getattr(arguments, flag) for flag in _FLAGS if getattr(arguments, flag)}
    # One line for each plan would drown the table.
    logging.getLogger("openwafer").setLevel(logging.ERROR)
    result = sweep_model(arguments.name, settings, flags)
    print(result.text())
    page = Path(arguments.out) if arguments.out else Path("runs", arguments.name, "sweep.html")
    _write(page, result.html())
    print(f"\n{page}")
    return 0


def sweep_model(name: str, settings: Sequence[str], flags: Mapping[str, str]) -> Sweep:
    """Plan a model of the zoo for every combination.

    Args:
        settings: `section.key=A,B,C` in the order of the table's columns.
        flags: of a run, by name without dashes, each with one value or several between commas.

    Raises:
        ConfigError: a setting without values, or nothing to vary.
    """
    choices: dict[str, list[object]] = {}
    for text in settings:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"`{text}` sets nothing", where="--set", allowed="SECTION.KEY=A,B,C")
        choices[key] = list(_values(values, f"--set {key}"))
    for flag, values in flags.items():
        choices[f"--{flag}"] = list(_values(values, f"--{flag}"))

    def plan_of(chosen: Mapping[str, object]) -> Plan:
        argv = [name]
        for key, value in chosen.items():
            argv += [key, str(value)] if key.startswith("--") else ["--set", f"{key}={value}"]
        return plan_model(argv)

    return sweep(name, choices, plan_of)


def _values(text: str, where: str) -> list[str]:
    """`6,12` as two values; a comma inside brackets belongs to the value."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    if not all(value.strip() for value in found):
        raise ConfigError(f"{text!r} has an empty value", where=where, allowed="A,B,C")
    return found


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error.strerror}",
            where=str(path),
            allowed="a file in a folder that can be written to",
            hint="another --out",
        ) from error
