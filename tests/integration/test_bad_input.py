"""Mistakes of users: each ends with exit code 2 and a message that says what is wrong, where, what
is allowed and what to try; no traceback, and nothing written or lost."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fc_mnist_runs import (
    DROP,
    MODE_FLAGS,
    RUN_PY,
    SMALL,
    Outcome,
    assert_same_bits,
    checkpoint_steps,
    command_environment,
    everything_in,
    line_of,
    load_module,
    run_command,
    run_here,
    start_script,
    write_params,
)

LOCAL = ("--cs_ip", "local")
VALIDATE = ("--validate_only",)
COMPILE = ("--compile_only",)
SHORT = {**SMALL, "runconfig.max_steps": 6, "runconfig.log_steps": 1}


def assert_refused(outcome: Outcome, *parts: str) -> str:
    """Exit code 2, one error that holds all of `parts`, no traceback; gives the error."""
    assert outcome.exit_code == 2, outcome.output
    assert "Traceback" not in outcome.output
    errors = [line for line in outcome.output.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1, outcome.output
    message = outcome.output[outcome.output.index("ERROR") :]
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"
    return message


# ------------------------------------------------------------------ the parameter file

# Each: changes to the file, the line that is to blame, and what the message says.
FILES: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "unknown key": (
        {"optimizer.momentun": 0.8},
        "momentun:",
        ("`optimizer.momentun`", "did you mean `momentum`?", "allowed"),
    ),
    "unknown key in runconfig": (
        {"runconfig.max_step": 8},
        "max_step:",
        ("`runconfig.max_step`", "did you mean `max_steps`?", "allowed"),
    ),
    "unknown section": (
        {"optimiser.learning_rate": 1},
        "optimiser:",
        ("unknown section `optimiser`", "did you mean `optimizer`?", "train_input"),
    ),
    "wrong type": (
        {"runconfig.max_steps": "many"},
        "max_steps:",
        ("`runconfig.max_steps` is 'many'", "a whole number"),
    ),
    "truth value for a number": (
        {"runconfig.log_steps": True},
        "log_steps:",
        ("`runconfig.log_steps` is true", "a whole number"),
    ),
    "not a number": (
        {"optimizer.learning_rate": "fast"},
        "learning_rate:",
        ("learning_rate", "fast", "a number"),
    ),
    "negative batch": (
        {"train_input.batch_size": -4},
        "batch_size: -4",
        ("`train_input.batch_size` is -4", "a whole number (>= 1)"),
    ),
    "no optimizer section": ({"optimizer": DROP}, "", ("`optimizer`", "missing")),
    "no train_input section": ({"train_input": DROP}, "", ("`train_input`", "missing")),
    "no model section": ({"model": DROP}, "", ("`model`", "missing")),
    "no section at all": (
        dict.fromkeys(("train_input", "eval_input", "model", "optimizer", "runconfig"), DROP),
        "",
        ("`train_input`", "`model`", "`optimizer`"),
    ),
    "unknown optimizer": (
        {"optimizer.optimizer_type": "AdamWW"},
        "optimizer_type:",
        ("'AdamWW'", "did you mean `adamw`?", "rmsprop"),
    ),
    "clipping twice": (
        {"optimizer.max_gradient_norm": 1.0, "optimizer.max_gradient_value": 1.0},
        "max_gradient_norm:",
        ("exclude each other", "one of them"),
    ),
    "no end": ({"runconfig.max_steps": DROP}, "", ("nothing says how long to train",)),
    "validate and compile": (
        {"runconfig.validate_only": True, "runconfig.compile_only": True},
        "compile_only:",
        ("exclude each other", "one of them"),
    ),
    "unknown machine": (
        {"runconfig.machine": "wse9"},
        "",
        ("wse9", "wse2"),
    ),
    "no weight store": (
        {"runconfig.weight_store": "tape"},
        "weight_store:",
        ("'tape'", "ram or disk:DIR"),
    ),
    "two mistakes at once": (
        {"runconfig.max_step": 8, "optimizer.momentun": 0.8},
        "momentun:",
        ("`runconfig.max_step`", "`optimizer.momentun`"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_parameter_file(name: str, tmp_path: Path) -> None:
    changes, culprit, parts = FILES[name]
    flags = LOCAL if name == "unknown machine" else ()  # the plain loop plans for none
    kept = {key: value for key, value in SHORT.items() if key.split(".")[0] not in changes}
    params = write_params(tmp_path / "params.yaml", {**kept, **changes})
    outcome = run_here("train", params, tmp_path / "model_dir", *flags)
    message = assert_refused(outcome, *parts)
    if culprit:
        assert f"{params}:{line_of(params, culprit)}" in message
    assert not (tmp_path / "model_dir").exists()


def test_missing_sections_name_those_that_the_mode_needs(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", {**SHORT, "eval_input": DROP})
    outcome = run_here("train_and_eval", params, tmp_path / "model_dir")
    assert_refused(outcome, "`eval_input` is missing", str(params), "train_and_eval needs")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: [1, 2\n", ("not valid YAML", ":2")),
        ("model: {}\nmodel: {}\n", ("`model` stands twice", ":2", "line 1")),
        ("- a\n- b\n", ("must be a mapping", ":1")),
        ("runconfig: 3\n", ("`runconfig` is 3", ":1")),
    ],
)
def test_a_file_that_is_no_parameter_file(
    text: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(text)
    assert_refused(run_here("train", params, tmp_path / "model_dir"), *parts, str(params))
    assert not (tmp_path / "model_dir").exists()


def test_no_parameter_file(tmp_path: Path) -> None:
    outcome = run_here("train", tmp_path / "nowhere.yaml", tmp_path / "model_dir")
    assert_refused(outcome, "cannot read the parameter file", str(tmp_path / "nowhere.yaml"))


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--validate_only", "--compile_only"), ("exclude each other", "one of them")),
        (("--excution_mode", "auto"), ("--excution_mode", "did you mean `--execution_mode`?")),
        (("--execution_mode", "fast"), ("--execution_mode", "layer_pipelined")),
        (("--is_pretrained_checkpoint",), ("without a checkpoint", "`checkpoint_path`")),
        (("--cs_ip", "10.0.0.1:port"), ("10.0.0.1:port", "command line: --cs_ip", "HOST:PORT")),
        (("--max_steps", "-3"), ("max_steps", "(>= 0)")),
        (("--config", "large"), ("no configuration `large`",)),
        (("--device", "cuda"), ("there is no CUDA device", "cpu, or auto")),
        (("--checkpoint_path", "nowhere.mdl"), ("no such checkpoint", "nowhere.mdl")),
        ((*LOCAL, "--machine", "wse22"), ("wse22", "wse2")),
        ((*LOCAL, "--fabric_config_file", "nowhere.json"), ("nowhere.json",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and value[0].startswith("--") else "",
)
def test_a_wrong_flag(flags: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    params = write_params(tmp_path / "params.yaml", SHORT)
    outcome = run_here("train", params, tmp_path / "model_dir", *flags)
    assert_refused(outcome, *parts)
    assert "Step=" not in outcome.output


def test_the_command_itself(tmp_path: Path) -> None:
    """What a shell sees: the exit code, and nothing but the error."""
    import sys

    params = write_params(tmp_path / "params.yaml", {**SHORT, "optimizer.momentun": 1})
    command = [sys.executable, RUN_PY, "--mode", "train", "-p", params, "-o", tmp_path / "out"]
    done = run_command(command)
    assert done.returncode == 2
    assert done.stdout.startswith("ERROR:   unknown key `optimizer.momentun`")
    assert done.stderr == ""
    assert command_environment()["OMP_NUM_THREADS"] == "1"


# ------------------------------------------------------------------ the data


@pytest.mark.parametrize("flags", [(), LOCAL, COMPILE, VALIDATE])
def test_missing_data(flags: tuple[str, ...], tmp_path: Path) -> None:
    changes = {**SHORT, "train_input.data_dir": str(tmp_path / "nowhere"), "model.input_size": 64}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("train", params, tmp_path / "model_dir", *flags)
    place = line_of(RUN_PY.with_name("data.py"), "raise FileNotFoundError")
    assert_refused(
        outcome,
        "train-images-idx3-ubyte",
        str(tmp_path / "nowhere"),
        f"data.py:{place}",
        "train_input section",
    )
    assert not (tmp_path / "model_dir").exists()


@pytest.mark.parametrize("flags", [(), LOCAL])
def test_a_batch_larger_than_the_dataset(flags: tuple[str, ...], tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", {**SHORT, "train_input.batch_size": 1438})
    outcome = run_here("train", params, tmp_path / "model_dir", *flags)
    assert_refused(
        outcome, "1437 samples, batch_size=1438, drop_last=True", "allowed", "a smaller batch_size"
    )
    assert not (tmp_path / "model_dir").exists()


@pytest.mark.parametrize("flags", [(), LOCAL])
def test_too_few_batches_for_the_accumulation(flags: tuple[str, ...], tmp_path: Path) -> None:
    changes = {**SHORT, "train_input.batch_size": 500, "optimizer.grad_accum_steps": 3}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("train", params, tmp_path / "model_dir", *flags)
    assert_refused(outcome, "2 batches, one step needs 3", "lower `optimizer.grad_accum_steps`")
    assert not (tmp_path / "model_dir" / "train" / "metrics.jsonl").exists()


def test_an_incomplete_last_batch_in_a_compiled_run(tmp_path: Path) -> None:
    changes = {**SHORT, "runconfig.max_steps": 60, "train_input.drop_last_batch": False}
    params = write_params(tmp_path / "params.yaml", changes)
    outcome = run_here("train", params, tmp_path / "compiled", *LOCAL)
    assert_refused(outcome, "has shape (29, 64)", "(32, 64)", "drop_last=True")
    run_here("train", params, tmp_path / "plain").succeeded()


USER_DATA = """
import torch

