"""Calling the user's functions, so that their mistakes read as errors with the user's line.

Decides how the model and data functions are called and what they may give. Does not decide when
(run.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from openwafer.config.params import Params
from openwafer.errors import ConfigError, DataError, OpenWaferError
from openwafer.frontends.torch.base_model import PyTorchBaseModel
from openwafer.frontends.torch.blame import user_line_of
from openwafer.runtime.executor import Batch
from openwafer.streaming.loader import BatchSequence, build_sequence
from openwafer.streaming.shard import Shard

__all__ = [
    "DataFn",
    "Functions",
    "Mode",
    "ModelFn",
    "build_model",
    "calling_user_code",
    "first_batch",
    "make_sequence",
]

ModelFn = Callable[..., Any]
DataFn = Callable[[dict[str, Any]], Any]
Mode = Literal["train", "eval", "predict"]


@dataclass(frozen=True, slots=True)
class Functions:
    """The user's functions."""

    model: ModelFn
    train_data: DataFn | None
    eval_data: DataFn | None
    predict_data: DataFn | None = None

    def data(self, mode: Mode) -> DataFn:
        functions = {
            "train": self.train_data,
            "eval": self.eval_data,
            "predict": self.predict_data,
        }
        function = functions[mode]
        if function is None:
            raise ConfigError(
                f"run() was given no {mode}_data_fn, which this mode needs",
                where="--mode",
                hint=f"run(model_fn, …, {mode}_data_fn=…)",
            )
        return function


@contextmanager
def calling_user_code(what: str, kind: type[OpenWaferError], *, hint: str = "") -> Generator[None]:
    """Turn an exception of the user's code into an error with the user's line.

    `--logging DEBUG` shows the whole traceback.
    """
    try:
        yield
    except OpenWaferError:
        raise
    except Exception as error:
        text = f"{what}: {type(error).__name__}: {error}"
        raise kind(text, where=user_line_of(error.__traceback__), hint=hint) from error


def make_sequence(params: Params, functions: Functions, mode: Mode, shard: Shard) -> BatchSequence:
    function = functions.data(mode)

    def make_loader() -> Any:
        hint = f"check the {mode}_input section of the parameter file"
        with calling_user_code(f"{mode}_data_fn failed", DataError, hint=hint):
            return function(params.raw)

    torch.manual_seed(params.runconfig.seed)
    return build_sequence(make_loader, seed=params.runconfig.seed, shard=shard)


def first_batch(sequence: BatchSequence, mode: Mode) -> Batch:
    batches = sequence.epoch(0)
    try:
        return next(batches)
    except StopIteration:
        raise DataError(f"{mode}_data_fn gives no batch") from None
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def build_model(model_fn: ModelFn, params: Params, device: torch.device) -> PyTorchBaseModel:
    """Call `model_fn(params)`, or `model_fn(params, device)` where it takes one and the plain loop
    runs it; the compiled modes place weights themselves."""
    takes_device = len(inspect.signature(model_fn).parameters) > 1
    on = None if params.runconfig.use_cs else device
    hint = "check the model section of the parameter file"
    with calling_user_code("building the model failed", ConfigError, hint=hint):
        model = model_fn(params.raw, on) if takes_device else model_fn(params.raw)
    if not isinstance(model, PyTorchBaseModel):
        raise ConfigError(
            f"model_fn gave {type(model).__name__}",
            allowed="a subclass of openwafer.PyTorchBaseModel",
        )
    if on is not None:
        for module in model.modules().values():
            module.to(on)
    return model
