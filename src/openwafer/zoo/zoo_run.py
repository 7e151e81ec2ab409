"""One command on a model of the zoo: its parameters and its data, for either framework.

Decides the flags that such a command has besides those of every run, what the batches of an input
section are, and which configuration the model has. Does not decide how a model is run: run_model.py
for PyTorch, tf/run.py for TensorFlow.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from openwafer.config.flags import parse
from openwafer.config.params import Params, merge_flags, resolve
from openwafer.config.schema import Locate
from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics import PredictionWriter
from openwafer.frontends.torch.user_code import Mode
from openwafer.zoo.catalog import Override, data_info, family_of, full_name, load, model_config
from openwafer.zoo.commands import COMMANDS
from openwafer.zoo.evaluation_data import numbered
from openwafer.zoo.family import Family
from openwafer.zoo.model import Batch, ModelConfig
from openwafer.zoo.outline import outline

__all__ = ["ZooRun", "input_of", "prediction_writer", "runs_nothing"]

_log = logging.getLogger("openwafer")

_INPUTS = ("train_input", "eval_input", "predict_input")


class ZooRun:
    """A command with the arguments that follow it. `read` comes first: the rest is known then."""

    def __init__(self, command: str, argv: Sequence[str]) -> None:
        self._command, self._argv = command, tuple(argv)
        self.name = ""
        self.locate: Locate = str

    @property
    def wants_tensorflow(self) -> bool:
        """Whether the arguments ask for the TensorFlow model; known before they are read."""
        pairs = zip(self._argv, (*self._argv[1:], ""), strict=True)
        return ("--frontend", "tf") in pairs or "--frontend=tf" in self._argv

    @property
    def family(self) -> Family:
        return family_of(self.name)

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
        self.name = full_name(str(own["name"]))
        self._check_mode(overrides)
        if overrides.pop("config", None) is not None:
            raise ConfigError("--config is for files with several configurations", where="--config")
        given = [text for texts in own["set"] or [] for text in texts]
        loaded = load(self.name, [*given, *_input_overrides(own)], params_path=flags.params_path)
        said = loaded.raw.get("description")
        loaded.raw["description"] = f"{self.name}: {said}" if said else self.name
        folder = f"{self.name}_tf" if self.wants_tensorflow else self.name
        merged = merge_flags(
            loaded.raw, loaded.locate, overrides, default_model_dir=Path("runs", folder)
        )
        self.locate = merged.locate
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
                allowed=f"openwafer {mode} {self.name}",
            )

    def batches(self, params: dict[str, Any], split: Mode) -> Any:
        """The loader of an input section; one example where nothing is run."""
        from openwafer.data import build_dataset, make_dataloader, measure_rate

        family, section = self.family, dict(params.get(f"{split}_input") or {})
        if runs_nothing(params):
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
        for key, of_info in self.family.from_data.items():
            asked, there = params["model"].get(key), getattr(info, of_info)
            if isinstance(asked, int) and isinstance(there, int) and there > asked:
                raise ConfigError(
                    f"`model.{key}` is {asked}, and the data of `{section}` have {there}",
                    where=self.locate(("model", key)),
                    allowed=f"{there} or more",
                    hint=f"--set model.{key}={there}, or --data_dir with data of your own"
                    if not params[section].get("data_dir")
                    else f"--set model.{key}={there}",
                )

    def _example(self, params: Mapping[str, Any], section: Mapping[str, Any], split: Mode) -> Batch:
        """On "meta": shapes are all that is needed."""
        batch_size = int(section.get("batch_size", 8))
        model = outline(self.family, self.config(params, f"{split}_input"))
        with torch.device("meta"):
            batch = _shortened(model.example_batch(batch_size), section)
            if split != "train":
                batch.setdefault("unique_ids", torch.zeros(batch_size, dtype=torch.int64))
        return batch

    def config(self, params: Mapping[str, Any], section: str) -> ModelConfig:
        """The checked `model` section, with what the data of `section` say."""
        config = model_config(self.family, params, self.locate, section=section)
        for key in self.family.from_data:
            # For the record of the run: what was taken from the data.
            params["model"][key] = getattr(config, key)
        return config


def input_of(mode: str) -> str:
    """The section with a mode's data; the first of them for train_and_eval."""
    return "train_input" if "train" in mode else f"{mode.removesuffix('_all')}_input"


def runs_nothing(params: Mapping[str, Any]) -> bool:
    """Whether the command only validates or compiles."""
    runconfig = params["runconfig"]
    return bool(runconfig.get("validate_only") or runconfig.get("compile_only"))


def prediction_writer(family: Family, params: Mapping[str, Any], section: str) -> PredictionWriter:
    """Of `<model_dir>/predict/predictions.jsonl`, with the data's names for classes."""
    path = Path(params["runconfig"]["model_dir"], "predict", "predictions.jsonl")
    names = data_info(family, params, section).label_names
    return PredictionWriter(path, partial(_with_labels, names) if names else None)


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
        "--frontend",
        choices=("torch", "tf"),
        default="torch",
        help="run the model in PyTorch, or its twin in TensorFlow (torch)",
    )
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
