"""`run()`: a user's script from its command line to its exit code.

Decides the order of a run: parameters, data, model, validate, compile, train, evaluate or predict,
and who does what where several tasks run the same script. Does not decide what any of these steps
does.

Nothing is written before the parameters, the data and the model have been found usable.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from openwafer.config.flags import ExtraArgsParser, parse
from openwafer.config.params import Params, load_params, resolve
from openwafer.config.runconfig import RunConfig
from openwafer.errors import CheckpointError, ConfigError, OpenWaferError, PlanError
from openwafer.frontends.torch.capture import Captured, capture_step
from openwafer.frontends.torch.metric_functions import metric_functions
from openwafer.frontends.torch.metrics import forget_all_metrics
from openwafer.frontends.torch.params_file import write_params
from openwafer.frontends.torch.plain import PlainExecutor
from openwafer.frontends.torch.recording import ModuleSummaries, SavedStream
from openwafer.frontends.torch.session import RunRules, choose_device, make_executor
from openwafer.frontends.torch.user_code import (
    DataFn,
    Functions,
    Mode,
    ModelFn,
    build_model,
    calling_user_code,
    first_batch,
    make_sequence,
)
from openwafer.kernels.kernel import ExecutionMode
from openwafer.machine.spec import load_machine
from openwafer.optim.schedule import learning_rate_at
from openwafer.optim.state import from_torch_state_dict, to_torch_state_dict
from openwafer.pipeline import CompiledProgram, choose_mode, compile_program, validate_program
from openwafer.plan.plan import Plan
from openwafer.plan.text import plan_text
from openwafer.plan.validation import write_validation
from openwafer.runtime.executor import Executor
from openwafer.streaming import tasks
from openwafer.streaming.coordinator import Coordinator
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.meeting import forget_meeting, open_coordinator
from openwafer.streaming.shard import Shard
from openwafer.streaming.source import BatchSource
from openwafer.streaming.worker import run_worker, worker_shard
from openwafer.train.checkpoint import OptimizerCodec
from openwafer.train.hooks import Hooks
from openwafer.train.job import Job, JobResult, run_job
from openwafer.train.performance import PlanFigures
from openwafer.train.progress import configure_logging

__all__ = ["plan_functions", "run", "run_functions"]

_log = logging.getLogger("openwafer")

ParamsFn = Callable[[dict[str, Any]], dict[str, Any] | None]

_BANNER = "=============== {} ==============="


def run(
    model_fn: ModelFn,
    train_data_fn: DataFn | None = None,
    eval_data_fn: DataFn | None = None,
    default_params_fn: ParamsFn | None = None,
    extra_args_parser_fn: ExtraArgsParser | None = None,
    *,
    predict_data_fn: DataFn | None = None,
    argv: Sequence[str] | None = None,
) -> JobResult | None:
    """Validate, compile, train, evaluate or predict, as command line and parameter file say.

    Args:
        model_fn: `model_fn(params)` or `model_fn(params, device)` gives a PyTorchBaseModel.
        train_data_fn, eval_data_fn, predict_data_fn: `fn(params)` gives a torch DataLoader (or any
            iterable, or a function that gives one) of batches of one shape.
        default_params_fn: completes or replaces the parameter dictionary.
        extra_args_parser_fn: gives further argument parsers; their values go to `runconfig`.
        argv: the command line; None takes that of the process.

    Returns:
        How training or evaluation went; None where nothing was run.

    Raises:
        SystemExit: 2 for an error that the user can act on, printed; 130 or 143 after a signal.
    """
    default_model_dir = _calling_folder() / "model_dir"
    functions = Functions(model_fn, train_data_fn, eval_data_fn, predict_data_fn)

    def read() -> Params:
        return _read_params(argv, default_params_fn, extra_args_parser_fn, default_model_dir)

    return run_functions(functions, read)


def run_functions(functions: Functions, read_params: Callable[[], Params]) -> JobResult | None:
    """`run` for parameters from elsewhere than a command line and a file.

    Args:
        functions: as given to `run`.
        read_params: gives the checked parameters; its errors are reported as a run's.

    Returns, and raises: as `run`.
    """
    configure_logging()
    try:
        params = read_params()
        result = _run_task(params, functions)
    except OpenWaferError as error:
        _log.error("%s", error)
        _log.debug("raised here", exc_info=error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _log.error("interrupted: the last checkpoint is the newest one in model_dir")
        sys.exit(130)
    if result is not None and result.exit_code:
        sys.exit(result.exit_code)
    return result


def _calling_folder() -> Path:
    """The folder of the script that called `run`."""
    return Path(inspect.stack()[2].filename).resolve().parent


def _read_params(
    argv: Sequence[str] | None,
    default_params_fn: ParamsFn | None,
    extra_args_parser_fn: ExtraArgsParser | None,
    default_model_dir: Path,
) -> Params:
    flags = parse(argv, extra_args_parser_fn=extra_args_parser_fn)
    assert flags.params_path is not None, "parse refuses a command line without --params"
    loaded = load_params(
        flags.params_path, flags.overrides, extra=flags.extra, default_model_dir=default_model_dir
    )
    raw = loaded.raw
    if default_params_fn is not None:
        try:
            with calling_user_code("default_params_fn failed", ConfigError):
                raw = default_params_fn(raw) or raw
        except ConfigError:
            # Most likely it stumbled over what is wrong in the file: say that, with its line.
            resolve(loaded.raw, loaded.locate, extra_keys=loaded.extra_keys)
            raise
    return resolve(raw, loaded.locate, extra_keys=loaded.extra_keys)


def _run_task(params: Params, functions: Functions) -> JobResult | None:
    """What this task does of the run: everything, or streaming its shard of the data."""
    environment, config = tasks.current(), params.runconfig
    compiles_only = config.validate_only or config.compile_only
    if environment.role == "worker":
        place = (environment.rank, environment.num_tasks)
        configure_logging(config.streamer_logging, task=place)
        if compiles_only or not config.use_cs or config.cs_ip == "local":
            _log.info("nothing to do here: task 0 alone runs this")
            return None
        _stream_batches(params, functions, environment)
        return None
    configure_logging(config.logging)
    params.log_notices()
    forget_all_metrics()
    if config.checkpoint_path is not None and not config.checkpoint_path.is_file():
        raise CheckpointError(
            "there is no such checkpoint",
            where=str(config.checkpoint_path),
            hint="checkpoints are <model_dir>/checkpoint_<step>.mdl",
        )
    if compiles_only:
        _compile_only(_Model(params, functions))
        return None
    return _execute(params, functions, environment)


def _stream_batches(
    params: Params, functions: Functions, environment: tasks.TaskEnvironment
) -> None:
    shard = worker_shard(environment)

    def sequence_of(mode: Mode) -> BatchSequence:
        return make_sequence(params, functions, mode, shard)

    assert params.runconfig.cs_ip is not None
    run_worker(sequence_of, params.runconfig.cs_ip, environment)


class _Model:
    """The user's model and what is made of it, each part when it is first asked for."""

    def __init__(self, params: Params, functions: Functions) -> None:
        self.params, self.functions = params, functions
        config = params.runconfig
        self.device = choose_device(config.device, cpu=config.cpu)
        self.sequences = {mode: self._local(mode) for mode in self.modes}
        self.examples = {mode: first_batch(self.sequences[mode], mode) for mode in self.modes}
        torch.manual_seed(config.seed)
        self.base = build_model(functions.model, params, self.device)

    @property
    def modes(self) -> tuple[Mode, ...]:
        mode = self.params.runconfig.mode
        return ("train", "eval") if mode == "train_and_eval" else (mode,)

    def _local(self, mode: Mode) -> BatchSequence:
        return make_sequence(self.params, self.functions, mode, Shard(0, 1))

    def rules(self) -> RunRules:
        params, config = self.params, self.params.runconfig
        optimizer = params.optimizer if config.trains else None
        schedule = optimizer.learning_rate if optimizer else None
        return RunRules(
            optimizer=optimizer,
            learning_rate_at=lambda step: learning_rate_at(schedule, step) if schedule else 0.0,
            device=self.device,
            seed=config.seed,
            compute_dtype=params.compute_dtype,
            weight_store=config.weight_store,
            guard_loss=config.check_loss_values,
        )

    def capture(self, mode: Mode) -> Captured:
        return capture_step(
            self.base.modules(),
            self.base,
            self.examples[mode],
            training=mode == "train",
            name=self.base.display_name(),
            autocast_dtype=self.rules().autocast_dtype,
        )


