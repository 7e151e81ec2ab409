"""The command line."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from openwafer.config.flags import ParsedFlags, get_parser, notices, parse
from openwafer.config.params import load_params, resolve
from openwafer.config.runconfig import NO_EFFECT, RunConfig
from openwafer.errors import ConfigError

RUN = ["-p", "p.yaml", "-m", "train"]


def parse_text(text: str) -> ParsedFlags:
    return parse(shlex.split(text))


def test_short_and_long_names() -> None:
    long = parse_text(
        "--params p.yaml --mode eval --model_dir m --compile_dir c --cs_ip h --cpu "
        "--dist_addr a:1 --dist_backend gloo --init_method env://"
    )
    short = parse_text(
        "-p p.yaml -m eval -o m -c c -cs h -cpu -dist_addr a:1 -dist_backend gloo "
        "-init_method env://"
    )
    assert long == short
    assert long.params_path == "p.yaml"
    assert long.overrides["cs_ip"] == "h:9000"
    assert long.overrides["cpu"] is True
    assert long.overrides["validate_only"] is None


def test_every_flag_is_a_key_of_runconfig() -> None:
    given = parse_text(
        "-p p.yaml -m train --execution_mode auto --device cpu --machine m --weight_store ram "
        "--seed 3 --max_steps 4 --num_steps 5 --no_autoresume"
    )
    keys = set(given.overrides) - {"config"}
    assert keys <= set(RunConfig.__dataclass_fields__)
    assert given.overrides["autoresume"] is False
    assert given.overrides["seed"] == 3


def test_our_flags_leave_no_trace_when_not_given() -> None:
    assert not {"seed", "max_steps", "autoresume", "device"} & set(parse(RUN).overrides)


def test_mode_is_optional_when_nothing_runs() -> None:
    assert parse(["-p", "x", "--validate_only"]).overrides["mode"] == "train"
    assert parse(["-p", "x", "--compile_only"]).overrides["mode"] == "train"
    assert parse(["-p", "x", "--compile_only", "-m", "eval"]).overrides["mode"] == "eval"


@pytest.mark.parametrize(
    ("argv", "what", "hint"),
    [
        (["-m", "train"], "--params is missing", ""),
        (["-p", "x"], "--mode is missing", ""),
        ([*RUN, "--validate_onyl"], "unknown flag --validate_onyl", "`--validate_only`"),
        ([*RUN, "--max-steps=4"], "unknown flag --max-steps", "`--max_steps`"),
        ([*RUN, "--max_step", "4"], "unknown flag --max_step", "`--max_steps`"),
        ([*RUN, "stray"], "unexpected text 'stray'", ""),
        (["-p", "x", "-m", "trian"], "invalid choice", ""),
        ([*RUN, "--seed", "one"], "invalid int", ""),
        ([*RUN, "--model_dir"], "expected one argument", ""),
        ([*RUN, "--validate_only", "--compile_only"], "exclude each other", ""),
        ([*RUN, "--cs_ip", "h:x"], "cs_ip", ""),
    ],
)
def test_a_wrong_command_line_is_a_config_error(argv: list[str], what: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert what in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def extra_parser() -> list[argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--my_rate", type=float, default=0.5)
    parser.add_argument("--my_name")
    return [parser]


def test_the_users_own_flags_reach_runconfig_and_are_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "train_input: {}\nmodel: {}\noptimizer: {optimizer_type: sgd, learning_rate: 1}\n"
        "runconfig: {max_steps: 1}\n"
    )
    given = parse(["-p", str(path), "-m", "train"], extra_args_parser_fn=extra_parser)
    assert given.extra == {"my_rate": 0.5, "my_name": None}
    loaded = load_params(given.params_path, given.overrides, extra=given.extra, environ={})
    params = resolve(loaded.raw, loaded.locate, extra_keys=loaded.extra_keys)
    assert params.raw["runconfig"]["my_rate"] == 0.5
    assert params.runconfig.max_steps == 1


def test_a_flag_of_the_user_that_is_taken() -> None:
    with pytest.raises(ConfigError, match="--seed"):
        get_parser(lambda: [_with_flag("--seed")])
    with pytest.raises(ConfigError, match="-h"):
        get_parser(lambda: [argparse.ArgumentParser()])


def _with_flag(flag: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(flag)
    return parser


def test_notices_name_each_flag_without_effect() -> None:
    given = parse(
        [*RUN, "--credentials_path", "c", "--mount_dirs", "a", "b", "--num_wgt_servers", "3"]
    )
    said = notices(given.overrides)
    assert len(said) == 3
    assert all(
        any(f"`{key}`" in line for line in said) for key in ("credentials_path", "mount_dirs")
    )
    assert notices(parse(RUN).overrides) == []
    assert set(NO_EFFECT) <= set(RunConfig.__dataclass_fields__)


def test_help_lists_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    assert "--weight_store" in capsys.readouterr().out
