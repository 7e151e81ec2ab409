"""`openwafer train gpt2/tiny` and its like: a model of the catalog through the same run as a
user's script.

Decides the flags that such a command has besides those of every run, and what the run's functions
are: data from `openwafer.data`, and the model with its loss, metrics and predictions. Does not
decide the order of a run (frontends/torch/run.py).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from openwafer.config.flags import parse
from openwafer.config.params import Params, merge_flags, resolve
from openwafer.config.schema import Locate
from openwafer.errors import ConfigError
from openwafer.frontends.torch.base_model import PyTorchBaseModel
from openwafer.frontends.torch.metrics import PredictionWriter
from openwafer.frontends.torch.run import plan_functions, run_functions
from openwafer.frontends.torch.user_code import Functions, Mode
from openwafer.plan.plan import Plan
from openwafer.train.job import JobResult
from openwafer.zoo.catalog import Override, data_info, family_of, full_name, load, model_config
from openwafer.zoo.commands import COMMANDS
from openwafer.zoo.evaluation_data import numbered
from openwafer.zoo.family import EvalMetrics, Family
from openwafer.zoo.model import AnyModel, Batch, Logits, ModelConfig
from openwafer.zoo.outline import outline

__all__ = ["ZooRunModel", "plan_model", "run_model"]

_log = logging.getLogger("openwafer")

_INPUTS = ("train_input", "eval_input", "predict_input")


def run_model(command: str, argv: Sequence[str]) -> JobResult | None:
    """Run one of `COMMANDS` with the arguments that follow it.

    Raises:
        SystemExit: as `run`.
    """
    zoo_run = _ZooRun(command, argv)
    return run_functions(zoo_run.functions, zoo_run.read)


def plan_model(argv: Sequence[str]) -> Plan:
    """The plan of `openwafer compile` with these arguments.

    Raises:
        OpenWaferError: wrong arguments, or a model that cannot be planned.
    """
    zoo_run = _ZooRun("compile", argv)
    params = zoo_run.read()
    return plan_functions(zoo_run.functions, params)


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


class _ZooRun:
    """One command: its parameters once they are read, and the functions of its run."""

    def __init__(self, command: str, argv: Sequence[str]) -> None:
        self._command, self._argv = command, tuple(argv)
        self._name = ""
        self._locate: Locate = str

    @property
    def functions(self) -> Functions:
        return Functions(
            self.model,
            lambda params: self.batches(params, "train"),
            lambda params: self.batches(params, "eval"),
            lambda params: self.batches(params, "predict"),
        )

    @property
    def _family(self) -> Family:
        return family_of(self._name)

    def read(self) -> Params:
        """The parameters: the catalog's, `--params`, `--set`, then the flags."""
        text = COMMANDS[self._command]
        flags = parse(
            (*self._argv, *self._implied()),
            extra_args_parser_fn=lambda: [_own_flags()],
            needs_params=False,
            prog=f"openwafer {self._command}",
            description=f"{text[0].upper()}{text[1:]}.",
        )
        own = dict(flags.extra)
        overrides = dict(flags.overrides)
        self._name = full_name(str(own["name"]))
        self._check_mode(overrides)
        if overrides.pop("config", None) is not None:
            raise ConfigError("--config is for files with several configurations", where="--config")
        given = [text for texts in own["set"] or [] for text in texts]
        loaded = load(self._name, [*given, *_input_overrides(own)], params_path=flags.params_path)
        said = loaded.raw.get("description")
        loaded.raw["description"] = f"{self._name}: {said}" if said else self._name
        merged = merge_flags(
            loaded.raw, loaded.locate, overrides, default_model_dir=Path("runs", self._name)
        )
        self._locate = merged.locate
        return resolve(merged.raw, merged.locate)

    def _implied(self) -> tuple[str, ...]:
        switches = {"validate": "--validate_only", "compile": "--compile_only"}
        if self._command in switches:
            return (switches[self._command],)
        given = any(flag in ("-m", "--mode") or flag.startswith("--mode=") for flag in self._argv)
        return () if given else ("--mode", self._command)

    def _check_mode(self, overrides: Mapping[str, Any]) -> None:
        mode = overrides["mode"]
        if self._command not in ("validate", "compile", mode):
            raise ConfigError(
                f"`openwafer {self._command}` with --mode {mode}",
                where="command line: --mode",
                allowed=f"openwafer {mode} {self._name}",
            )

    def batches(self, params: dict[str, Any], split: Mode) -> Any:
        """The loader of an input section; one example where nothing is run."""
        from openwafer.data import build_dataset, make_dataloader, measure_rate

        family, section = self._family, dict(params.get(f"{split}_input") or {})
        if self._runs_nothing(params):
            return [self._example(params, section, split)]
        if split != "train" and "drop_last" not in section:
            section.setdefault("pad_last_batch", True)
        dataset = build_dataset(family.task, section, split)
        self._check_sizes(params, dataset.info, f"{split}_input")
        _log.info("%s data: %s", split, dataset.info.source)
        if split == "train":
            probe = make_dataloader(dataset, {**section, "num_workers": 0}, split)
            _log.info("%s", measure_rate(probe, max_batches=20, max_seconds=0.5))
        loader: DataLoader[Any] = make_dataloader(dataset, section, split)
        return loader if split == "train" else numbered(loader)

    def _check_sizes(self, params: Mapping[str, Any], info: Any, section: str) -> None:
        """More tokens or labels in the data than the model has rows for would end in an index
        error, far from the cause."""
        for key, of_info in self._family.from_data.items():
            asked, there = params["model"].get(key), getattr(info, of_info)
            if isinstance(asked, int) and isinstance(there, int) and there > asked:
                raise ConfigError(
                    f"`model.{key}` is {asked}, and the data of `{section}` have {there}",
                    where=self._locate(("model", key)),
                    allowed=f"{there} or more",
                    hint=f"--set model.{key}={there}, or --data_dir with data of your own"
                    if not params[section].get("data_dir")
                    else f"--set model.{key}={there}",
                )

    def _runs_nothing(self, params: Mapping[str, Any]) -> bool:
        runconfig = params["runconfig"]
        return bool(runconfig.get("validate_only") or runconfig.get("compile_only"))

    def _example(self, params: Mapping[str, Any], section: Mapping[str, Any], split: Mode) -> Batch:
        """On "meta": shapes are all that is needed."""
        batch_size = int(section.get("batch_size", 8))
        model = outline(self._family, self._config(params, f"{split}_input"))
        with torch.device("meta"):
            batch = _shortened(model.example_batch(batch_size), section)
            if split != "train":
                batch.setdefault("unique_ids", torch.zeros(batch_size, dtype=torch.int64))
        return batch

    def _config(self, params: Mapping[str, Any], section: str) -> ModelConfig:
        config = model_config(self._family, params, self._locate, section=section)
        for key in self._family.from_data:
            # For the record of the run: what was taken from the data.
            params["model"][key] = getattr(config, key)
        return config

    def model(self, params: dict[str, Any], device: torch.device | None) -> ZooRunModel:
        mode = params["runconfig"]["mode"]
        section = "train_input" if "train" in mode else f"{mode.removesuffix('_all')}_input"
        config = self._config(params, section)
        runs = not self._runs_nothing(params)
        model = self._family.model(config) if runs else outline(self._family, config)
        _log.info("%s: %s parameters", self._name, f"{model.num_parameters:,}")
        metrics = writer = None
        if mode == "predict":
            folder = Path(params["runconfig"]["model_dir"], "predict")
            names = data_info(self._family, params, section).label_names
            writer = PredictionWriter(
                folder / "predictions.jsonl", partial(_with_labels, names) if names else None
            )
        elif "eval" in mode and params["model"].get("compute_eval_metrics", True):
            info = data_info(self._family, params, "eval_input")
            metrics = self._family.metrics(model.config, info)
        return ZooRunModel(params, model, self._name, metrics=metrics, writer=writer, device=device)


