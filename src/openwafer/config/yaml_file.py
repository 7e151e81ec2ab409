"""A YAML file as plain Python values, with the line of every key.

Decides how text becomes values and where each came from. Does not decide which keys are right
(schema.py and the dataclasses).

Differences to PyYAML's safe loader: `1e-3` is a number (YAML 1.2; PyYAML alone reads text), `1:30`
with a fraction is not a number in base 60, and a key that stands twice in a mapping is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from openwafer.config.schema import KeyPath
from openwafer.errors import ConfigError

__all__ = ["YamlFile", "parse_value", "read_yaml"]

_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"

# Digits with a point or an exponent: a whole number must stay one. Underscores as in YAML 1.1.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the float rule of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _FLOAT_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlFile:
    """A file that has been read.

    values: its top-level mapping; empty for an empty file.
    """

    path: Path
    values: dict[Any, Any]
    root: yaml.Node | None

    def locate(self, path: KeyPath) -> str:
        """`file:line` of the key at `path`, or of the nearest enclosing key that is in the file."""
        node, line = self.root, 0
        for part in path:
            found = _find(node, part)
            if found is None:
                break
            key, node = found
            line = key.start_mark.line + 1
        return f"{self.path}:{line}" if line else str(self.path)

    def holds(self, path: KeyPath) -> bool:
        """Whether the key at `path` is in the file."""
        node = self.root
        for part in path:
            found = _find(node, part)
            if found is None:
                return False
            node = found[1]
        return True


def read_yaml(path: str | Path) -> YamlFile:
    """Read a parameter file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping at the top, or has a
            key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the parameter file: {error.strerror}", where=str(path)
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the parameter file is not UTF-8 text: {error.reason}", where=str(path)
        ) from None
    try:
        return _parse(path, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = ", ".join(part for part in (error.problem, error.context) if part)
        raise ConfigError(f"not valid YAML: {what}", where=where) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from None
    except RecursionError:
        raise ConfigError("the YAML is nested too deeply", where=str(path)) from None


def parse_value(text: str) -> Any:
    """One value as it would stand in a file: `4`, `1e-3`, `true`, `[3, 4]`, `{name: normal}`.

    Raises:
        ConfigError: the text is not YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{text!r} is not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _parse(path: Path, text: str) -> YamlFile:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return YamlFile(path=path, values={}, root=None)
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                "a parameter file must be a mapping at the top",
                where=f"{path}:{root.start_mark.line + 1}",
                allowed="sections such as `train_input:` and `model:`",
            )
        _refuse_duplicates(path, root)
        # Before construction: it replaces the merge keys inside the nodes by their content.
        values: dict[Any, Any] = loader.construct_document(root)
        return YamlFile(path=path, values=values, root=root)
    finally:
        loader.dispose()


def _refuse_duplicates(path: Path, root: yaml.Node) -> None:
    for node in _nodes(root):
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            name = (key.tag, key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"the key `{key.value}` stands twice in one mapping",
                    where=f"{path}:{line}",
                    allowed="each key once",
                    hint=f"it is already in line {lines[name]}",
                )
            lines[name] = line


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, however often an alias repeats it."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)


def _find(node: yaml.Node | None, part: object) -> tuple[yaml.Node, yaml.Node] | None:
    """(node that names `part`, node of its value) within a mapping or a sequence."""
    if isinstance(node, yaml.SequenceNode):
        if isinstance(part, int) and 0 <= part < len(node.value):
            return node.value[part], node.value[part]
        return None
    if isinstance(node, yaml.MappingNode):
        # The last one wins, as in construction: merged entries come first.
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return key, value
    return None
