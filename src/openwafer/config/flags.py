"""The command line that every `run.py` has.

Decides the flags, their short names and choices, and how a wrong one is reported. Does not decide
defaults (RunConfig has them: a flag that is not given must not hide the file's value) nor how flags
and file merge (params.py).

The documented flags are those of the CS-2 software 1.6; the group "openwafer" is ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, get_args

from openwafer.config.runconfig import MODES, PipelineSchedule, no_effect_notices, with_port
from openwafer.errors import ConfigError, nearest

__all__ = ["ExtraArgsParser", "ParsedFlags", "get_parser", "notices", "parse"]

ExtraArgsParser = Callable[[], Sequence[argparse.ArgumentParser]]
"""The user's function: gives parsers (made with add_help=False) whose flags are added to ours."""


class ParsedFlags(NamedTuple):
    """What a command line says.

    params_path: the parameter file; None where it was not given and need not be.
    overrides: every documented flag, None where it was not given; ours only where given.
    extra: values of the user's own flags.
    """

    params_path: str | None
    overrides: dict[str, Any]
    extra: dict[str, Any]


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as a ConfigError (exit code 2), with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"command line: {message}", where="command line", hint="--help lists the flags"
        )

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        first = unknown[0].split("=", 1)[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        what = f"unknown flag {first}" if first.startswith("-") else f"unexpected text {first!r}"
        raise ConfigError(
            what,
            where="command line",
            allowed=", ".join(flag for flag in flags if flag.startswith("--")),
            hint=nearest(first, flags),
        )


def get_parser(
    extra_args_parser_fn: ExtraArgsParser | None = None,
    *,
    prog: str | None = None,
    description: str = "Validate, compile, train, evaluate or predict with a model.",
) -> argparse.ArgumentParser:
    """The parser, with the user's flags added.

    Args:
        prog, description: for `--help`.

    Raises:
        ConfigError: a flag of the user's parsers is also one of ours.
    """
    parents = list(extra_args_parser_fn()) if extra_args_parser_fn else []
    try:
        parser = _Parser(
            parents=parents,
            allow_abbrev=False,
            prog=prog,
            description=description,
        )
        _add_documented(parser)
        _add_ours(parser)
    except argparse.ArgumentError as error:
        raise ConfigError(
            f"a flag of extra_args_parser_fn is taken: {error}",
            where="extra_args_parser_fn",
            allowed="flags that `--help` does not list; parsers made with add_help=False",
        ) from None
    return parser


def parse(
    argv: Sequence[str] | None = None,
    *,
    extra_args_parser_fn: ExtraArgsParser | None = None,
    needs_params: bool = True,
    prog: str | None = None,
    description: str = "Validate, compile, train, evaluate or predict with a model.",
) -> ParsedFlags:
    """Parse a command line (`sys.argv[1:]` if None).

    Args:
        needs_params: `--params` must be given.
        prog, description: for `--help`.

    Raises:
        ConfigError: a flag is unknown, misses its value or has a wrong one; `--mode` is missing
            although the model is to run; `--validate_only` together with `--compile_only`.
        SystemExit: `--help`.
    """
    parser = get_parser(extra_args_parser_fn, prog=prog, description=description)
    assert isinstance(parser, _Parser)
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if unknown:
        parser.refuse_unknown(unknown)
    given = vars(namespace)
    documented, ours = _destinations(_add_documented), _destinations(_add_ours)
    overrides = {key: given[key] for key in documented}
    overrides.update({key: given[key] for key in ours if given[key] is not None})
    extra = {key: value for key, value in given.items() if key not in {*documented, *ours}}
    params_path = overrides.pop("params")
    if params_path is None and needs_params:
        raise ConfigError(
            "the flag --params is missing",
            where="command line",
            allowed="-p FILE or --params FILE",
        )
    _check(overrides)
    return ParsedFlags(params_path, overrides, extra)


def notices(given: Mapping[str, object]) -> list[str]:
    """One line per given flag that has no effect here.

    `params.resolve` says the same of flags and file together.
    """
    return no_effect_notices(given)


def _check(overrides: dict[str, Any]) -> None:
    if overrides["compile_only"] and overrides["validate_only"]:
        raise ConfigError(
            "--compile_only and --validate_only exclude each other",
            where="command line",
            allowed="one of them; --compile_only validates too",
        )
    if overrides["mode"] is None:
        if not (overrides["compile_only"] or overrides["validate_only"]):
            raise ConfigError(
                "the flag --mode is missing",
                where="command line",
                allowed=f"--mode {', '.join(MODES)}",
            )
        overrides["mode"] = "train"
    if overrides["cs_ip"] is not None:
        try:
            overrides["cs_ip"] = with_port(overrides["cs_ip"])
        except ConfigError as error:
            error.where = "command line: --cs_ip"
            raise


def _destinations(add: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """The names that one group of flags fills."""
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return list(vars(parser.parse_args([])))


def _add_documented(parser: argparse.ArgumentParser) -> None:
    """All flags of release 1.6. None is the default of each."""
    add = parser.add_argument_group("documented").add_argument
    add(
        "-p",
        "--params",
        metavar="FILE",
        help="YAML file of parameters (a script needs one; for a model of the zoo: differences)",
    )
    add(
        "-m",
        "--mode",
        choices=list(MODES),
        help="what to do (a script needs it unless --validate_only or --compile_only is given)",
    )
    add("--config", metavar="NAME", help="use this top-level key of the file as the parameters")
    add("-o", "--model_dir", metavar="DIR", help="checkpoints, plans, logs (<run.py>/model_dir)")
    add("-c", "--compile_dir", metavar="DIR", help="compiled plans (model_dir)")
    add(
        "-cs",
        "--cs_ip",
        metavar="ADDRESS",
        help="run compiled; `local`, or HOST[:PORT] where the coordinator listens",
    )
    _add_switch(parser, "-cpu", "--cpu", text="compute on the CPU even if there is a GPU")
    _add_switch(parser, "--compile_only", text="compile, run nothing")
    _add_switch(parser, "--validate_only", text="stop after kernel matching")
    _add_switch(parser, "--multireplica", text="let the compiler choose the number of replicas")
    _add_switch(parser, "--appliance", text="weight streaming on this machine")
    add("--fabric_config_file", metavar="FILE", help="overrides for the machine")
    add("--checkpoint_path", metavar="FILE", help="checkpoint to start from")
    _add_switch(
        parser, "--is_pretrained_checkpoint", text="take matching weights only, start at step 0"
    )
    add(
        "--logging",
        type=str.upper,
        choices=["CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"],
        help="log level (INFO)",
    )
    add(
        "--num_csx",
        type=int,
        metavar="N",
        help="wafers, or processes, that share a batch (1)",
    )
    _add_without_effect(parser)


def _add_without_effect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("documented, without effect here").add_argument
    add("-dist_addr", "--dist_addr", metavar="HOST:PORT")
    add("-dist_backend", "--dist_backend", choices=["nccl", "mpi", "gloo"])
    add("-init_method", "--init_method", metavar="URL")
    add("--credentials_path", metavar="FILE")
    add("--mgmt_address", metavar="HOST:PORT")
    add("--num_wgt_servers", type=int, metavar="N")
    add("--debug_args_path", metavar="FILE")
    add("--mount_dirs", nargs="+", metavar="DIR")
    add("--python_paths", nargs="+", metavar="DIR")
    add("--volume_mount_path", metavar="FILE")


def _add_ours(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("openwafer").add_argument
    add(
        "--execution_mode",
        choices=["auto", "layer_pipelined", "weight_streaming"],
        help="how the plan is run (auto: by model size and device memory)",
    )
    add("--num_stages", type=int, metavar="N", help="processes that share the layers out (1)")
    add("--num_replicas", type=int, metavar="N", help="copies that train in parallel (1)")
    add("--num_microbatches", type=int, metavar="N", help="parts of each batch (by stages)")
    add(
        "--pipeline_schedule",
        choices=list(get_args(PipelineSchedule)),
        help="order of the stages' work (1f1b)",
    )
    add("--device", choices=["auto", "cpu", "cuda"], help="device that computes (auto)")
    add("--machine", metavar="NAME", help="wafer to plan for (wse2)")
    add(
        "--layer_compiler",
        choices=["auto", "eager", "inductor"],
        help="how layers run: TorchInductor, as they are, or by size (auto)",
    )
    add("--weight_store", metavar="STORE", help="ram, or disk:DIR (ram)")
    add(
        "--checkpoint_shard_size",
        metavar="SIZE",
        help="split checkpoints into files of about this size, as 4GiB (one file each)",
    )
    add("--device_memory", metavar="SIZE", help="what a streamed step may take, as 4GiB (no limit)")
    add(
        "--activations",
        choices=["auto", "keep", "recompute", "spill"],
        help="what a streamed step keeps of each layer for its backward pass (auto: what fits)",
    )
    add("--timeline", metavar="FILE", help="trace of weight streaming's first steps (Perfetto)")
    add("--seed", type=int, metavar="N", help="seed of weights, dropout and data order (1)")
    add("--max_steps", type=int, metavar="N", help="stop at this global step")
    add("--num_steps", type=int, metavar="N", help="train for this many more steps")
    add(
        "--no_autoresume",
        dest="autoresume",
        action="store_const",
        const=False,
        help="start anew although model_dir has a checkpoint",
    )


def _add_switch(parser: argparse.ArgumentParser, *names: str, text: str) -> None:
    """A flag without a value: True if given, None (the file decides) if not."""
    parser.add_argument(*names, action="store_const", const=True, help=text)