def _with_labels(names: Sequence[str], unique_id: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, with the names of predicted classes."""
    return {**row, "label": _named(names, row["prediction"])} if "prediction" in row else row


def _named(names: Sequence[str], classes: Any) -> Any:
    if isinstance(classes, list):
        return [_named(names, each) for each in cast("list[Any]", classes)]
    return names[classes]


def _own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("name", metavar="NAME", help="a name that `openwafer zoo` lists")
    parser.add_argument("--data_dir", metavar="DIR", help="your data (default: embedded data)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="samples in a batch")
    parser.add_argument(
        "--set",
        action="append",
        nargs="+",
        metavar="SECTION.KEY=VALUE",
        help="one value of the parameters, e.g. model.layers=4",
    )
    return parser


def _input_overrides(own: Mapping[str, Any]) -> list[Override]:
    return [
        Override(f"{section}.{key}", own[key], f"command line: --{key}")
        for key in ("data_dir", "batch_size")
        if own[key] is not None
        for section in _INPUTS
    ]


def _shortened(batch: Batch, section: Mapping[str, Any]) -> Batch:
    """An example of the section's own sequence length, where that is less than the model's."""
    length = cast("int | None", section.get("max_sequence_length"))
    longest = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    if length is None or length >= longest:
        return batch
    return {
        name: tensor[:, :length] if tensor.dim() > 1 and tensor.shape[1] == longest else tensor
        for name, tensor in batch.items()
    }
