"""Parameters of a TensorFlow run: the YAML file, the command line, and the two together.

Decides the flags of a TensorFlow `run.py` and the keys of its `runconfig` section, which the flags
override. Does not decide what they do (run.py); `model`, `optimizer` and the input sections are the
user's, and passed on as they are.

Source of names and defaults: sections 1.2 and 2.6 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openwafer.config.schema import KeyPath, Report, build, limits
from openwafer.config.yaml_file import read_yaml
from openwafer.errors import ConfigError
from openwafer.frontends.tf.run_config import CSRunConfig

__all__ = ["TFRunParams", "create_arg_parser", "load_run_params", "make_run_config"]

_log = logging.getLogger("openwafer")

_NO_EFFECT = (
    "enable_distributed",
    "multiple_workers",
    "disable_standard_logs",
    "disable_input_pipeline_ckpt",
    "num_wgt_servers",
    "ir_mode",
)

Mode = Literal["train", "eval", "eval_all", "train_and_eval", "predict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TFRunParams:
    """The resolved `runconfig` section."""

    mode: Mode = "train"
    """What to do; eval_all evaluates every checkpoint of model_dir."""
    model_dir: Path = Path("model_dir")
    """Where checkpoints, plans and curves go."""
    compile_dir: Path | None = None
    """Where compiled plans go; null: model_dir."""
    cs_ip: str | None = None
    """`local`, or `host[:port]`; null runs TensorFlow itself."""
    steps: int | None = field(default=None, metadata=limits(minimum=1))
    """Train for this many more steps."""
    max_steps: int | None = field(default=None, metadata=limits(minimum=0))
    """Train to this global step."""
    eval_steps: int | None = None
    """Batches to evaluate; 0 or less is all of them."""
    predict_steps: int | None = field(default=None, metadata=limits(minimum=1))
    """Batches to predict; null is all of them."""
    validate_only: bool = False
    """Stop after kernel matching."""
    compile_only: bool = False
    """Compile fully, run nothing."""
    device: str | None = None
    """A TensorFlow device, such as /gpu:0, where TensorFlow itself runs."""
    checkpoint_path: Path | None = None
    """Checkpoint whose weights a new run begins with, or that is evaluated."""
    multireplica: bool = False
    """Copies of the model on one wafer; training only."""
    execution_mode: Literal["auto", "layer_pipelined", "weight_streaming"] = "auto"
    """How the plan is run."""
    machine: str = "wse2"
    """Name of the wafer specification to plan for."""
    weight_store: str = "ram"
    """Where weights rest between uses: `ram`, or `disk:DIR`."""
    save_summary_steps: int = field(default=100, metadata=limits(minimum=1))
    """Steps between two summaries of TensorFlow itself."""
    save_checkpoints_steps: int = field(default=1000, metadata=limits(minimum=1))
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoint_max: int = field(default=5, metadata=limits(minimum=0))
    """Newest checkpoints to keep; 0 keeps all."""
    log_step_count_steps: int | None = field(default=None, metadata=limits(minimum=1))
    """Steps between two log lines; null: save_summary_steps."""
    tf_random_seed: int | None = field(default=None, metadata=limits(minimum=0))
    """Seed of weights and data order."""
    throttle_secs: int = 0
    """Seconds between two evaluations of train_and_eval on TensorFlow itself."""

    # No effect here; see _NO_EFFECT.
    enable_distributed: bool = False
    """Several GPUs under TensorFlow's own strategies."""
    multiple_workers: bool = False
    """Several hosts under TensorFlow's own strategies."""
    disable_standard_logs: bool = False
    """Left to the log level."""
    disable_input_pipeline_ckpt: bool = False
    """A run that goes on reads its data from the front."""
    num_wgt_servers: int | None = None
    """Weight servers of the appliance."""
    ir_mode: str | None = None
    """Intermediate form of the original's compiler."""

    @property
    def use_cs(self) -> bool:
        return self.cs_ip is not None

    @property
    def compiles_only(self) -> bool:
        return self.validate_only or self.compile_only