def plan_functions(functions: Functions, params: Params) -> Plan:
    """The plan that `--compile_only` makes, from the cache of `model_dir` where it is there.

    Raises:
        OpenWaferError: the model cannot be captured, matched or planned.
    """
    model = _Model(params, functions)
    captured = model.capture(model.modes[0])
    mode = choose_mode(params.runconfig.execution_mode, captured.program, model.device)
    return _compile(model, captured, mode).plan


def _compile_only(model: _Model) -> None:
    config = model.params.runconfig
    mode = model.modes[0]
    captured = model.capture(mode)
    execution_mode = choose_mode(config.execution_mode, captured.program, model.device)
    _log.info(_BANNER.format("Starting Compilation"))
    if config.validate_only:
        report = validate_program(captured.program, execution_mode)
        write_validation(report, config.model_dir / "validate.json")
        report.raise_if_refused()
        _log.info("%s", report)
    else:
        compiled = _compile(model, captured, execution_mode)
        _log.info("%s", plan_text(compiled.plan))
    _log.info(_BANNER.format("Compilation Completed"))
    what = {"train": "training", "eval": "evaluation", "predict": "prediction"}[mode]
    _log.info("Compile for %s completed successfully!", what)


def _compile(model: _Model, captured: Captured, execution_mode: ExecutionMode) -> CompiledProgram:
    params, config = model.params, model.params.runconfig

    def compile_for(mode: ExecutionMode) -> CompiledProgram:
        return compile_program(
            captured.program,
            machine=load_machine(config.machine, config.fabric_config_file),
            execution_mode=mode,
            compile_dir=config.compile_dir or config.model_dir,
            optimizer=params.optimizer if captured.program.training else None,
            compute_dtype=params.compute_dtype,
            num_microbatches=_grad_accum_steps(params),
            num_replicas=_num_replicas(config) if captured.program.training else 1,
            num_systems=config.num_csx,
        )

    try:
        compiled = compile_for(execution_mode)
    except PlanError as error:
        if config.execution_mode != "auto" or execution_mode == "weight_streaming":
            raise
        _log.warning("auto takes weight_streaming: %s", error.what)
        compiled = compile_for("weight_streaming")
    if compiled.from_cache:
        _log.info("Found a cached compilation for this model configuration")
    _log.info(
        "%s plan in %.2f s: %s", compiled.plan.execution_mode, compiled.seconds, compiled.directory
    )
    return compiled


