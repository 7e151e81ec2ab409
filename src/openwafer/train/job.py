"""One job: train, evaluate, both, or predict, from start to exit code.

Decides the order in which the parts of this room are opened, used and closed, and the last line
that the user sees. Does not decide what any of them does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from openwafer.config.runconfig import RunConfig
from openwafer.errors import CheckpointError, ConfigError
from openwafer.runtime.executor import Executor
from openwafer.runtime.timing.step_times import StepTimes
from openwafer.runtime.timing.timeline import NO_RECORDER
from openwafer.streaming.source import BatchSource, Mode
from openwafer.train.checkpoint import Checkpoint, OptimizerCodec, contents_of
from openwafer.train.checkpoint_dir import CheckpointFolder, whole_checkpoints
from openwafer.train.evaluation import EvalResult, EvalTools, evaluate
from openwafer.train.hooks import Hooks, MetricFunctions
from openwafer.train.loop import TrainResult, TrainTools, train
from openwafer.train.performance import (
    Meter,
    Performance,
    PlanFigures,
    slow_workers,
    write_performance,
)
from openwafer.train.position import Progress, training_budget
from openwafer.train.prediction import PredictionResult, predict
from openwafer.train.progress import Reporter
from openwafer.train.random_state import capture_random_state
from openwafer.train.signals import StopRequest
from openwafer.train.start import Start, start_evaluation, start_training
from openwafer.train.summaries import EvalRecorder, TrainRecorder

__all__ = ["Job", "JobResult", "run_job"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a job needs. The caller opens and closes the executor and the sources.

    train_source, eval_source, predict_source: needed where `run.mode` trains, evaluates, predicts.
    learning_rate_at: the rate that the step after global step n applies.
    model_shapes: shapes by state_dict name; None asks the executor for its state.
    device: as shown in the progress lines.
    times: where the executor records its work, if it does.
    busy_seconds: for "train", "eval" or "predict", how long each worker took for its batches.
    """

    executor: Executor
    run: RunConfig
    codec: OptimizerCodec
    learning_rate_at: Callable[[int], float]
    train_source: BatchSource | None = None
    eval_source: BatchSource | None = None
    predict_source: BatchSource | None = None
    grad_accum_steps: int = 1
    model_shapes: Mapping[str, tuple[int, ...]] | None = None
    plan_figures: PlanFigures = field(default_factory=PlanFigures)
    device: str = "cpu"
    hooks: Hooks = field(default_factory=Hooks)
    metrics: MetricFunctions = field(default_factory=MetricFunctions)
    times: StepTimes | None = None
    busy_seconds: Callable[[Mode], Mapping[int, float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How it went. `exit_code` is 0, or 128 plus the signal that ended it early."""

    exit_code: int
    start: Start
    training: TrainResult | None = None
    evaluation: EvalResult | None = None
    prediction: PredictionResult | None = None


def run_job(job: Job) -> JobResult:
    """Do what `job.run.mode` says.

    Training that is already complete is no error: the same command run twice (a requeued SLURM job,
    a script that is started again) says so and succeeds.

    Raises:
        OpenWaferError: whatever the user has to act on. What was logged and saved stays.
    """
    with StopRequest() as stop, ExitStack() as stack:
        reporter = Reporter(device=job.device, with_rates=job.run.use_cs)
        stack.callback(reporter.close)
        if job.run.mode in ("eval", "eval_all"):
            return _run_evaluation(job, reporter, stop, stack)
        if job.run.mode == "predict":
            return _run_prediction(job, reporter, stop)
        return _run_training(job, reporter, stop, stack)


def _run_training(job: Job, reporter: Reporter, stop: StopRequest, stack: ExitStack) -> JobResult:
    run, source = job.run, _required(job.train_source, "train")
    eval_source = _required(job.eval_source, "eval") if run.mode == "train_and_eval" else None
    folder = CheckpointFolder(
        run.model_dir,
        keep_max=run.keep_checkpoint_max,
        protected=run.checkpoint_path,
        shard_bytes=run.checkpoint_shard_bytes,
    )
    folder.remove_leftovers()
    start = start_training(run, job.executor, job.codec, expected=job.model_shapes)
    place, was_complete = _place(job, source, start)
    recorder, eval_recorder = _open_recorders(job, start, stack)
    if job.times is not None:
        stack.callback(job.times.close)  # also after an error: the steps before it may explain it
    tools = TrainTools(
        reporter=reporter,
        meter=Meter(),
        hooks=job.hooks,
        metrics=job.metrics,
        stop=stop,
        recorder=recorder,
        eval_recorder=eval_recorder if eval_source is not None else None,
        timeline=job.times.recorder if job.times is not None else NO_RECORDER,
        save=lambda progress: _save(job, folder, start, progress),
    )
    result = train(
        job.executor,
        source,
        eval_source,
        run=run,
        learning_rate_at=job.learning_rate_at,
        tools=tools,
        grad_accum_steps=job.grad_accum_steps,
        start=place,
    )
    _report_training(job, result, reporter, was_complete=was_complete)
    exit_code = stop.exit_code if result.stopped_by is not None else 0
    return JobResult(
        exit_code=exit_code, start=start, training=result, evaluation=result.evaluation
    )


def _run_evaluation(job: Job, reporter: Reporter, stop: StopRequest, stack: ExitStack) -> JobResult:
    """The weights of the run's checkpoint; of every checkpoint in its folder in mode eval_all."""
    source = _required(job.eval_source, "eval")
    meter = Meter()
    tools = EvalTools(
        reporter=reporter, meter=meter, hooks=job.hooks, metrics=job.metrics, stop=stop
    )
    start, result, recorder = Start(), None, None
    for run in _runs_to_evaluate(job.run):
        with meter.paused():  # loading the next one is no part of the speed
            start = start_evaluation(run, job.executor, expected=job.model_shapes)
        step = start.progress.global_step
        result = evaluate(job.executor, source, run=run, step=step, tools=tools)
        if not result.complete:
            _log.info(
                "Evaluation stopped by %s after %d batches",
                stop.requested.name if stop.requested else "request",
                result.num_batches,
            )
            return JobResult(exit_code=stop.exit_code, start=start, evaluation=result)
        reporter.evaluated(avg_loss=result.avg_loss, metrics=result.metrics)
        if recorder is None:
            recorder = EvalRecorder(run.model_dir)
            stack.callback(recorder.close)
        recorder.log_evaluation(step, avg_eval_loss=result.avg_loss, metrics=result.metrics)
    meter.stop()
    # A name of its own: the figures of the training run in the same folder are kept.
    _write_performance(job, "eval", meter.result())
    reporter.completed("Evaluation")
    return JobResult(exit_code=0, start=start, evaluation=result)


def _runs_to_evaluate(run: RunConfig) -> list[RunConfig]:
    """The run as it is, or in mode eval_all one for each whole checkpoint, oldest first.

    Raises:
        CheckpointError: eval_all, and there is none.
    """
    if run.mode != "eval_all":
        return [run]
    paths = whole_checkpoints(run.model_dir)
    if not paths:
        raise CheckpointError(
            "there is no checkpoint to evaluate",
            where=str(run.model_dir),
            hint="train with `checkpoint_steps` and the same --model_dir first",
        )
    _log.info("Evaluating %d checkpoint(s) of %s", len(paths), run.model_dir)
    return [replace(run, checkpoint_path=path) for path in paths]


def _run_prediction(job: Job, reporter: Reporter, stop: StopRequest) -> JobResult:
    run, source = job.run, _required(job.predict_source, "predict")
    start = start_evaluation(run, job.executor, expected=job.model_shapes)
    meter = Meter()
    tools = EvalTools(
        reporter=reporter, meter=meter, hooks=job.hooks, metrics=job.metrics, stop=stop
    )
    result = predict(job.executor, source, run=run, step=start.progress.global_step, tools=tools)
    meter.stop()
    if not result.complete:
        _log.info("Prediction stopped after %d batches: nothing is written", result.num_batches)
        return JobResult(exit_code=stop.exit_code, start=start, prediction=result)
    _write_performance(job, "predict", meter.result())
    reporter.completed("Prediction")
    return JobResult(exit_code=0, start=start, prediction=result)


def _place(job: Job, source: BatchSource, start: Start) -> tuple[Progress, bool]:
    """Where to train from, and whether that is already the end.

    A file given by `--checkpoint_path` that stands at the end of an epoch begins the next one:
    `num_epochs` are further epochs then.

    Raises:
        ConfigError: so does the file given by `--checkpoint_path`, of which no step is trained:
            most likely `max_steps`, which is absolute, was meant as a number of further steps.
    """
    budget = training_budget(
        job.run,
        num_batches=source.num_batches,
        grad_accum_steps=job.grad_accum_steps,
        start=start.progress,
        quiet=True,
    )
    given = start.path is not None and not start.resumed
    if given and budget.epoch_over(start.progress):
        place = start.progress.next_epoch().as_origin()
        budget = replace(budget, last_epoch=_plus(place.epoch, job.run.num_epochs))
    else:
        place = start.progress
    if not budget.over(place):
        return place, False
    if given and place.global_step:
        raise ConfigError(
            f"the checkpoint is at global step {start.progress.global_step}, and training ends "
            f"at {budget.last_step}",
            where="runconfig.max_steps",
            allowed="more steps than the checkpoint has",
            hint="raise `max_steps`, or give `num_steps`, which counts from the checkpoint",
        )
    return place, True


def _plus(origin: int, count: int | None) -> int | None:
    return None if count is None else origin + count


def _open_recorders(job: Job, start: Start, stack: ExitStack) -> tuple[TrainRecorder, EvalRecorder]:
    step = start.progress.global_step
    model_dir = job.run.model_dir
    recorder = TrainRecorder(model_dir, start_step=step, save_losses=job.run.save_losses)
    stack.callback(recorder.close)
    both = job.run.mode == "train_and_eval"
    eval_recorder = EvalRecorder(model_dir, start_step=step if both else None)
    stack.callback(eval_recorder.close)
    return recorder, eval_recorder


def _save(job: Job, folder: CheckpointFolder, start: Start, progress: Progress) -> Path:
    checkpoint = Checkpoint(
        state=job.executor.borrowed_state(),
        progress=progress,
        learning_rate=job.learning_rate_at(progress.global_step),
        random_state=capture_random_state(job.run.seed),
        started_from=start.started_from,
    )
    return folder.save(progress.global_step, contents_of(checkpoint, job.codec))


def _report_training(
    job: Job, result: TrainResult, reporter: Reporter, *, was_complete: bool
) -> None:
    reporter.close()
    step, measured = result.progress.global_step, result.performance
    times = job.times.summary() if job.times is not None else None
    if measured.total_samples:
        steps = times.fields() if times is not None else {}
        _write_performance(job, "train", measured, steps)
    if times is not None:
        _log.info("%s", times.line)
    if result.stopped_by is not None:
        saved = result.checkpoint.name if result.checkpoint else "the newest checkpoint"
        _log.info(
            "Training stopped by %s at global step %d. The same command goes on from %s.",
            result.stopped_by.name,
            step,
            saved if job.run.autoresume else f"{saved}, given with --checkpoint_path",
        )
        return
    if was_complete:
        _log.info(
            "Training is already complete: global step %d. To train further, raise `max_steps` "
            "(`num_steps`, `num_epochs`); to begin again, use another `--model_dir`.",
            step,
        )
        return
    reporter.train_finished(
        total_samples=measured.total_samples, total_seconds=measured.total_seconds
    )
    reporter.completed("Training")
    if result.evaluation is not None:
        reporter.completed("Evaluation")


def _write_performance(
    job: Job, mode: Mode, measured: Performance, steps: Mapping[str, object] | None = None
) -> None:
    """The file; and one line, where workers are what the run waited for."""
    verdict = slow_workers(measured, job.busy_seconds(mode)) if job.busy_seconds else None
    if verdict is not None:
        _log.info("%s", verdict)
    name = "performance.json" if mode == "train" else f"performance_{mode}.json"
    further = {**(steps or {}), "input_bound_workers": verdict}
    write_performance(job.run.model_dir, measured, job.plan_figures, name=name, further=further)


def _required(source: BatchSource | None, what: str) -> BatchSource:
    if source is None:
        raise ConfigError(
            f"there are no {what} data",
            where=f"{what}_input",
            hint=f"pass a function that gives them: `run(model_fn, {what}_data_fn=…)`",
        )
    return source
