"""`openwafer.tf.run`: a TensorFlow script from its command line to its exit code.

Decides the order of a run and which method of the Estimator does each part. Does not decide what
the flags are (run_params.py) nor what a method does (estimator.py).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from openwafer.errors import ConfigError
from openwafer.files import replacing, write_text
from openwafer.frontends.tf.checkpoint import all_checkpoints, latest_checkpoint
from openwafer.frontends.tf.estimator import CerebrasEstimator
from openwafer.frontends.tf.messages import show_messages
from openwafer.frontends.tf.run_params import TFRunParams, load_run_params, make_run_config
from openwafer.frontends.tf.warm_start import create_warm_start_settings
from openwafer.streaming import tasks
from openwafer.train.exit_codes import ending_with_exit_codes
from openwafer.train.progress import configure_logging

__all__ = ["run"]

_log = logging.getLogger("openwafer")

InputFn = Callable[..., Any]
ParamsFn = Callable[[dict[str, Any]], dict[str, Any] | None]


def run(
    model_fn: Callable[..., Any],
    train_input_fn: InputFn | None = None,
    eval_input_fn: InputFn | None = None,
    default_params_fn: ParamsFn | None = None,
    *,
    predict_input_fn: InputFn | None = None,
    output_layer: str | None = None,
    argv: Sequence[str] | None = None,
) -> Any:
    """Validate, compile, train, evaluate or predict, as command line and parameter file say.

    Args:
        model_fn: `model_fn(features, labels, mode, params)` gives a CSEstimatorSpec.
        train_input_fn, eval_input_fn, predict_input_fn: `fn(params)` gives a tf.data.Dataset.
        default_params_fn: completes or replaces the parameter dictionary.
        output_layer: part of the names of the variables that --checkpoint_path is not to set where
            training begins with it.
        argv: the command line; None takes that of the process.

    Returns:
        What the Estimator's method gives: metrics of an evaluation, the file of predictions.

    Raises:
        SystemExit: 2 for an error that the user can act on, printed; 130 after Ctrl-C.
    """
    folder = Path(inspect.stack()[1].filename).resolve().parent / "model_dir"
    configure_logging()
    with ending_with_exit_codes():
        settings, params = load_run_params(argv, folder)
        if default_params_fn is not None:
            params = default_params_fn(params) or params
        inputs = {"train": train_input_fn, "eval": eval_input_fn, "infer": predict_input_fn}
        return _Run(settings, params, model_fn, inputs, output_layer).do()


class _Run:
    """One call of `run`."""

    def __init__(
        self,
        settings: TFRunParams,
        params: dict[str, Any],
        model_fn: Callable[..., Any],
        inputs: dict[str, InputFn | None],
        output_layer: str | None,
    ) -> None:
        self._settings, self._params, self._inputs = settings, params, inputs
        begins_from = settings.checkpoint_path if settings.mode.startswith("train") else None
        self._estimator: Any = CerebrasEstimator(
            model_fn,
            model_dir=str(settings.model_dir),
            compile_dir=settings.compile_dir,
            config=make_run_config(settings),
            params=params,
            warm_start_from=create_warm_start_settings(
                {"checkpoint_path": begins_from}, output_layer
            ),
        )

    def do(self) -> Any:
        settings = self._settings
        show_messages(trains_itself=not settings.use_cs)
        _log.info("Running %s on %s", settings.mode, "CS-2" if settings.use_cs else "TensorFlow")
        if settings.compiles_only:
            return self._compile()
        if tasks.current().role != "worker":
            self._write_params()
        how = {
            "train": self._train,
            "eval": self._evaluate,
            "eval_all": self._evaluate_all,
            "train_and_eval": self._train_and_evaluate,
            "predict": self._predict,
        }
        return how[settings.mode]()

    def _input_fn(self, mode: str) -> Callable[[], Any]:
        function = self._inputs[mode]
        if function is None:
            what = {"infer": "predict"}.get(mode, mode)
            raise ConfigError(
                f"run() was given no {what}_input_fn, which this mode needs",
                where="--mode",
                hint=f"run(model_fn, …, {what}_input_fn=…)",
            )
        return lambda: function(self._params)

    def _compile(self) -> None:
        if tasks.current().role == "worker":
            _log.info("nothing to do here: task 0 alone compiles")
            return
        mode = {"predict": "infer", "eval": "eval", "eval_all": "eval"}.get(
            self._settings.mode, "train"
        )
        validate_only = self._settings.validate_only
        self._estimator.compile(self._input_fn(mode), validate_only=validate_only, mode=mode)

    def _train(self) -> None:
        settings = self._settings
        if settings.steps is None and settings.max_steps is None:
            raise ConfigError(
                "nothing says when training ends",
                where="runconfig",
                allowed="`max_steps` or `steps`",
                hint="add `max_steps: 1000` to `runconfig`",
            )
        self._estimator.train(
            self._input_fn("train"), steps=settings.steps, max_steps=settings.max_steps
        )

    def _eval_steps(self) -> int | None:
        steps = self._settings.eval_steps
        return None if steps is None or steps <= 0 else steps

    def _evaluate(self, checkpoint: str | None = None) -> dict[str, Any]:
        given = self._settings.checkpoint_path
        result = self._estimator.evaluate(
            self._input_fn("eval"),
            steps=self._eval_steps(),
            checkpoint_path=checkpoint or (str(given) if given else None),
            use_cs=self._settings.use_cs,
        )
        if result:  # a task that only streams data has none
            _log.info("Evaluation: %s", ", ".join(f"{k} = {v:g}" for k, v in result.items()))
        return result

    def _evaluate_all(self) -> list[dict[str, Any]]:
        return [self._evaluate(path) for path in all_checkpoints(self._settings.model_dir)]

    def _train_and_evaluate(self) -> dict[str, Any]:
        self._train()
        return self._evaluate(latest_checkpoint(self._settings.model_dir))

    def _predict(self) -> Path:
        """Written as the documented `predictions_{cs|tf}_{task_id}.npz`."""
        settings = self._settings
        batches: Iterator[Any] = self._estimator.predict(
            self._input_fn("infer"),
            checkpoint_path=str(settings.checkpoint_path) if settings.checkpoint_path else None,
            yield_single_examples=False,
            use_cs=settings.use_cs,
        )
        found: dict[str, list[Any]] = {}
        for number, batch in enumerate(batches, start=1):
            for key, value in batch.items():
                found.setdefault(key, []).append(value)
            if number == settings.predict_steps:
                break
        target = "cs" if settings.use_cs else "tf"
        name = f"predictions_{target}_{tasks.current().rank}.npz"
        path = settings.model_dir / "predict" / name
        with replacing(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {key: np.concatenate(found[key]) for key in found}
            np.savez(file, **arrays)
        _log.info("predictions in %s", path)
        return path

    def _write_params(self) -> None:
        mode = self._settings.mode
        path = self._settings.model_dir / mode / f"params_{mode}.yaml"
        write_text(path, yaml.safe_dump(self._params, sort_keys=False, default_flow_style=None))