def fails_at_once(params):
    return torch.zeros(params["train_input"]["no_such_key"])  # fails at once

def fails_later(params):
    def batches():
        for number in range(100):
            if number == 3:
                raise OSError("the tape is torn")  # fails later
            yield torch.zeros(32, 64), torch.zeros(32, dtype=torch.long)
    return batches

def gives_a_number(params):
    return 17

def gives_no_batch(params):
    return []

def gives_words(params):
    return [["not", "tensors"]] * 100
"""


@pytest.fixture
def user_data(tmp_path: Path) -> ModuleType:
    path = tmp_path / "user_data.py"
    path.write_text(USER_DATA)
    return load_module(path, "user_data")


@pytest.mark.parametrize("flags", [(), LOCAL], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("fails_at_once", ("KeyError: 'no_such_key'", "train_input section")),
        ("fails_later", ("OSError: the tape is torn",)),
        ("gives_a_number", ("int",)),
        ("gives_no_batch", ("no batch",)),
        ("gives_words", ("plain PyTorch first",)),
    ],
)
def test_data_functions_that_fail(
    function: str,
    parts: tuple[str, ...],
    flags: tuple[str, ...],
    tmp_path: Path,
    user_data: ModuleType,
) -> None:
    if function == "gives_words" and not flags:
        pytest.skip("the plain loop gives the model whatever the data are")
    params = write_params(tmp_path / "params.yaml", SHORT)
    outcome = run_here(
        "train",
        params,
        tmp_path / "model_dir",
        *flags,
        train_data_fn=getattr(user_data, function),
    )
    message = assert_refused(outcome, *parts)
    if function.startswith("fails"):
        place = tmp_path / "user_data.py"
        assert f"{place}:{line_of(place, '# ' + function.replace('_', ' '))}" in message


# ------------------------------------------------------------------ the model

USER_MODEL = """
import torch
from torch import nn
from openwafer import PyTorchBaseModel


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images):
        hidden = self.linear(images)
        if hidden.sum() > 0:  # depends on data
            hidden = 2 * hidden
        return hidden


