"""`openwafer train gpt2/tiny --frontend tf` and its like: the TensorFlow twin of a model, run by an
Estimator with the parameters of a PyTorch run.

Decides which method of the Estimator does what, and how the keys of `runconfig` are said to it.
Does not decide which parameters and data those are (zoo_run.py), what model_fn and input_fn are
(tf/functions.py), or how a method does it (frontends/tf/estimator.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch

from openwafer.config.params import Params
from openwafer.config.runconfig import RunConfig
from openwafer.errors import CheckpointError, ConfigError
from openwafer.frontends.tf.checkpoint import all_checkpoints, latest_checkpoint
from openwafer.frontends.tf.estimator import CerebrasEstimator
from openwafer.frontends.tf.input_data import NumberedInput
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.messages import show_messages
from openwafer.frontends.tf.run_config import CSRunConfig
from openwafer.frontends.torch.params_file import write_params
from openwafer.frontends.torch.user_code import Mode
from openwafer.streaming import tasks
from openwafer.train.exit_codes import ending_with_exit_codes
from openwafer.train.position import Progress, training_budget
from openwafer.train.progress import configure_logging
from openwafer.zoo.catalog import data_info
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.outline import outline
from openwafer.zoo.tf.functions import input_fn_of, model_fn_of, spec_input_fn
from openwafer.zoo.tf.names import counterparts
from openwafer.zoo.tf.optimizer import trainer_section
from openwafer.zoo.zoo_run import ZooRun, input_of, prediction_writer, runs_nothing

__all__ = ["run_tf_model"]

_log = logging.getLogger("openwafer")

_NOT_THERE = (
    "num_stages",
    "num_replicas",
    "num_microbatches",
    "pipeline_schedule",
    "layer_compiler",
    "num_csx",
    "multireplica",
    "steps_per_epoch",
    "device_memory",
    "activations",
    "checkpoint_shard_size",
    "fabric_config_file",
    "save_stream_size",
    "enable_summaries",
    "timeline",
)
"""Keys of `runconfig` that only PyTorch models have."""

_MODES: dict[Mode, str] = {"train": "train", "eval": "eval", "predict": "infer"}
_POLICIES: dict[str, bool | str] = {
    "float32": False,
    "float16": True,
    "bfloat16": "mixed_bfloat16",
}
"""`mixed_precision` of a model that computes in a dtype."""


def run_tf_model(zoo_run: ZooRun) -> None:
    """Do what a command says.

    Raises:
        SystemExit: as `openwafer.run`.
    """
    configure_logging()
    with ending_with_exit_codes():
        _TFRun(zoo_run, zoo_run.read()).do()


class _TFRun:
    """One command, its parameters read."""

    def __init__(self, zoo_run: ZooRun, params: Params) -> None:
        self._zoo_run, self._params, self._run = zoo_run, params, params.runconfig
        _require_known(self._run)

    def do(self) -> None:
        """Compile, train, evaluate or predict."""
        configure_logging(self._run.logging)
        show_messages(trains_itself=self._run.cs_ip is None)
        self._params.log_notices()
        how: dict[str, Callable[[], None]] = {
            "train": self._train,
            "eval": self._evaluate,
            "eval_all": self._evaluate_all,
            "train_and_eval": self._train_and_evaluate,
            "predict": self._predict,
        }
        if runs_nothing(self._params.raw):
            self._compile()
            return
        where = "TensorFlow" if self._run.cs_ip is None else f"the machine at {self._run.cs_ip}"
        _log.info("%s: %s on %s", self._zoo_run.name, self._run.mode, where)
        if tasks.current().role != "worker":
            write_params(self._params, self._run.mode)
        how[self._run.mode]()

    # ------------------------------------------------------------------ model and data

    @cached_property
    def _config(self) -> ModelConfig:
        return self._zoo_run.config(self._params.raw, input_of(self._run.mode))

    @cached_property
    def _estimator(self) -> Any:
        family, params, run = self._zoo_run.family, self._params, self._run
        model = outline(family, self._config)
        _log.info("%s: %s parameters", self._zoo_run.name, f"{model.num_parameters:,}")
        section = None
        if params.optimizer is not None:
            raw = params.raw["optimizer"]
            section = trainer_section(params.optimizer, raw, counterparts(model))
        measures = "eval" in run.mode and params.raw["model"].get("compute_eval_metrics", True)
        model_fn = model_fn_of(
            family,
            self._config,
            optimizer=section,
            mixed_precision=_POLICIES[params.compute_dtype],
            with_metrics=measures,
            info=data_info(family, params.raw, "eval_input") if measures else None,
        )
        return CerebrasEstimator(
            model_fn,
            model_dir=str(run.model_dir),
            compile_dir=run.compile_dir,
            config=_estimator_config(run),
            warm_start_from=_begins_from(run),
        )

    def _loader(self, split: Mode) -> Any:
        # tf.data reads ahead in a thread; processes beside it would be forked from TensorFlow's.
        section = {**self._params.raw[f"{split}_input"], "num_workers": 0}
        return self._zoo_run.batches({**self._params.raw, f"{split}_input": section}, split)

    def _input_fn(self, split: Mode) -> NumberedInput:
        return input_fn_of(self._loader(split), seed=self._run.seed, repeats=False)

    @cached_property
    def _eval_input_fn(self) -> NumberedInput:
        return self._input_fn("eval")

    # ------------------------------------------------------------------ modes

    def _compile(self) -> None:
        split = "train" if self._run.trains else self._run.mode.removesuffix("_all")
        assert split in _MODES
        (example,) = self._zoo_run.batches(self._params.raw, split)
        self._estimator.compile(
            spec_input_fn(example), validate_only=self._run.validate_only, mode=_MODES[split]
        )

    def _train(self) -> None:
        loader, optimizer = self._loader("train"), self._params.optimizer
        assert optimizer is not None, "mode train needs the section"
        per_step = optimizer.grad_accum_steps
        # A run counts from step 0: an Estimator takes no optimizer state from elsewhere.
        start = Progress()
        budget = training_budget(
            self._run, num_batches=len(loader), grad_accum_steps=per_step, start=start
        )
        input_fn = input_fn_of(loader, seed=self._run.seed, repeats=True, batches_per_step=per_step)
        self._estimator.train(input_fn, max_steps=budget.final_step(start))

    def _evaluate(self, checkpoint: str | None = None) -> None:
        run = self._run
        if checkpoint is None and run.checkpoint_path is not None:
            checkpoint = _existing(str(run.checkpoint_path))
        found = self._estimator.evaluate(
            self._eval_input_fn,
            steps=run.eval_steps,
            checkpoint_path=checkpoint,
            use_cs=run.cs_ip is not None,
        )
        if found:  # a task that only streams data has none
            _log.info(
                "Evaluation: %s", ", ".join(f"{key} = {value:g}" for key, value in found.items())
            )

    def _evaluate_all(self) -> None:
        for path in all_checkpoints(self._run.model_dir):
            self._evaluate(path)

    def _train_and_evaluate(self) -> None:
        self._train()
        self._evaluate(latest_checkpoint(self._run.model_dir))

    def _predict(self) -> None:
        run = self._run
        writer = prediction_writer(self._zoo_run.family, self._params.raw, "predict_input")
        checkpoint = None if run.checkpoint_path is None else _existing(str(run.checkpoint_path))
        batches = self._estimator.predict(
            self._input_fn("predict"),
            checkpoint_path=checkpoint,
            yield_single_examples=False,
            use_cs=run.cs_ip is not None,
        )
        for number, batch in enumerate(batches, start=1):
            writer.update_on_host(**{key: torch.from_numpy(rows) for key, rows in batch.items()})
            if number == run.eval_steps:
                break
        _log.info("predictions in %s", writer.close())


def _require_known(run: RunConfig) -> None:
    """Raises: ConfigError: a key is set that would be left out in silence."""
    defaults = {entry.name: entry.default for entry in fields(RunConfig)}
    asked = [key for key in _NOT_THERE if getattr(run, key) != defaults[key]]
    if asked:
        raise ConfigError(
            f"TensorFlow models have no {', '.join(f'`{key}`' for key in asked)}",
            where=f"runconfig.{asked[0]}",
            hint="leave it out, or --frontend torch",
        )
    if not run.autoresume and latest_checkpoint(run.model_dir) is not None:
        raise ConfigError(
            "an Estimator goes on from the newest checkpoint in its folder",
            where="runconfig.autoresume",
            hint="another --model_dir, to begin anew",
        )


def _begins_from(run: RunConfig) -> str | None:
    if run.checkpoint_path is None or not run.trains:
        return None
    if not run.is_pretrained_checkpoint:
        raise ConfigError(
            "an Estimator takes from a checkpoint elsewhere the weights alone",
            where="runconfig.checkpoint_path",
            allowed="--is_pretrained_checkpoint with it; or --model_dir with the run to go on",
        )
    return _existing(str(run.checkpoint_path))


def _existing(prefix: str) -> str:
    if not tf.io.gfile.exists(f"{prefix}.index"):
        raise CheckpointError(
            "there is no such checkpoint",
            where=prefix,
            allowed="<model_dir>/model.ckpt-<step>",
            hint="`openwafer convert` makes one of a PyTorch checkpoint",
        )
    return prefix


def _estimator_config(run: RunConfig) -> CSRunConfig:
    on_cpu = run.cpu or run.device == "cpu"
    session = tf.compat.v1.ConfigProto(device_count={"GPU": 0}) if on_cpu else None
    return CSRunConfig(
        cs_ip=run.cs_ip,
        execution_mode=run.execution_mode,
        machine=run.machine,
        weight_store=run.weight_store,
        device="cpu" if on_cpu else run.device,
        tf_random_seed=run.seed,
        session_config=session,
        save_summary_steps=run.log_steps or None,
        save_checkpoints_steps=run.checkpoint_steps or None,
        keep_checkpoint_max=run.keep_checkpoint_max,
        log_step_count_steps=run.log_steps or None,
    )
