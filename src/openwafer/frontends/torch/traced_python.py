"""What the model's Python code may not do while it is traced, and what it need not do.

Decides which questions about values are answered for the code instead of being refused: checks that
only raise or warn, and torch's own code that asks in order to choose between two ways to the same
result. Decides too that Python's own random numbers are refused, because a trace would keep the
first ones for ever. Does not decide how a refusal of other questions reads (blame.py).
"""

from __future__ import annotations

import ast
import inspect
import random
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch
from torch.distributions import Distribution

from openwafer.errors import CaptureError

__all__ = ["Answer", "check_passes", "tracing_rules"]


@contextmanager
def tracing_rules(is_user_file: Callable[[str], bool]) -> Generator[None]:
    """While active, Python code runs as the module header says.

    Raises:
        CaptureError: the user's code draws one of Python's random numbers.
    """
    with _library_checks_off(), _inference_mode_is_no_grad(), _host_randomness(is_user_file):
        yield


# ---------------------------------------------------------------- checks of values


class Answer:
    """In place of a number that a check compares with something: every comparison passes."""

    def __init__(self, passes: bool) -> None:
        self._passes = passes

    def _compared(self, other: object) -> bool:
        return self._passes

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compared
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self._passes


def check_passes(file: str, line: int) -> bool | None:
    """What a question about a tensor's value answers if the check on this line passes; None where
    the line is no check.

    Checks are `assert`, and `if` around nothing but `raise` or a warning. A static graph does not
    make them; the plain loop does.
    """
    found = (passes for first, last, passes in _checks(file) if first <= line <= last)
    return next(found, None)


@cache
def _checks(file: str) -> tuple[tuple[int, int, bool], ...]:
    """First line, last line, and value of every question that passes, of a file's checks."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    found: list[tuple[int, int, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            passes = True
        elif isinstance(node, ast.If) and all(_raises_or_warns(entry) for entry in node.body):
            passes = False
        else:
            continue
        test = node.test
        num_nots = sum(isinstance(part, ast.Not) for part in ast.walk(test))
        if num_nots == 1 and isinstance(test, ast.UnaryOp):
            passes = not passes
        elif num_nots:
            continue  # which part of the test a question belongs to is not known
        found.append((test.lineno, test.end_lineno or test.lineno, passes))
    return tuple(found)


def _raises_or_warns(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and "warn" in ast.unparse(call.func)


@contextmanager
def _library_checks_off() -> Generator[None]:
    """While active, torch's own code does not ask for values where the result is the same without.

    nn.Transformer compares a mask with the causal one, to leave it out if it is; distributions
    check their arguments.
    """
    transformer: Any = torch.nn.modules.transformer
    detect: Callable[..., bool] = transformer._detect_is_causal_mask

    def given(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return detect(mask, bool(is_causal), size)

    with (
        patch.object(transformer, "_detect_is_causal_mask", given),
        patch.object(Distribution, "_validate_args", False),
    ):
        yield


@contextmanager
def _inference_mode_is_no_grad() -> Generator[None]:
    """A trace keeps regions of torch.no_grad(), not of torch.inference_mode(): a gradient would
    flow through them."""
    kind: Any = torch.inference_mode

    def enter(self: Any) -> None:
        self._instead = torch.set_grad_enabled(torch.is_grad_enabled() and not self.mode)

    def leave(self: Any, *raised: Any) -> None:
        self._instead.__exit__(*raised)

    with patch.object(kind, "__enter__", enter), patch.object(kind, "__exit__", leave):
        yield


# ---------------------------------------------------------------- Python's random numbers

_PYTHON = (
    "random uniform randint randrange choice choices sample shuffle gauss normalvariate "
    "betavariate expovariate triangular getrandbits"
)
_NUMPY = (
    "rand randn randint random random_sample uniform normal standard_normal choice permutation "
    "shuffle binomial beta poisson exponential default_rng"
)


@contextmanager
def _host_randomness(is_user_file: Callable[[str], bool]) -> Generator[None]:
    """While active, the user's code may not draw from Python's or NumPy's random numbers, in this
    thread. Other threads may: a loader's, say.

    Raises:
        CaptureError: it does.
    """
    before, numpy_before = random.getstate(), _numpy_state()
    with ExitStack() as stack:
        for module, names in ((random, _PYTHON), (numpy.random, _NUMPY)):
            for name in names.split():
                wrapped = _refusing(
                    getattr(module, name), f"{module.__name__}.{name}", is_user_file
                )
                stack.enter_context(patch.object(module, name, wrapped))
        yield
    if threading.active_count() > 1:
        return  # whose draws a changed state shows is not known
    if random.getstate() != before:
        raise _drawn_in_python("a function of Python's `random`", "")
    if _numpy_state() != numpy_before:
        raise _drawn_in_python("a function of `numpy.random`", "")


def _numpy_state() -> tuple[bytes, int]:
    state: Any = numpy.random.get_state(legacy=False)
    return state["state"]["key"].tobytes(), state["state"]["pos"]


def _refusing(draw: Any, name: str, is_user_file: Callable[[str], bool]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        frame = inspect.currentframe()
        caller = frame.f_back if frame and threading.get_ident() == thread else None
        if caller is not None and is_user_file(caller.f_code.co_filename):
            raise _drawn_in_python(f"{name}()", f"{caller.f_code.co_filename}:{caller.f_lineno}")
        return draw(*args, **kwargs)

    return refuse


def _drawn_in_python(what: str, where: str) -> CaptureError:
    return CaptureError(
        f"the forward pass draws a random number in Python ({what}); a static graph would keep "
        "the first one for every batch",
        where=where,
        allowed="random tensors (torch.rand, torch.randn, dropout, ...), drawn anew for each batch",
        hint="set layerdrop, mask_time_prob or apply_spec_augment to off in the model's "
        "configuration; or choose with a tensor: torch.where(torch.rand(()) < p, x, layer(x))",
    )
