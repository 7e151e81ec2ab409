"""Whose line it is: the user's, not torch's, ours or the standard library's."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

import openwafer
from openwafer.frontends.torch.blame import (
    calling_user_line,
    definition_of,
    explain_export_failure,
    innermost_user_line,
    user_line_of,
)

TORCH = Path(torch.__file__).parent
OURS = Path(openwafer.__file__).parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def frame(path: Path | str) -> str:
    return f'  File "{path}", line 7, in forward\n    return x\n'


@pytest.mark.parametrize(
    "foreign",
    [
        TORCH / "nn/modules/linear.py",
        OURS / "frontends/torch/capture.py",
        STDLIB / "contextlib.py",
        STDLIB / "copy.py",
        STDLIB / "collections/__init__.py",
        "<string>",
        "<eval_with_key>.12",
    ],
)
def test_frames_that_are_not_the_users(foreign: Path | str) -> None:
    stack = frame("/home/me/model.py") + frame(foreign)
    assert innermost_user_line(stack) == ("/home/me/model.py", 7)
    assert innermost_user_line(frame(foreign)) == ("", 0)


@pytest.mark.parametrize(
    "users",
    [
        TORCH.with_name("torchvision") / "models/resnet.py",
        TORCH.with_name("transformers") / "models/gpt2/modeling_gpt2.py",
        OURS.with_name("openwafer_models") / "model.py",
        "/home/me/torch/model.py",
        STDLIB / "site-packages/mine/model.py",
    ],
)
def test_frames_that_are(users: Path | str) -> None:
    assert innermost_user_line(frame(users) + frame(TORCH / "_ops.py")) == (str(users), 7)


def test_the_line_of_an_exception_and_of_a_call() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert user_line_of(caught.value.__traceback__).startswith(f"{__file__}:")
    place = calling_user_line()
    assert place is not None
    assert place[0] == __file__
    assert user_line_of(None) == ""


def test_definitions() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Base:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for call in (Model(), Base(), test_definitions):
        file, line = definition_of(call).rsplit(":", 1)
        assert file == __file__
        assert int(line) > 1
    assert definition_of(torch.nn.Linear(1, 1)) == ""
    assert definition_of(len) == ""


def test_an_unknown_failure_is_told_as_it_is() -> None:
    error = explain_export_failure(ValueError("first line\nsecond"))
    assert error.what.endswith("ValueError: first line")
    assert error.hint
    assert explain_export_failure(ValueError("")).what.endswith("ValueError: ")


def test_an_error_that_prints_a_fake_tensor_is_not_taken_for_a_missing_rule() -> None:
    error = explain_export_failure(RuntimeError("got FakeTensor(..., size=(2, 3)), want [3]"))
    assert "own code failed" in error.what
