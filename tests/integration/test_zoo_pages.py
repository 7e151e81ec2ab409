"""Every command and example of docs/zoo.md and docs/data.md is run, in the pages' order, with few
steps where a command is long; `make readme` does it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documented import blocks, shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ZOO, DATA = "docs/zoo.md", "docs/data.md"
SHORT = "train_input.max_sequence_length=32 eval_input.max_sequence_length=32"


def books(folder: Path) -> None:
    """Some text of one's own."""
    from openwafer.data.embedded import stdlib_text

    folder.mkdir()
    for number, file in enumerate(stdlib_text("train", 100_000)):
        (folder / f"{number}.txt").write_text(file.text, encoding="utf-8")


def hugging_face_folders(folder: Path) -> None:
    """Checkpoints as transformers writes them, of small networks."""
    import transformers

    sizes = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2}
    bert = transformers.BertConfig(**sizes, num_attention_heads=2, intermediate_size=64)
    transformers.BertForPreTraining(bert).save_pretrained(folder / "bert")
    gpt2 = transformers.GPT2Config(vocab_size=8192, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("zoo")
    books(here / "books")
    hugging_face_folders(here / "path" / "to")
    return here


def shortened(line: str, max_steps: int) -> str:
    """The command without its comment, few steps of short sequences where it trains."""
    command = shlex.join(shlex.split(line, comments=True))
    if " train" not in command:
        return command
    short = f" --set {SHORT}" if "gpt2/small" in command else ""
    return f"{command} --max_steps {max_steps}{short}"


def run(line: str, folder: Path) -> str:
    done = shell(line, folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


def test_the_commands_of_the_zoo_page(folder: Path) -> None:
    commands, own_text, weights = (b.strip().splitlines() for b in blocks(ZOO, "sh"))
    # The page explains `--data_dir my_tokens` further down than it first uses it.
    last_of_first = commands.pop()
    said: dict[str, str] = {}
    for number, line in enumerate([*commands, *own_text, last_of_first], start=1):
        # More steps than before: the same model_dir goes on where it was.
        said[line] = run(shortened(line, 2 * number), folder)
    outputs = list(said.values())
    assert "gpt3/175b" in outputs[0]
    assert (folder / "runs/gpt2/tiny/predict/predictions.jsonl").stat().st_size > 0
    trained = max(
        (folder / "runs/gpt2/tiny").glob("checkpoint_*.mdl"),
        key=lambda path: int(path.stem.partition("_")[2]),
    )
    for number, line in enumerate(weights, start=1):
        of_page = re.sub(r"runs/gpt2/tiny/checkpoint_\d+\.mdl", str(trained), line)
        run(shortened(of_page, 2 * number), folder)
    ours = json.loads((folder / "my_gpt2" / "config.json").read_text())
    assert ours["architectures"] == ["GPT2LMHeadModel"]
    assert (folder / "bert.yaml").read_text().startswith("description: bert_classifier")


def test_the_checkpoint_that_the_page_names_is_there_after_the_run() -> None:
    from openwafer.zoo.catalog import load

    (named,) = {int(n) for block in blocks(ZOO, "sh") for n in re.findall(r"_(\d+)\.mdl", block)}
    assert named == load("gpt2/tiny").raw["runconfig"]["max_steps"]


@pytest.mark.parametrize("page", [ZOO, DATA])
def test_the_python_examples(page: str, tmp_path: Path) -> None:
    params = {"max_sequence_length": 32, "batch_size": 4, "embedded_bytes": 20_000}
    before = f"params = {{'train_input': {params!r}}}\n"
    for block in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", before + block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