def _num_replicas(config: RunConfig) -> int:
    """`multireplica` without a number lets the compiler choose (-1)."""
    return -1 if config.multireplica and config.num_replicas == 1 else config.num_replicas


def _grad_accum_steps(params: Params) -> int:
    return params.optimizer.grad_accum_steps if params.optimizer else 1


def _execute(params: Params, functions: Functions, environment: tasks.TaskEnvironment) -> JobResult:
    config = params.runconfig
    streams = environment.role == "coordinator" and config.use_cs and config.cs_ip != "local"
    if not streams:
        return _execute_with(_Model(params, functions), None)
    assert config.cs_ip is not None
    # Listens from the start, so that workers may connect while the model compiles.
    with open_coordinator(config.cs_ip, environment) as coordinator:
        return _execute_with(_Model(params, functions), coordinator)


def _execute_with(model: _Model, coordinator: Coordinator | None) -> JobResult:
    params, config = model.params, model.params.runconfig
    executor, figures = _executor(model)
    write_params(params, config.mode)
    sources: dict[str, BatchSource] = dict(model.sequences)
    if coordinator is not None:
        coordinator.wait_for_workers()
        forget_meeting(tasks.current())
        sources = {mode: coordinator.source(mode) for mode in model.modes}
    try:
        result = run_job(
            Job(
                executor=executor,
                run=config,
                codec=_codec(model),
                learning_rate_at=model.rules().learning_rate_at,
                train_source=sources.get("train"),
                eval_source=sources.get("eval"),
                predict_source=sources.get("predict"),
                grad_accum_steps=_grad_accum_steps(params),
                plan_figures=figures,
                device=model.device.type,
                hooks=_hooks(model),
                metrics=metric_functions(config.mode),
            )
        )
        if config.show_debug_metrics:
            _show_counters(executor, figures, coordinator)
        if config.trains:
            # The user's own object ends up with the trained weights, as in the plain loop.
            model.base.model.load_state_dict(executor.state().model, strict=False)
        return result
    finally:
        executor.close()