def create_arg_parser(default_model_dir: Path | str) -> argparse.ArgumentParser:
    """The flags of a TensorFlow run.py; those that are not given are None."""
    parser = argparse.ArgumentParser(argument_default=None)
    add = parser.add_argument
    add("-p", "--params", required=True, help="YAML file with all parameters")
    add("-o", "--model_dir", default=str(default_model_dir), help="checkpoints, plans and curves")
    add("--cs_ip", help="`local`, or host[:port]; without it TensorFlow itself runs")
    add("--steps", type=int, help="train this many more steps")
    add("--max_steps", type=int, help="train to this global step")
    add("--eval_steps", type=int, help="batches to evaluate; 0 or less is all of them")
    modes = ("train", "eval", "eval_all", "train_and_eval", "predict")
    add("-m", "--mode", required=True, choices=modes, help="what to do")
    for name, text in (
        ("validate_only", "stop after kernel matching"),
        ("compile_only", "compile fully, run nothing"),
        ("multireplica", "copies of the model on one wafer; training only"),
    ):
        add(f"--{name}", action="store_true", default=None, help=text)
    add("--device", help="a TensorFlow device, such as /gpu:0")
    add("--checkpoint_path", help="checkpoint to begin with, or to evaluate")
    add("--save_summary_steps", type=int, help="overrides the parameter file")
    add("--save_checkpoints_steps", type=int, help="overrides the parameter file")
    add(
        "--execution_mode",
        choices=("auto", "layer_pipelined", "weight_streaming"),
        help="how the plan is run",
    )
    add("--machine", help="wafer specification to plan for")
    add("--weight_store", help="`ram`, or `disk:DIR`")
    return parser


def load_run_params(
    argv: Sequence[str] | None, default_model_dir: Path | str
) -> tuple[TFRunParams, dict[str, Any]]:
    """The checked `runconfig`, and all parameters with it, flags over file.

    Raises:
        ConfigError: the file cannot be read, or a key of `runconfig` is wrong.
        SystemExit: the command line is wrong, or `--help`.
    """
    given = vars(create_arg_parser(default_model_dir).parse_args(argv))
    file = read_yaml(given.pop("params"))
    params: dict[str, Any] = dict(file.values)
    section = dict(params.get("runconfig") or {})
    section.update({key: value for key, value in given.items() if value is not None})

    def locate(path: KeyPath) -> str:
        on_line = len(path) == 2 and given.get(str(path[1])) is not None
        return f"--{path[1]}" if on_line else file.locate(path)

    report = Report()
    run = build(TFRunParams, section, path=("runconfig",), locate=locate, report=report)
    report.raise_if_any()
    assert run is not None, "a section failed without a report"
    _check(run)
    for name in _NO_EFFECT:
        if section.get(name):
            _log.info("`%s` has no effect here", name)
    params["runconfig"] = section | {"mode": run.mode, "model_dir": str(run.model_dir)}
    return run, params


def _check(run: TFRunParams) -> None:
    if run.validate_only and run.compile_only:
        raise ConfigError(
            "--compile_only and --validate_only exclude each other",
            where="command line",
            allowed="one of them; --compile_only validates too",
        )
    if run.multireplica:
        raise ConfigError(
            "there are no replicas for TensorFlow models yet",
            where="runconfig.multireplica",
            hint="leave the flag out; the results are the same",
        )
    if run.steps is not None and run.max_steps is not None:
        raise ConfigError(
            "`steps` and `max_steps` exclude each other", where="runconfig", hint="drop one"
        )


def make_run_config(run: TFRunParams) -> CSRunConfig:
    """The config of an Estimator for these parameters."""

    def device_fn(operation: Any) -> str | None:
        return run.device

    return CSRunConfig(
        cs_ip=run.cs_ip,
        execution_mode=run.execution_mode,
        machine=run.machine,
        weight_store=run.weight_store,
        tf_random_seed=run.tf_random_seed,
        save_summary_steps=run.save_summary_steps,
        save_checkpoints_steps=run.save_checkpoints_steps,
        keep_checkpoint_max=run.keep_checkpoint_max,
        log_step_count_steps=run.log_step_count_steps or run.save_summary_steps,
        device_fn=device_fn if run.device else None,
    )
