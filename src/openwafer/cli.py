"""The `openwafer` command.

Decides its subcommands and their arguments. Does not decide what they do: each calls one room.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openwafer.errors import LaunchError, OpenWaferError
from openwafer.zoo.commands import COMMANDS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; gives the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(given)
    except OpenWaferError as error:
        print(f"ERROR:   {error}", file=sys.stderr)
        return error.exit_code


def _dispatch(given: list[str]) -> int:
    if given and given[0] in _OWN_ARGUMENTS:
        return _OWN_ARGUMENTS[given[0]](given[0], given[1:])
    parser = _parser()
    arguments = parser.parse_args(given)
    if arguments.command is None:
        parser.print_help()
        return 0
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openwafer",
        description="Validate, compile, train and evaluate models for a wafer, on any hardware.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    zoo = commands.add_parser("zoo", help="list the reference models")
    zoo.add_argument("family", nargs="?", help="models of this family alone, e.g. gpt2")
    zoo.add_argument("--json", action="store_true", help="for machines")
    zoo.set_defaults(run=_zoo)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("sweep", help="predict a model's throughput for several settings")
    _add_prepare(commands)
    _add_convert(commands)
    _add_submit(commands)
    launch = commands.add_parser(
        "launch",
        help="start a script as several tasks on this machine, as srun would",
        usage="openwafer launch --tasks N -- COMMAND [ARGUMENT ...]",
    )
    launch.add_argument(
        "--tasks", type=int, required=True, help="number of tasks: one coordinator, N-1 workers"
    )
    launch.add_argument(
        "--max_restarts",
        type=int,
        default=3,
        metavar="N",
        help="start a worker that was killed again, so many times (3)",
    )
    launch.add_argument("script", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    launch.set_defaults(run=_launch)
    kernels = commands.add_parser("kernels", help="list the kernel library")
    kernels.add_argument("--family", help="kernels of this family alone, e.g. conv")
    kernels.add_argument("--op", help="kernels for this operation, e.g. gelu or aten.gelu.default")
    kernels.add_argument("--mode", help="kernels of this execution mode")
    kernels.add_argument("--json", action="store_true", help="for machines")
    kernels.set_defaults(run=_kernels)
    bench = commands.add_parser("bench", help="run a benchmark of this checkout")
    bench.add_argument("name", choices=("machine-model",), help="which one")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    bench.set_defaults(run=_bench)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser("prepare", help="make training data of your files")
    kinds = prepare.add_subparsers(dest="kind", metavar="KIND", required=True)
    text = kinds.add_parser(
        "text",
        help="plain text to tokens",
        description="Make tokens of plain text files, in files that training reads as they are.",
    )
    add = text.add_argument
    add("inputs", nargs="+", metavar="PATH", help="text files, or folders of them")
    add("--out", required=True, metavar="DIR", help="where the tokens go; then your --data_dir")
    add("--tokenizer", default="bpe", help="bpe, wordpiece, byte, or a tokenizer.json (bpe)")
    add("--vocab_size", type=int, default=8192, metavar="N", help="of a trained one (8192)")
    add("--vocab_file", metavar="FILE", help="use this vocabulary instead of training one")
    add("--do_lower", action="store_true", help="lower case")
    add(
        "--documents",
        choices=["files", "blank_lines", "lines"],
        default="files",
        help="what a document is (files)",
    )
    add("--eval_fraction", type=float, default=0.0, metavar="F", help="share held out (0)")
    outputs = ["shards", "csv", "hdf5", "tfrecord"]
    add("--output", choices=outputs, default="shards", help="format (shards)")
    add("--data_processor", metavar="NAME", help="what will read the tfrecord files")
    add("--max_sequence_length", type=int, default=128, metavar="N", help="of examples (128)")
    add(
        "--max_predictions_per_seq",
        type=int,
        default=20,
        metavar="N",
        help="masked tokens of a tfrecord example (20)",
    )
    add("--num_workers", type=int, default=1, metavar="N", help="processes (1)")
    add("--seed", type=int, default=1, metavar="N", help="of what is held out (1)")
    text.set_defaults(run=_prepare_text)
    records = kinds.add_parser(
        "records",
        help="the data of a model of the zoo to TFRecords",
        description="Write a model's training and evaluation data as TFRecords.",
    )
    add = records.add_argument
    add("name", metavar="MODEL", help="a name that `openwafer zoo` lists")
    add("--out", required=True, metavar="DIR", help="where they go; then your --data_dir")
    add("--data_processor", metavar="NAME", help="what will read them (the one that fits)")
    add("--seed", type=int, default=1, metavar="N", help="of masks (1)")
    add("--set", action="append", nargs="+", default=[], metavar="SECTION.KEY=VALUE")
    records.set_defaults(run=_prepare_records)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="between Hugging Face or TensorFlow checkpoints and ours",
        description="Convert a Hugging Face folder or TensorFlow's model.ckpt-N to a checkpoint "
        "(.mdl), or a checkpoint to either.",
    )
    convert.add_argument("source", metavar="FROM", help="a folder, file.mdl, or model.ckpt-N")
    convert.add_argument("target", metavar="TO", help="file.mdl, a folder, or model.ckpt-N")
    convert.add_argument("--model", metavar="NAME", help="the model's name in the zoo")
    convert.add_argument(
        "--params", metavar="FILE", help="its parameters (params_train.yaml beside the checkpoint)"
    )
    convert.set_defaults(run=_convert)


def _add_submit(commands: Any) -> None:
    from openwafer.launch.command import add_submit_flags, run_submit

    submit = commands.add_parser(
        "submit",
        help="run a script as a SLURM job",
        usage="openwafer submit [flags] -- COMMAND [ARGUMENT ...]",
    )
    add_submit_flags(submit)
    submit.set_defaults(run=run_submit)


def _sweep(_: str, argv: Sequence[str]) -> int:
    from openwafer.zoo.what_if import run_sweep

    return run_sweep(argv)


def _run_model(command: str, argv: Sequence[str]) -> int:
    from openwafer.zoo.run_model import run_model

    run_model(command, argv)
    return 0


_OWN_ARGUMENTS: Mapping[str, Callable[[str, Sequence[str]], int]] = {
    "sweep": _sweep,
    **dict.fromkeys(COMMANDS, _run_model),
}
"""Subcommands that read what follows them themselves, given their name and that."""


def _zoo(arguments: argparse.Namespace) -> int:
    from openwafer.zoo.listing import entries, listing_json, listing_text

    found = entries(arguments.family)
    print(listing_json(found) if arguments.json else listing_text(found))
    return 0


def _prepare_text(arguments: argparse.Namespace) -> int:
    from openwafer.data.prepare import prepare

    result = prepare(
        arguments.inputs,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        vocab_file=arguments.vocab_file,
        do_lower=arguments.do_lower,
        documents=arguments.documents,
        eval_fraction=arguments.eval_fraction,
        output=arguments.output,
        data_processor=arguments.data_processor,
        max_sequence_length=arguments.max_sequence_length,
        max_predictions_per_seq=arguments.max_predictions_per_seq,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
    )
    print(result)
    return 0


def _prepare_records(arguments: argparse.Namespace) -> int:
    from openwafer.zoo.records import write_model_records

    written = write_model_records(
        arguments.name,
        arguments.out,
        overrides=[text for texts in arguments.set for text in texts],
        processor=arguments.data_processor,
        seed=arguments.seed,
    )
    counts = ", ".join(f"{split} {count:,}" for split, count in written.items())
    print(f"records: {counts}: {arguments.out}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from openwafer.zoo.convert import convert

    print(
        convert(arguments.source, arguments.target, model=arguments.model, params=arguments.params)
    )
    return 0


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
    return launch_local(list(command), arguments.tasks, max_restarts=arguments.max_restarts)


def _kernels(arguments: argparse.Namespace) -> int:
    from openwafer.kernels.table import select_kernels, table_json, table_text

    chosen = select_kernels(family=arguments.family, op=arguments.op, mode=arguments.mode)
    print(table_json(chosen) if arguments.json else table_text(chosen))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """Benchmarks are in the checkout, not in the package."""
    from importlib import import_module

    sys.path.insert(0, os.getcwd())
    try:
        module = import_module(f"benchmarks.{arguments.name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        raise LaunchError(
            f"the benchmark is not here: {error}",
            hint="run it in a checkout of the project, where `benchmarks/` is",
        ) from error
    return int(module.main(arguments.rest))


def _version(arguments: argparse.Namespace) -> int:
    from openwafer import __version__

    print(__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
