"""`CerebrasEstimator`: an Estimator whose target follows the address of a machine.

Decides, method by method, whether TensorFlow itself or the compiled run does the work. Does not
decide how either does it.

Source of names and arguments: CS-2 software 1.6 documentation, section 4.1 of the fact sheet.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openwafer.errors import ConfigError
from openwafer.frontends.tf.checkpoint import checkpoint_to_evaluate, newest_step
from openwafer.frontends.tf.cluster import set_tf_config
from openwafer.frontends.tf.compiled_run import CompiledRuns
from openwafer.frontends.tf.estimator_spec import for_tensorflow
from openwafer.frontends.tf.input_data import going_on
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import seeded
from openwafer.frontends.tf.run_config import CSRunConfig
from openwafer.frontends.tf.run_setup import RunSetup
from openwafer.frontends.tf.session_hooks import check_hooks, say_left_out
from openwafer.plan.text import plan_text
from openwafer.train.progress import configure_logging

__all__ = ["CerebrasEstimator"]

_log = logging.getLogger("openwafer")

_BANNER = "=============== {} ==============="


class CerebrasEstimator(tf.estimator.Estimator):
    """A `tf.estimator.Estimator` that can compile its model and run it on the wafer runtime.

    Without `cs_ip` in its config, TensorFlow trains, evaluates and predicts. With it, `train` does
    so on the wafer runtime, and `evaluate` and `predict` where `use_cs` is set.

    Args:
        model_fn: `model_fn(features, labels, mode[, params][, config])` → CSEstimatorSpec.
        model_dir: where checkpoints, plans and curves go.
        compile_dir: where compiled plans go; None is model_dir.
        config: CSRunConfig, or tf.estimator.RunConfig.
        params: given to model_fn and input_fn.
        warm_start_from: a checkpoint or tf.estimator.WarmStartSettings to begin with.
    """

    def __init__(
        self,
        model_fn: Any,
        model_dir: str | os.PathLike[str] | None = None,
        compile_dir: str | os.PathLike[str] | None = None,
        config: Any = None,
        params: dict[str, Any] | None = None,
        warm_start_from: Any = None,
    ) -> None:
        configure_logging()
        self._own_config = CSRunConfig.of(config)
        if self._uses_cs:
            set_tf_config()
        self._own_model_fn, self._warm_start = model_fn, warm_start_from
        super().__init__(
            model_fn=_plain(model_fn),
            model_dir=None if model_dir is None else os.fspath(model_dir),
            config=config,
            params=params,
            warm_start_from=warm_start_from,
        )
        self._compile_dir = Path(compile_dir) if compile_dir else Path(self.model_dir)

    # TensorFlow refuses subclasses that override its public methods; these are meant to.
    def _assert_members_are_not_overridden(self: Any) -> None:
        return

    @property
    def _uses_cs(self) -> bool:
        return self._own_config.cs_ip is not None

    def _compiled(self) -> CompiledRuns:
        return CompiledRuns(
            RunSetup(
                call=self._call_own_model_fn,
                params=self.params,
                config=self._own_config,
                model_dir=Path(self.model_dir),
                compile_dir=self._compile_dir,
                name=getattr(self._own_model_fn, "__name__", type(self._own_model_fn).__name__),
                warm_start=self._warm_start,
            )
        )

    def _call_own_model_fn(self, features: Any, labels: Any, mode: str) -> Any:
        given = {"labels": labels, "mode": mode, "params": self.params, "config": self.config}
        names = inspect.signature(self._own_model_fn).parameters
        if "labels" not in names and labels is not None:
            raise ConfigError(
                "model_fn does not take labels, but the input function gives them",
                allowed="model_fn(features, labels, mode, params)",
            )
        wanted = {name: value for name, value in given.items() if name in names}
        return self._own_model_fn(features, **wanted)

    def compile(
        self, input_fn: Any, validate_only: bool = False, mode: str = tf.estimator.ModeKeys.TRAIN
    ) -> None:
        """Compile the model for the wafer, or with `validate_only` match its operations only.

        Raises:
            OpenWaferError: an operation is not supported, or the model does not fit.
        """
        runs = self._compiled()
        _log.info(_BANNER.format("Starting Cerebras Compilation"))
        if validate_only:
            _log.info("%s", runs.validate(input_fn, mode))
        else:
            _log.info("%s", plan_text(runs.plan(input_fn, mode)))
        _log.info(_BANNER.format("Cerebras Compilation Completed"))

    def train(
        self,
        input_fn: Any,
        hooks: Sequence[Any] | None = None,
        steps: int | None = None,
        max_steps: int | None = None,
        saving_listeners: Any = None,
        use_cs: bool = True,
        sparsifier: Any = None,
    ) -> CerebrasEstimator:
        """Train for `steps` more steps, or to the global step `max_steps`.

        Raises:
            ConfigError: something that the compiled run does not have is asked for.
            OpenWaferError: the run cannot begin, or failed.
        """
        if not (self._uses_cs and use_cs):
            data = going_on(input_fn, newest_step(Path(self.model_dir)))
            return super().train(data, hooks, steps, max_steps, saving_listeners)
        for what, value in (
            ("saving_listeners", saving_listeners),
            ("sparsifier", sparsifier),
        ):
            if value:
                raise ConfigError(
                    f"train was given {what}, which need a session of TensorFlow in each step",
                    allowed="host_call for metrics; the loss is logged by itself",
                    hint="leave them out, or use_cs=False",
                )
        check_hooks(hooks)
        runs = self._compiled()
        if not runs.stream(input_fn, tf.estimator.ModeKeys.TRAIN):
            runs.train(input_fn, steps=steps, max_steps=max_steps, hooks=hooks)
        return self

    def evaluate(
        self,
        input_fn: Any,
        steps: int | None = None,
        hooks: Sequence[Any] | None = None,
        checkpoint_path: str | None = None,
        name: str | None = None,
        use_cs: bool = False,
    ) -> dict[str, Any]:
        """Loss and metrics over `steps` batches, or all there are.

        Raises:
            OpenWaferError: the run cannot begin, or failed.
        """
        if not (self._uses_cs and use_cs):
            path = checkpoint_to_evaluate(Path(self.model_dir), checkpoint_path)
            return super().evaluate(input_fn, steps, hooks, path, name)
        say_left_out(hooks)
        runs = self._compiled()
        if runs.stream(input_fn, tf.estimator.ModeKeys.EVAL):
            return {}
        folder = f"eval_{name}" if name else None
        return runs.evaluate(input_fn, steps=steps, checkpoint=checkpoint_path, name=folder)

    def predict(
        self,
        input_fn: Any,
        predict_keys: Any = None,
        hooks: Sequence[Any] | None = None,
        checkpoint_path: str | None = None,
        yield_single_examples: bool = True,
        num_samples: int | None = None,
        use_cs: bool = False,
    ) -> Iterator[Any]:
        """Predictions, one sample after the other or in batches.

        Raises:
            OpenWaferError: the run cannot begin, or failed.
        """
        if not (self._uses_cs and use_cs):
            path = checkpoint_to_evaluate(Path(self.model_dir), checkpoint_path)
            yield from super().predict(input_fn, predict_keys, hooks, path, yield_single_examples)
            return
        say_left_out(hooks)
        runs = self._compiled()
        if runs.stream(input_fn, tf.estimator.ModeKeys.PREDICT):
            return
        keys = [predict_keys] if isinstance(predict_keys, str) else predict_keys
        for batch in runs.predict(input_fn, checkpoint=checkpoint_path, num_samples=num_samples):
            chosen = {key: batch[key] for key in keys or batch}
            if not yield_single_examples:
                yield chosen
                continue
            for index in range(len(next(iter(chosen.values())))):
                yield {key: value[index] for key, value in chosen.items()}


def _plain(model_fn: Any) -> Any:
    """A model_fn for TensorFlow itself, with the same arguments and the seed of a compiled run."""
    names = list(inspect.signature(model_fn).parameters)

    def call(features: Any, labels: Any, mode: Any, params: Any, config: Any) -> Any:
        given = {"labels": labels, "mode": mode, "params": params, "config": config}
        wanted = {name: value for name, value in given.items() if name in names}
        with seeded(config.tf_random_seed):
            return for_tensorflow(model_fn(features, **wanted))

    return call
