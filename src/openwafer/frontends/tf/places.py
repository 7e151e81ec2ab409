"""Where an operation of a TensorFlow graph comes from.

Decides which frame of its traceback is the user's line, and how name scopes become module paths.
Does not decide what is done with an operation.

Module paths are name scopes with dots for slashes. Scopes that TensorFlow numbered apart become the
elements of a list, as they are in PyTorch: `block`, `block_1`, `block_2` are `block.0`, `block.1`
and `block.2`, so that layers are cut there. A layer that is called again has a numbered scope too,
and the variables of its first call: it stays one module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from openwafer.frontends.torch.blame import is_user_file
from openwafer.graph.program import Site

__all__ = ["ModulePaths", "site_of_operation", "user_line"]

_LIBRARIES = re.compile(
    r"[\\/](?:site|dist)-packages[\\/](?:tensorflow|keras|tensorflow_estimator|tf_keras)[\\/]"
)
_OURS = os.sep + os.path.join("openwafer", "frontends") + os.sep
_NUMBERED = re.compile(r"(.+)_(\d+)")


def user_line(operation: Any) -> tuple[str, int]:
    """File and line of the user's code that made an operation; ("", 0) if there is none.

    What the package itself brings (its layers, its models) is shown where no user code is on the
    stack.
    """
    frames = [(frame.filename, frame.lineno) for frame in operation.traceback]
    own = [
        (file, line)
        for file, line in reversed(frames)
        if not _LIBRARIES.search(file) and _OURS not in file and not file.startswith("<")
    ]
    user = next(((file, line) for file, line in own if is_user_file(file)), None)
    return user or next(iter(own), ("", 0))


def site_of_operation(operation: Any, paths: ModulePaths) -> Site:
    file, line = user_line(operation)
    return Site(module=paths.of(operation.name), file=file, line=line)


class ModulePaths:
    """Module paths for the operations of one graph, given the names of all of them, and of its
    variables."""

    def __init__(self, names: Iterable[str], variables: Iterable[str] = ()) -> None:
        self._lists: set[tuple[str, str]] = set()
        self._holders = {
            name[:end] for name in variables for end, sign in enumerate(name) if sign == "/"
        }
        for name in names:
            scopes = name.split("/")[:-1]
            for depth, scope in enumerate(scopes):
                match = _NUMBERED.fullmatch(scope)
                if match and not self._is_called_again(scopes[:depth], scope, match[1]):
                    self._lists.add(("/".join(scopes[:depth]), match[1]))

    def of(self, name: str) -> str:
        """`encoder/block_1/dense/MatMul` → `encoder.block.1.dense`."""
        scopes = name.split("/")[:-1]
        parts: list[str] = []
        for depth, scope in enumerate(scopes):
            parent = "/".join(scopes[:depth])
            match = _NUMBERED.fullmatch(scope)
            if match and self._is_called_again(scopes[:depth], scope, match[1]):
                scope, match = match[1], None
            if match:
                parts += [match[1], match[2]]
            elif (parent, scope) in self._lists:
                parts += [scope, "0"]
            else:
                parts.append(scope)
        return ".".join(parts)

    def _is_called_again(self, parents: list[str], scope: str, first: str) -> bool:
        """Whether the variables are all in the scope without the number."""
        own, other = ("/".join([*parents, each]) for each in (scope, first))
        return own not in self._holders and other in self._holders
