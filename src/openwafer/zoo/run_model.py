"""`openwafer train gpt2/tiny` and its like: a model of the catalog through the same run as a
user's script.

Decides what the run's functions are: data from `openwafer.data`, and the model with its loss,
metrics and predictions. Does not decide which parameters and data those are (zoo_run.py) nor the
order of a run (frontends/torch/run.py). A model's TensorFlow twin is run by tf/run.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openwafer.frontends.torch.base_model import PyTorchBaseModel
from openwafer.frontends.torch.metrics import PredictionWriter
from openwafer.frontends.torch.run import plan_functions, run_functions
from openwafer.frontends.torch.user_code import Functions
from openwafer.plan.plan import Plan
from openwafer.train.job import JobResult
from openwafer.zoo.catalog import data_info
from openwafer.zoo.family import EvalMetrics
from openwafer.zoo.model import AnyModel, Batch, Logits
from openwafer.zoo.outline import outline
from openwafer.zoo.zoo_run import ZooRun, input_of, prediction_writer, runs_nothing

__all__ = ["ZooRunModel", "plan_model", "run_model"]

_log = logging.getLogger("openwafer")


def run_model(command: str, argv: Sequence[str]) -> JobResult | None:
    """Run one of `COMMANDS` with the arguments that follow it.

    Returns:
        How it went; None where nothing was run, or TensorFlow's twin was.

    Raises:
        SystemExit: as `run`.
    """
    zoo_run = ZooRun(command, argv)
    if zoo_run.wants_tensorflow:
        from openwafer.zoo.tf.run import run_tf_model

        run_tf_model(zoo_run)
        return None
    return run_functions(_functions(zoo_run), zoo_run.read)


def plan_model(argv: Sequence[str]) -> Plan:
    """The plan of `openwafer compile` with these arguments.

    Raises:
        OpenWaferError: wrong arguments, or a model that cannot be planned.
    """
    zoo_run = ZooRun("compile", argv)
    return plan_functions(_functions(zoo_run), zoo_run.read())


class ZooRunModel(PyTorchBaseModel):
    """A zoo model as a run takes it: the loss in training, the metrics with it in evaluation, the
    predictions in mode predict.

    Args:
        metrics: None for none.
        writer: of the predictions; None outside of mode predict.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        model: AnyModel,
        name: str,
        *,
        metrics: EvalMetrics | None = None,
        writer: PredictionWriter | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model: AnyModel
        self._name, self._metrics, self._writer = name, metrics, writer
        super().__init__(params, model, device)

    def display_name(self) -> str:
        return self._name

    def __call__(self, data: Batch) -> Tensor:
        model = self.model
        logits = model.logits(**data)
        if self._writer is not None:
            rows = model.predictions(logits, **data)
            self._writer(unique_ids=data["unique_ids"], **rows)
            return _some_scalar(logits)
        if self._metrics is not None and not model.training:
            self._metrics.update(logits, data)
        return model.loss(logits, **data)


def _some_scalar(logits: Logits) -> Tensor:
    """In the place of a loss, where there may be no labels."""
    tensor = logits if isinstance(logits, Tensor) else next(iter(logits.values()))
    return tensor.float().mean()


def _functions(zoo_run: ZooRun) -> Functions:
    return Functions(
        partial(_model, zoo_run),
        lambda params: zoo_run.batches(params, "train"),
        lambda params: zoo_run.batches(params, "eval"),
        lambda params: zoo_run.batches(params, "predict"),
    )


def _model(zoo_run: ZooRun, params: dict[str, Any], device: torch.device | None) -> ZooRunModel:
    mode, family = params["runconfig"]["mode"], zoo_run.family
    section = input_of(mode)
    config = zoo_run.config(params, section)
    model = outline(family, config) if runs_nothing(params) else family.model(config)
    _log.info("%s: %s parameters", zoo_run.name, f"{model.num_parameters:,}")
    metrics = writer = None
    if mode == "predict":
        writer = prediction_writer(family, params, section)
    elif "eval" in mode and params["model"].get("compute_eval_metrics", True):
        info = data_info(family, params, "eval_input")
        metrics = family.metrics(model.config, info)
    return ZooRunModel(params, model, zoo_run.name, metrics=metrics, writer=writer, device=device)