class Counting(Branching):
    def forward(self, images):
        hidden = self.linear(images)
        largest = hidden.max().item()  # reads a value
        return hidden / largest


class Masking(Branching):
    def forward(self, images):
        hidden = self.linear(images)
        return hidden[hidden > 0].reshape(-1, 1)  # shape from data


class Eigenvalues(Branching):
    def forward(self, images):
        values = torch.linalg.eigvalsh(images.T @ images)  # no kernel
        return self.linear(images) + values.sum()


class Singular(Branching):
    def forward(self, images):
        values = torch.linalg.svdvals(images)  # no kernel
        return self.linear(images) * values.sum()


class Crashing(Branching):
    def forward(self, images):
        return self.linear(images[:, :32])  # wrong shape


class Overflowing(Branching):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.loud = Loud()

    def forward(self, images):
        return self.linear(self.loud(torch.relu(self.first(images))))


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(64, 64)

    def forward(self, hidden):
        return torch.exp(self.scale(hidden) * 100)  # overflows


class Model(PyTorchBaseModel):
    network = Branching

    def __init__(self, params, device=None):
        self.loss_fn = nn.CrossEntropyLoss()
        super().__init__(params=params, model=self.network(), device=device)

    def __call__(self, data):
        images, labels = data
        return self.loss_fn(self.model(images), labels)