def _show_counters(
    executor: Executor, figures: PlanFigures, coordinator: Coordinator | None
) -> None:
    """One line per counter: of the compiler, the executor, and the wait for each worker."""
    _log.info("Counter compile seconds: %.3f", figures.compile_seconds)
    for name, count in executor.counters().items():
        _log.info("Counter %s: %d", name, count)
    waited = coordinator.waited_seconds if coordinator is not None else {}
    for rank, seconds in waited.items():
        _log.info("Counter seconds waited for worker %d: %.3f", rank, seconds)


def _executor(model: _Model) -> tuple[Executor, PlanFigures]:
    rules, config = model.rules(), model.params.runconfig
    if not config.use_cs:
        executor = PlainExecutor(
            model.base.model,
            model.base,
            list(model.base.modules().values()),
            optimizer=rules.optimizer,
            learning_rate_at=rules.learning_rate_at,
            device=rules.device,
            seed=rules.seed,
            autocast_dtype=rules.autocast_dtype,
            guard_loss=rules.guard_loss,
        )
        return executor, PlanFigures()
    captured = {mode: model.capture(mode) for mode in model.modes}
    main = captured[model.modes[0]]
    execution_mode = choose_mode(config.execution_mode, main.program, model.device)
    compiled = _compile(model, main, execution_mode)
    evaluation = captured["eval"] if config.mode == "train_and_eval" else None
    executor = make_executor(compiled, evaluation, model.base.modules(), rules)
    return executor, _figures(compiled)


def _figures(compiled: CompiledProgram) -> PlanFigures:
    predicted, fabric = compiled.plan.predicted, compiled.plan.fabric
    return PlanFigures(
        est_samples_per_sec=predicted.samples_per_second,
        fabric_cores=fabric.fabric_pes,
        fabric_utilization=fabric.active_fraction,
        delta_t=predicted.delta_t_cycles,
        frequency_hz=float(predicted.clock_hz),
        compile_seconds=compiled.seconds,
    )


def _codec(model: _Model) -> OptimizerCodec:
    """The optimizer entry of checkpoints in torch's own format."""
    names = [name for name, _ in model.base.trainable_named_parameters()]
    config = model.params.optimizer

    def to_torch(state: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return to_torch_state_dict(config, names, state) if config and state else {}

    def from_torch(state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
        if not config or not state_dict:
            return {}
        return from_torch_state_dict(config, names, state_dict)

    return OptimizerCodec(to_torch=to_torch, from_torch=from_torch)


def _hooks(model: _Model) -> Hooks:
    config = model.params.runconfig
    if config.enable_summaries:
        return ModuleSummaries(model.base.model, config.model_dir)
    if config.save_stream_size:
        folder = config.model_dir / model.modes[0]
        return SavedStream(folder, config.save_stream_size, ordinal=tasks.get_ordinal())
    return Hooks()
