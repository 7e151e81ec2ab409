"""The `openwafer` command.

Decides its subcommands and their arguments. Does not decide what they do: each calls one room.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from openwafer.errors import LaunchError, OpenWaferError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; gives the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return int(arguments.run(arguments))
    except OpenWaferError as error:
        print(f"ERROR:   {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openwafer",
        description="Validate, compile, train and evaluate models for a wafer, on any hardware.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    launch = commands.add_parser(
        "launch",
        help="start a script as several tasks on this machine, as srun would",
        usage="openwafer launch --tasks N -- COMMAND [ARGUMENT ...]",
    )
    launch.add_argument(
        "--tasks", type=int, required=True, help="number of tasks: one coordinator, N-1 workers"
    )
    launch.add_argument("script", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    launch.set_defaults(run=_launch)
    kernels = commands.add_parser("kernels", help="list the kernel library")
    kernels.add_argument("--family", help="kernels of this family alone, e.g. conv")
    kernels.add_argument("--op", help="kernels for this operation, e.g. gelu or aten.gelu.default")
    kernels.add_argument("--mode", help="kernels of this execution mode")
    kernels.add_argument("--json", action="store_true", help="for machines")
    kernels.set_defaults(run=_kernels)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _launch(arguments: argparse.Namespace) -> int:
    from openwafer.launch.local import launch_local

    command = arguments.script[1:] if arguments.script[:1] == ["--"] else arguments.script
    if not command:
        raise LaunchError(
            "there is no command to start",
            allowed="openwafer launch --tasks N -- COMMAND [ARGUMENT ...]",
            hint="openwafer launch --tasks 4 -- python run.py --mode train --params params.yaml "
            "--cs_ip 127.0.0.1:9000",
        )
    return launch_local(list(command), arguments.tasks)


def _kernels(arguments: argparse.Namespace) -> int:
    from openwafer.kernels.table import select_kernels, table_json, table_text

    chosen = select_kernels(family=arguments.family, op=arguments.op, mode=arguments.mode)
    print(table_json(chosen) if arguments.json else table_text(chosen))
    return 0


def _version(arguments: argparse.Namespace) -> int:
    from openwafer import __version__

    print(__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
