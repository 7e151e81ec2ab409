"""A whole parameter file: what is accepted, and what each mistake says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from openwafer.config.hyperparameters import (
    HYPERPARAMETERS,
    AdamWOptions,
    SGDOptions,
)
from openwafer.config.params import Params, load_params, resolve
from openwafer.config.runconfig import RunConfig, with_port
from openwafer.config.schedule import Constant, CosineDecay, Linear, SequentialLR
from openwafer.errors import ConfigError

GOOD = """\
train_input:
  batch_size: 4
eval_input:
  batch_size: 4
model:
  mixed_precision: false
optimizer:
  optimizer_type: AdamW
  learning_rate: 1e-3
runconfig:
  max_steps: 10
  mode: train
"""


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Params]:
    def run(text: str = GOOD, overrides: dict[str, object] | None = None, **more: object) -> Params:
        path = tmp_path / "params.yaml"
        path.write_text(text, encoding="utf-8")
        loaded = load_params(path, overrides, environ={}, **more)  # type: ignore[arg-type]
        return resolve(loaded.raw, loaded.locate, extra_keys=loaded.extra_keys)

    return run


def test_a_good_file(check: Callable[..., Params]) -> None:
    params = check()
    assert params.runconfig == RunConfig(
        max_steps=10, model_dir=Path("model_dir"), service_dir=Path("model_dir")
    )
    assert params.optimizer is not None
    assert params.optimizer.hyperparameters == AdamWOptions()
    assert params.optimizer.learning_rate == Constant(learning_rate=1e-3)
    assert params.compute_dtype == "float32"
    assert params.notices == ()


# (replace this, by that, line, part of the message, part of allowed, hint)
MISTAKES = [
    (
        "max_steps: 10",
        "max_stepz: 10",
        11,
        "unknown key `runconfig.max_stepz`",
        "max_steps",
        "`max_steps`",
    ),
    (
        "max_steps: 10",
        "max_steps: ten",
        11,
        "`runconfig.max_steps` is 'ten' (text)",
        "a whole number",
        "",
    ),
    ("max_steps: 10", "max_steps: -1", 11, "is -1 (int)", ">= 0", ""),
    ("max_steps: 10", "max_steps: true", 11, "is true (true or false)", "whole number", ""),
    ("max_steps: 10", "max_steps: 2.5", 11, "is 2.5 (float)", "whole number", ""),
    ("max_steps: 10", "max_steps: [1]", 11, "is [1] (a list)", "whole number", ""),
    ("mode: train", "mode: trian", 12, "`runconfig.mode` is 'trian'", "train or eval", "`train`"),
    ("mode: train", "{}: 1", 12, "", "", ""),
    ("mode: train", "logging: LOUD", 12, "runconfig.logging", "WARNING", ""),
    ("mode: train", "device: gpu", 12, "runconfig.device", "cuda", ""),
    ("mode: train", "save_losses: 'yes'", 12, "is 'yes' (text)", "true or false", ""),
    ("mode: train", "mount_dirs: 5", 12, "mount_dirs", "a list, each entry a text", ""),
    ("mode: train", "seed: 99999999999999999999", 12, "seed", "<=", ""),
    ("mode: train", "weight_store: disk", 12, "weight_store", "disk:DIR", ""),
    ("mode: train", "weight_store: 'disk:'", 12, "weight_store", "disk:DIR", ""),
    ("mode: train", "num_steps: 1\n  num_epochs: 2", 12, "exclude each other", "one of them", ""),
    (
        "mode: train",
        "is_pretrained_checkpoint: true",
        12,
        "without a checkpoint",
        "checkpoint_path",
        "",
    ),
    (
        "mode: train",
        "validate_only: true\n  compile_only: true",
        13,
        "exclude each other",
        "one",
        "",
    ),
    ("mode: train", "cs_ip: 'host:port'", 12, "cs_ip", "HOST:PORT", ""),
    (
        "mode: train",
        "cs_ip: local\n  enable_summaries: true",
        13,
        "enable_summaries",
        "no cs_ip",
        "",
    ),
    ("mode: train", "cpu: true\n  device: cuda", 13, "exclude each other", "one", ""),
    ("max_steps: 10", "log_steps: 1", 10, "how long to train", "runconfig.num_epochs", ""),
    ("AdamW", "AdamX", 8, "`optimizer.optimizer_type` is 'AdamX'", "adamw", "`adam"),
    ("  optimizer_type: AdamW\n", "", 7, "optimizer_type` is missing", "sgd", ""),
    ("  learning_rate: 1e-3\n", "", 7, "learning_rate` is missing", "a number", ""),
    ("1e-3", "fast", 9, "`optimizer.learning_rate` is 'fast'", "a number", ""),
    ("1e-3", "-1", 9, "is -1", ">= 0", ""),
    ("1e-3", ".nan", 9, "is nan", "a number", ""),
    ("1e-3", "[]", 9, "learning_rate", "a number", ""),
    ("1e-3", "1e-3\n  beta_1: 0.9", 10, "unknown key `optimizer.beta_1`", "beta1", "`beta1`"),
    ("1e-3", "1e-3\n  momentum: 0.9", 10, "unknown key `optimizer.momentum`", "beta1", ""),
    ("1e-3", "1e-3\n  beta1: 1.0", 10, "is 1.0", ">= 0 and < 1", ""),
    ("1e-3", "1e-3\n  eps: 1\n  epsilon: 1", 11, "the same setting", "`eps` alone", ""),
    ("1e-3", "1e-3\n  max_gradient_norm: -1", 10, "max_gradient_norm", ">= 0", ""),
    ("1e-3", "1e-3\n  max_gradient_value: 1\n  max_gradient_norm: 1", 11, "exclude", "one of", ""),
    (
        "1e-3",
        "1e-3\n  loss_scaling_factor: dynamc",
        10,
        "dynamc",
        "a number or dynamic",
        "`dynamic`",
    ),
    ("1e-3", "1e-3\n  loss_scaling_factor: 0", 10, "loss_scaling_factor", "> 0", ""),
    ("1e-3", "1e-3\n  grad_accum_steps: 0", 10, "grad_accum_steps", ">= 1", ""),
    ("1e-3", "{scheduler: Cosin}", 9, "'Cosin'", "CosineDecay", "`CosineDecay`"),
    ("1e-3", "{learning_rate: 1}", 9, "scheduler` is missing", "CosineDecay", ""),
    (
        "1e-3",
        "{scheduler: step, learning_rate: 1, gamma: 1}",
        9,
        "step_size` is missing",
        "whole",
        "",
    ),
    ("1e-3", "{scheduler: lambda, learning_rate: 1, gama: 1}", 9, "gama", "learning_rate", ""),
    (
        "1e-3",
        "\n  - {scheduler: constant, learning_rate: 1}" * 2,
        10,
        "`optimizer.learning_rate[0].steps` is missing",
        "whole number",
        "",
    ),
    ("1e-3", "[1, 2]", 9, "`optimizer.learning_rate[0]` is 1", "`scheduler`", ""),
    (
        "1e-3",
        "{scheduler: piecewiseconstant, values: [1, 2], boundaries: [3, 2]}",
        9,
        "2 rates for 2 boundaries",
        "one rate more",
        "",
    ),
    (
        "1e-3",
        "{scheduler: multistep, learning_rate: 1, gamma: 1, milestones: [3, 2]}",
        9,
        "not ascending: [3, 2]",
        "ascending",
        "",
    ),
    ("batch_size: 4\neval", "batch_size: 0\neval", 2, "`train_input.batch_size` is 0", ">= 1", ""),
    ("batch_size: 4\neval", "batch_size: many\neval", 2, "'many'", "whole number", ""),
    (
        "train_input:",
        "train_inputs:",
        1,
        "unknown section `train_inputs`",
        "train_input",
        "`train_input`",
    ),
    ("precision: false", "precision: maybe", 6, "mixed_precision", "true or false", ""),
    ("precision: false", "precision: true\n  fp16_type: fp8", 7, "fp8", "bfloat16 or float16", ""),
    (
        "runconfig:",
        "csconfig:\n  use_cbfloat16: true\nrunconfig:",
        11,
        "mixed precision",
        "true",
        "",
    ),
    ("runconfig:", "csconfig: 3\nrunconfig:", 10, "`csconfig` is 3", "a mapping", ""),
    ("model:\n  mixed_precision: false\n", "", 0, "`model` is missing", "mode train needs", ""),
]


@pytest.mark.parametrize(("old", "new", "line", "what", "allowed", "hint"), MISTAKES)
def test_a_mistake_says_what_where_and_what_is_allowed(
    check: Callable[..., Params],
    tmp_path: Path,
    old: str,
    new: str,
    line: int,
    what: str,
    allowed: str,
    hint: str,
) -> None:
    if new == "{}: 1":
        new, what = "3: 1", "unknown key `runconfig[3]`"
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        check(GOOD.replace(old, new, 1))
    error = caught.value
    place = f"{tmp_path / 'params.yaml'}" + (f":{line}" if line else "")
    assert error.where == place
    assert what in str(error)
    assert allowed in str(error)
    assert hint in str(error)
    assert error.exit_code == 2


def test_all_mistakes_are_listed_at_once(check: Callable[..., Params], tmp_path: Path) -> None:
    text = GOOD.replace("max_steps: 10", "max_stepz: 10").replace("1e-3", "fast")
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        check(text.replace("mode: train", "mode: eval"))
    message = str(caught.value)
    file = tmp_path / "params.yaml"
    assert f"at       {file}:11" in message
    assert f"at       {file}:9" in message
    assert caught.value.where == f"{file}:11"


@pytest.mark.parametrize(
    ("mode", "section"),
    [
        ("train", "train_input"),
        ("train", "optimizer"),
        ("eval", "eval_input"),
        ("eval", "model"),
        ("train_and_eval", "eval_input"),
    ],
)
def test_a_mode_needs_its_sections(check: Callable[..., Params], mode: str, section: str) -> None:
    lines = GOOD.replace(f"{section}:", f"x{section}:").replace("mode: train", f"mode: {mode}")
    with pytest.raises(ConfigError, match=f"`{section}` is missing"):
        check(lines)


def test_eval_needs_neither_optimizer_nor_steps(check: Callable[..., Params]) -> None:
    params = check("eval_input: {}\nmodel: {}\nrunconfig: {mode: eval, eval_steps: 3}\n")
    assert params.optimizer is None
    assert params.runconfig.eval_steps == 3


def test_the_command_line_wins_and_is_named(check: Callable[..., Params]) -> None:
    params = check(overrides={"max_steps": 99, "cs_ip": "host", "compile_dir": None})
    assert params.runconfig.max_steps == 99
    assert params.runconfig.cs_ip == "host:9000"
    assert params.raw["runconfig"]["cs_ip"] == "host:9000"
    assert params.raw["runconfig"]["compile_dir"] is None
    assert params.raw["runconfig"]["model_dir"] == "model_dir"
    with pytest.raises(ConfigError) as caught:
        check(overrides={"max_steps": -5})
    assert caught.value.where == "command line: --max_steps"


def test_a_flag_that_is_not_given_leaves_the_file_alone(check: Callable[..., Params]) -> None:
    text = GOOD + "  num_csx: 4\n  compile_dir: here\n"
    params = check(text, {"num_csx": None, "compile_dir": None, "mode": "train"})
    assert params.runconfig.num_csx == 4
    assert params.runconfig.compile_dir == Path("here")


def test_the_users_own_flags_pass(check: Callable[..., Params]) -> None:
    params = check(extra={"my_flag": 3, "other": None})
    assert params.raw["runconfig"]["my_flag"] == 3
    with pytest.raises(ConfigError, match="my_flag"):
        check(GOOD + "  my_flag: 3\n")


def test_config_selects_one_of_many(check: Callable[..., Params], tmp_path: Path) -> None:
    indented = "".join(f"  {line}\n" for line in GOOD.splitlines())
    text = f"small:\n{indented}large:\n{indented.replace('max_steps: 10', 'max_steps: x')}"
    assert check(text, {"config": "small"}).runconfig.max_steps == 10
    with pytest.raises(ConfigError) as caught:
        check(text, {"config": "large"})
    assert caught.value.where == f"{tmp_path / 'params.yaml'}:25"
    with pytest.raises(ConfigError, match="no configuration `smal`") as caught:
        check(text, {"config": "smal"})
    assert caught.value.hint == "did you mean `small`?"
    with pytest.raises(ConfigError, match=r"--config small \(one of small, large\)"):
        check(text)


def test_k8s_address(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(GOOD)
    environ = {"K8S_CS_IP": "10.0.0.7:9001"}
    loaded = load_params(path, {"cs_ip": None}, environ=environ)
    assert resolve(loaded.raw, loaded.locate).runconfig.cs_ip == "10.0.0.7:9001"
    with pytest.raises(ConfigError, match="K8S_CS_IP"):
        load_params(path, {"cs_ip": "host:9000"}, environ=environ)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("local", "local"),
        ("10.0.0.1", "10.0.0.1:9000"),
        ("host:80", "host:80"),
        ("[::1]:90", "[::1]:90"),
        ("[::1]", "[::1]:9000"),
        ("::1", "[::1]:9000"),
    ],
)
def test_ports(given: str, expected: str) -> None:
    assert with_port(given) == expected


@pytest.mark.parametrize("given", ["", ":9000", "host:", "host:0", "host:65536", "host:-1", "h:²"])
def test_wrong_ports(given: str) -> None:
    with pytest.raises(ConfigError, match="cs_ip"):
        with_port(given)


def test_traps_of_release_1_6(
    check: Callable[..., Params], caplog: pytest.LogCaptureFixture
) -> None:
    text = GOOD.replace("1e-3", "'1e-3'\n  epsilon: 1e-4")
    text += "  seed:\n  num_wgt_servers: 12\n  logging: info\n"
    params = check(text.replace("10", "1e3"))
    assert params.optimizer is not None
    assert isinstance(params.optimizer.hyperparameters, AdamWOptions)
    assert params.optimizer.hyperparameters.eps == 1e-4
    assert params.optimizer.learning_rate == Constant(learning_rate=1e-3)
    assert params.runconfig.seed == 1
    assert params.runconfig.max_steps == 1000
    assert params.runconfig.logging == "INFO"
    with caplog.at_level(logging.WARNING, logger="openwafer"):
        params.log_notices()
    said = "\n".join(caplog.messages)
    assert len(caplog.messages) == 3
    for word in ("epsilon", "seed", "num_wgt_servers"):
        assert word in said
    sgd = check(GOOD.replace("AdamW", "SGD")).optimizer
    assert sgd is not None
    assert sgd.hyperparameters == SGDOptions(momentum=0.0)


def test_precision(check: Callable[..., Params]) -> None:
    def with_model(text: str, **more: str) -> Params:
        return check(GOOD.replace("mixed_precision: false", text))

    assert with_model("mixed_precision: true").compute_dtype == "bfloat16"
    half = with_model("mixed_precision: true\n  fp16_type: float16")
    assert half.compute_dtype == "float16"
    assert any("loss scaling" in notice for notice in half.notices)
    assert with_model("hidden_size: 3").mixed_precision is False
    assert with_model("hidden_size: 3").raw["model"] == {"hidden_size": 3}


def test_multireplica_is_for_training(check: Callable[..., Params]) -> None:
    params = check(GOOD.replace("mode: train", "mode: eval\n  multireplica: true"))
    assert params.runconfig.multireplica is False
    assert any("multireplica" in notice for notice in params.notices)


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_every_type_is_known_in_any_case(check: Callable[..., Params], name: str) -> None:
    optimizer = check(GOOD.replace("AdamW", name.upper())).optimizer
    assert optimizer is not None
    assert optimizer.optimizer_type == name
    assert optimizer.hyperparameters == HYPERPARAMETERS[name]()  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("adafactor", "relative_step: true"),
        ("adafactor", "clip_threshold: 2.0"),
        ("adafactor", "beta1: 0.9"),
        ("rprop", "weight_decay_rate: 0.1"),
        ("sgd", "use_nesterov: true"),
    ],
)
def test_settings_that_do_not_go_together(
    check: Callable[..., Params], name: str, line: str
) -> None:
    key, _, _ = line.partition(":")
    with pytest.raises(ConfigError, match=key):
        check(GOOD.replace("AdamW", name).replace("1e-3", f"1e-3\n  {line}"))


def test_asgd_takes_both_spellings_of_weight_decay(check: Callable[..., Params]) -> None:
    text = GOOD.replace("AdamW", "ASGD").replace("1e-3", "1e-3\n  weight_decay: 0.1")
    optimizer = check(text).optimizer
    assert optimizer is not None
    assert optimizer.weight_decay_rate == 0.1


def test_a_list_of_schedules(check: Callable[..., Params]) -> None:
    text = GOOD.replace(
        "1e-3",
        """
    - {scheduler: LINEAR, initial_learning_rate: 0, end_learning_rate: 1e-3, steps: 5}
    - {scheduler: CosineDecay, initial_learning_rate: 1, end_learning_rate: 0, decay_steps: 7}
    - {scheduler: Constant, learning_rate: '2e-4'}
  disable_lr_steps_reset: true""",
    )
    optimizer = check(text).optimizer
    assert optimizer is not None
    assert optimizer.learning_rate == SequentialLR(
        schedules=(
            Linear(initial_learning_rate=0.0, end_learning_rate=1e-3, steps=5),
            CosineDecay(initial_learning_rate=1.0, end_learning_rate=0.0, decay_steps=7),
            Constant(learning_rate=2e-4),
        ),
        milestones=(5, 12),
        disable_lr_steps_reset=True,
    )
