"""docs/parameters.md, made from the code: every key of params.yaml and every flag.

Decides how the page reads. What the keys are is in the dataclasses of this room.

    python -m openwafer.config.document docs/parameters.md
"""

from __future__ import annotations

import ast
import inspect
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from openwafer.config import hyperparameters, optimizer, params, runconfig, schedule
from openwafer.config.flags import get_parser

__all__ = ["parameters_page"]

_HEAD = """# Parameters and flags

A parameter file has the sections `train_input`, `eval_input`, `model`, `optimizer`, `runconfig` and
`csconfig`. `model` and the inputs belong to your own functions and pass through as dictionaries; of
them only the keys below are read here. An unknown key in the other sections is an error that names
the nearest valid one. A flag that is given wins over `runconfig` in the file, so every flag can
also stand there. `--config NAME` takes the mapping of that name in the file as the whole file.

<!-- Made from the code by `python -m openwafer.config.document docs/parameters.md`. -->
"""


def parameters_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD, "## `runconfig`\n", _table(runconfig.RunConfig)]
    parts += ["\n## `model`\n", _table(params.ModelPrecision)]
    parts += ["\n## `csconfig`\n", _table(params.CSConfig)]
    parts += ["\n## `optimizer`\n", "Keys of every type:\n", _table(optimizer.CommonOptions)]
    parts.append("\n`optimizer_type` is one of these, in any case, with its own keys:\n")
    for name, options in hyperparameters.HYPERPARAMETERS.items():
        parts += [f"\n### {name}\n", _table(options)]
    parts.append(
        "\n## `optimizer.learning_rate`\n\nA number, a mapping with `scheduler`, or a list of "
        "mappings that follow one another (all but the last with `steps` or `decay_steps`).\n"
    )
    for form in _schedules():
        parts += [f"\n### {form.__name__}\n", f"{inspect.getdoc(form)}\n", _table(form)]
    parts += ["\n## Flags\n", _flags()]
    return "\n".join(parts)


def _schedules() -> Iterator[type[Any]]:
    for name, form in vars(schedule).items():
        is_form = inspect.isclass(form) and form.__module__ == schedule.__name__
        if is_form and not name.startswith("_") and name != "SequentialLR":
            yield form


def _table(cls: type[Any]) -> str:
    texts = _field_texts(cls)
    rows = [
        f"| `{entry.name}` | {_default(entry)} | {texts.get(entry.name, '')} |"
        for entry in fields(cls)
    ]
    if not rows:
        return "No keys of its own.\n"
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _default(entry: Field[Any]) -> str:
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "required"
    value = entry.default_factory() if entry.default is MISSING else entry.default  # type: ignore[misc]
    if isinstance(value, tuple):
        value = list(value)
    return "null" if value is None else f"`{value}`"


def _field_texts(cls: type[Any]) -> dict[str, str]:
    """The string under each field, base classes first."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field_node, text_node in zip(body.body, body.body[1:], strict=False):
            if isinstance(field_node, ast.AnnAssign) and isinstance(text_node, ast.Expr):
                name, text = field_node.target, text_node.value
                if isinstance(name, ast.Name) and isinstance(text, ast.Constant):
                    texts[name.id] = " ".join(str(text.value).split())
    return texts


def _flags() -> str:
    """The flags as a table of our own: argparse's help differs between Python versions."""
    rows = ["| flag | meaning |", "|---|---|"]
    for action in get_parser()._actions:
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        choices = "" if action.choices is None else f" ({', '.join(map(str, action.choices))})"
        if names and action.dest != "help":
            rows.append(f"| {names} | {_meaning(action.help)}{choices} |")
    return "\n".join(rows) + "\n"


def _meaning(text: str | None) -> str:
    hidden = text is None or text == SUPPRESS
    return "accepted; says once that it has no effect here" if hidden else str(text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(parameters_page(), encoding="utf-8")