class Straight(Branching):
    def forward(self, images):
        return self.linear(images)


class VectorLoss(Model):
    network = Straight

    def __call__(self, data):
        images, labels = data
        return self.model(images)[:, 0]  # not a scalar


def build_wrong(params):
    return nn.Linear(3, params["model"]["no_such_key"])  # building fails
"""


@pytest.fixture
def user_model(tmp_path: Path) -> ModuleType:
    path = tmp_path / "user_model.py"
    path.write_text(USER_MODEL)
    return load_module(path, "user_model")


def model_with(user_model: ModuleType, network: str) -> Callable[[Any], Any]:
    kind = type(network, (user_model.Model,), {"network": getattr(user_model, network)})
    return lambda params: kind(params)


@pytest.mark.parametrize(
    ("network", "flags", "culprit", "parts"),
    [
        ("Branching", LOCAL, "# depends on data", ("depends on the value", "torch.where")),
        ("Branching", VALIDATE, "# depends on data", ("depends on the value", "torch.where")),
        ("Counting", LOCAL, "# reads a value", ("item", "static graph")),
        ("Masking", LOCAL, "# shape from data", ("static",)),
        ("Eigenvalues", LOCAL, "# no kernel", ("eigvalsh", "kernel")),
        ("Singular", VALIDATE, "# no kernel", ("svd", "kernel")),
        ("Singular", COMPILE, "# no kernel", ("svd", "kernel")),
        ("Crashing", LOCAL, "# wrong shape", ("plain PyTorch first",)),
    ],
)
def test_a_model_that_cannot_be_compiled(
    network: str,
    flags: tuple[str, ...],
    culprit: str,
    parts: tuple[str, ...],
    tmp_path: Path,
    user_model: ModuleType,
) -> None:
    path = tmp_path / "user_model.py"
    source = path.read_text()
    start = source.index(f"class {network}(")
    line = source[: source.index(culprit, start)].count("\n") + 1
    params = write_params(tmp_path / "params.yaml", SHORT)
    outcome = run_here(
        "train", params, tmp_path / "model_dir", *flags, model_fn=model_with(user_model, network)
    )
    assert_refused(outcome, f"{path}:{line}", *parts)
    # The report for machines is what --validate_only is for.
    report = {"validate.json"} if flags == VALIDATE else set[str]()
    assert set(everything_in(tmp_path / "model_dir")) <= report


@pytest.mark.parametrize("network", ["Branching", "Eigenvalues", "Counting"])
def test_the_plain_loop_takes_any_model(
    network: str, tmp_path: Path, user_model: ModuleType
) -> None:
    params = write_params(tmp_path / "params.yaml", SHORT)
    outcome = run_here(
        "train", params, tmp_path / "model_dir", model_fn=model_with(user_model, network)
    )
    assert len(outcome.succeeded().losses()) == 6


@pytest.mark.parametrize("flags", [(), LOCAL], ids=["plain", "compiled"])
def test_a_loss_that_is_no_scalar(
    flags: tuple[str, ...], tmp_path: Path, user_model: ModuleType
) -> None:
    params = write_params(tmp_path / "params.yaml", SHORT)
    outcome = run_here(
        "train", params, tmp_path / "model_dir", *flags, model_fn=user_model.VectorLoss
    )
    assert_refused(outcome, "the loss has shape (32,)", "a scalar", ".mean()")


def test_a_model_that_cannot_be_built(tmp_path: Path, user_model: ModuleType) -> None:
    params = write_params(tmp_path / "params.yaml", SHORT)
    path = tmp_path / "user_model.py"
    for function, parts in (
        (user_model.build_wrong, ("KeyError", f"{path}:{line_of(path, '# building fails')}")),
        (lambda params: torch.nn.Linear(2, 2), ("Linear", "PyTorchBaseModel")),
    ):
        outcome = run_here("train", params, tmp_path / "model_dir", model_fn=function)
        assert_refused(outcome, *parts)
        assert not (tmp_path / "model_dir").exists()


# ------------------------------------------------------------------ numbers that are not finite


@pytest.mark.parametrize("mode", MODE_FLAGS)
def test_a_loss_that_is_not_finite_names_the_layer(
    mode: str, tmp_path: Path, user_model: ModuleType
) -> None:
    """Layer `loud` overflows at some step; what was saved before is still there and still good."""
    changes = {
        **SHORT,
        "runconfig.max_steps": 400,
        "runconfig.checkpoint_steps": 1,
        "runconfig.keep_checkpoint_max": 2,
        "optimizer.learning_rate": 0.01,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    flags, model_fn = MODE_FLAGS[mode], model_with(user_model, "Overflowing")
    outcome = run_here("train", params, tmp_path / mode, *flags, model_fn=model_fn)
    message = assert_refused(outcome, "the loss is", "loud", "a lower learning rate")
    found = re.search(r"the loss is (nan|inf) at global step (\d+)", message)
    assert found, message
    step = int(found[2])
    assert 1 < step <= 400
    if mode != "plain":
        path = tmp_path / "user_model.py"
        assert f"{path}:" in message
    assert checkpoint_steps(tmp_path / mode)[-1] == step - 1
    for weight in outcome.checkpoint(step - 1)["model"].values():
        assert weight.isfinite().all()
    allowed = write_params(
        tmp_path / "allowed.yaml",
        {**changes, "runconfig.check_loss_values": False, "runconfig.max_steps": step + 1},
    )
    run_here("train", allowed, tmp_path / mode, *flags, model_fn=model_fn).succeeded()


@pytest.mark.parametrize("mode", MODE_FLAGS)
def test_an_evaluation_loss_that_is_not_finite(
    mode: str, tmp_path: Path, user_model: ModuleType
) -> None:
    params = write_params(tmp_path / "params.yaml", SHORT)

    def model_fn(params: Any) -> Any:
        model = model_with(user_model, "Overflowing")(params)
        with torch.no_grad():
            model.model.loud.scale.bias.fill_(50.0)
        return model

    outcome = run_here("eval", params, tmp_path / mode, *MODE_FLAGS[mode], model_fn=model_fn)
    assert_refused(outcome, "the evaluation loss is", "loud")


@pytest.mark.parametrize("mode", MODE_FLAGS)
def test_a_batch_that_is_not_finite_is_named(mode: str, tmp_path: Path) -> None:
    def data(params: Any) -> Any:
        images = torch.rand(20, 32, 64)
        images[3, 5, 7] = torch.nan
        return [(image, torch.arange(32) % 10) for image in images]

    params = write_params(tmp_path / "params.yaml", {**SHORT, "train_input.shuffle": False})
    outcome = run_here("train", params, tmp_path / mode, *MODE_FLAGS[mode], train_data_fn=data)
    message = assert_refused(outcome, "the loss is nan at global step 4")
    if mode != "plain":
        assert "batch" in message
        assert "[0]" in message


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", {**SHORT, "runconfig.checkpoint_steps": 6})
    run_here("train", params, tmp_path / "model_dir").succeeded()
    before = everything_in(tmp_path / "model_dir")
    wider = write_params(tmp_path / "wider.yaml", {**SHORT, "model.hidden_size": 20})
    outcome = run_here("train", wider, tmp_path / "model_dir", "--max_steps", "12")
    assert_refused(
        outcome,
        "does not fit the model",
        "fc_layers.0.weight (16×64 in the checkpoint, not 20×64)",
        "checkpoint_6.mdl",
        "--model_dir",
    )
    after = everything_in(tmp_path / "model_dir")
    lost = [name for name in before if after.get(name) != before[name]]
    assert lost in ([], ["train/params_train.yaml"]), lost


@pytest.mark.parametrize(
    "mode", ["weight_streaming", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_a_full_disk_while_a_checkpoint_is_written(mode: str, tmp_path: Path) -> None:
    """Files of at most 32 KiB may be written: logs and plans, but not a checkpoint."""
    changes = {
        "runconfig.max_steps": 8,
        "runconfig.log_steps": 1,
        "runconfig.checkpoint_steps": 4,
        "model.hidden_size": 64,
    }
    params = write_params(tmp_path / "params.yaml", changes)
    model_dir, flags = tmp_path / "model_dir", MODE_FLAGS[mode]
    run_here("train", params, model_dir, *flags, "--max_steps", "4").succeeded()
    before = (model_dir / "checkpoint_4.mdl").read_bytes()
    assert len(before) > 32768
    full = start_script("train", params, model_dir, *flags, max_file_bytes=32768).finish()
    assert_refused(full, "no room for the checkpoint", "checkpoint_8.mdl", "free some space")
    assert checkpoint_steps(model_dir) == [4]
    assert (model_dir / "checkpoint_4.mdl").read_bytes() == before
    assert [path.name for path in model_dir.glob(".*")] == [".training.lock"]
    again = run_here("train", params, model_dir, *flags).succeeded()
    fresh = run_here("train", params, tmp_path / "fresh", *flags).succeeded()
    assert_same_bits(again.checkpoint()["model"], fresh.checkpoint()["model"])
    assert again.losses() == fresh.losses()


def test_a_model_dir_that_is_a_file(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", SHORT)
    (tmp_path / "model_dir").write_text("mine")
    for flags in ((), LOCAL):
        outcome = run_here("train", params, tmp_path / "model_dir", *flags)
        assert_refused(outcome, str(tmp_path / "model_dir"))
        assert (tmp_path / "model_dir").read_text() == "mine"


def test_a_store_folder_that_is_missing(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", SHORT)
    flags = (*MODE_FLAGS["weight_streaming"], "--weight_store", f"disk:{tmp_path / 'nowhere'}")
    outcome = run_here("train", params, tmp_path / "model_dir", *flags)
    assert_refused(outcome, str(tmp_path / "nowhere"), "mkdir -p")


def test_a_full_disk_for_the_weight_store(tmp_path: Path) -> None:
    params = write_params(tmp_path / "params.yaml", {**SHORT, "model.hidden_size": 128})
    store = tmp_path / "store"
    store.mkdir()
    flags = (*MODE_FLAGS["weight_streaming"], "--weight_store", f"disk:{store}")
    model_dir = tmp_path / "model_dir"
    outcome = start_script("train", params, model_dir, *flags, max_file_bytes=32768).finish()
    assert_refused(outcome, "no room for the weight store", "ram")
    assert everything_in(store) == {}


# ------------------------------------------------------------------ Ctrl-C before training


def test_a_signal_before_training_ends_without_a_traceback(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(RUN_PY.parent)!r})
from data import train_input_dataloader
from model import MNISTModel
from utils import set_defaults
from openwafer import run

def slow_data(params):
    print("loading", flush=True)
    time.sleep(30)

if __name__ == "__main__":
    run(MNISTModel, slow_data, None, set_defaults)
"""
    )
    params = write_params(tmp_path / "params.yaml", SHORT)
    process = start_script("train", params, tmp_path / "model_dir", *LOCAL, script=script)
    process.wait_until(lambda: "loading" in process.output, "the data function")
    process.signal(signal.SIGINT)
    outcome = process.finish(10)
    assert outcome.exit_code == 130
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "model_dir").exists()
