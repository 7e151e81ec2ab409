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

from openwafer.config.flags import ExtraArgsParser, parse
from openwafer.config.params import Params, load_params, resolve
from openwafer.errors import CheckpointError, ConfigError
from openwafer.frontends.torch.execution import execute
from openwafer.frontends.torch.metrics import forget_all_metrics
from openwafer.frontends.torch.preparation import (
    PreparedModel,
    compile_captured,
    compile_model,
)
from openwafer.frontends.torch.processes import must_be_started, start_tasks
from openwafer.frontends.torch.session import check_memory, serve_stages
from openwafer.frontends.torch.user_code import (
    DataFn,
    Functions,
    Mode,
    ModelFn,
    calling_user_code,
    make_sequence,
)
from openwafer.pipeline import validate_program
from openwafer.plan.plan import Plan
from openwafer.plan.text import plan_text
from openwafer.plan.validation import write_validation
from openwafer.runtime.process_group import join_group
from openwafer.streaming import tasks
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.meeting import open_coordinator
from openwafer.streaming.signals import OutlivedSignal
from openwafer.streaming.worker import run_worker, worker_shard
from openwafer.train.exit_codes import ending_with_exit_codes
from openwafer.train.job import JobResult
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
    with ending_with_exit_codes():
        result = _run_task(read_params(), functions)
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
    """What this task does of the run: everything, its part of the model, or its shard of the
    data."""
    config = params.runconfig
    tasks.set_num_compute(config.num_compute)
    environment = tasks.current()
    if must_be_started(environment):
        if code := start_tasks(config):
            sys.exit(code)
        return None
    compiles_only = config.validate_only or config.compile_only
    if environment.role == "worker":
        place = (environment.rank, environment.num_tasks)
        configure_logging(config.streamer_logging, task=place)
        if compiles_only or not config.use_cs or config.cs_ip == "local":
            _log.info("nothing to do here: task 0 alone runs this")
            return None
        _stream_batches(params, functions, environment)
        return None
    if environment.role == "peer":
        place = (environment.rank, environment.num_tasks)
        configure_logging(config.streamer_logging, task=place)
        _compute_with_others(PreparedModel(params, functions), environment)
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
        _compile_only(PreparedModel(params, functions))
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


def plan_functions(functions: Functions, params: Params) -> Plan:
    """The plan that `--compile_only` makes, from the cache of `model_dir` where it is there.

    Raises:
        OpenWaferError: the model cannot be captured, matched or planned.
    """
    model = PreparedModel(params, functions)
    captured = model.capture(model.modes[0])
    return compile_captured(model, captured, model.execution_mode(captured.program)).plan


def _compile_only(model: PreparedModel) -> None:
    config = model.params.runconfig
    mode = model.modes[0]
    captured = model.capture(mode)
    execution_mode = model.execution_mode(captured.program)
    _log.info(_BANNER.format("Starting Compilation"))
    if config.validate_only:
        report = validate_program(captured.program, execution_mode)
        write_validation(report, config.model_dir / "validate.json")
        report.raise_if_refused()
        _log.info("%s", report)
    else:
        compiled = compile_captured(model, captured, execution_mode)
        _log.info("%s", plan_text(compiled.plan))
        if config.device_memory is not None:
            check_memory(compiled, model.base.modules(), model.rules())
    _log.info(_BANNER.format("Compilation Completed"))
    what = {"train": "training", "eval": "evaluation", "predict": "prediction"}[mode]
    _log.info("Compile for %s completed successfully!", what)


def _execute(params: Params, functions: Functions, environment: tasks.TaskEnvironment) -> JobResult:
    config = params.runconfig
    streams = environment.role == "coordinator" and config.use_cs and config.cs_ip != "local"
    if not streams:
        return execute(PreparedModel(params, functions), None)
    assert config.cs_ip is not None
    # Listens from the start, so that workers may connect while the model compiles.
    with open_coordinator(config.cs_ip, environment) as coordinator:
        return execute(PreparedModel(params, functions), coordinator)


def _compute_with_others(model: PreparedModel, environment: tasks.TaskEnvironment) -> None:
    """As a process other than the first: capture and compile alike, then do as it says."""
    # Ctrl-C and SLURM's warning reach all tasks; the first one ends the others when it has saved.
    with OutlivedSignal():
        group = join_group(environment, model.device)
        try:
            compiled, evaluation = compile_model(model, writes=False)
            serve_stages(compiled, evaluation, model.base.modules(), model.rules(group), group)
        finally:
            group.close()
