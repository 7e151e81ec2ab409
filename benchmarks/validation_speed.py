"""`python -m benchmarks.validation_speed`: how long validating a large model takes, from nothing.

Decides the models (BERT-large, GPT-2 XL and a 20-billion-parameter GPT-3, all on the meta device)
and how they are timed: a fresh process for each, cases in turn, the median of several rounds. One
JSON line for each case; `--write` makes the page in results/ too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

RESULTS = Path(__file__).parent / "results" / "validation_speed.md"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer; `causal` tells a decoder from an encoder."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    seq: int
    causal: bool = True


# ---------------------------------------------------------------- models


def plain(sizes: Sizes) -> tuple[nn.Module, Any]:
    """A language model of plain torch.nn modules, as people write it."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = sizes.hidden
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
            self.dropout = nn.Dropout(0.1)

        def attention(self, x: torch.Tensor) -> torch.Tensor:
            batch, seq, hidden = x.shape
            parts = self.qkv(x).view(batch, seq, 3, sizes.heads, hidden // sizes.heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=sizes.causal)
            return self.out(y.transpose(1, 2).reshape(batch, seq, hidden))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))

    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
            self.positions = nn.Embedding(sizes.seq, sizes.hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(sizes.layers))
            self.norm = nn.LayerNorm(sizes.hidden)
            self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())

    ids = torch.zeros(1, sizes.seq, dtype=torch.long)
    with torch.device("meta"):
        return LanguageModel(), (ids, ids)


def hugging_face(model: str, config: str, **settings: int) -> tuple[nn.Module, Any]:
    """A model class of `transformers`, as its library builds it."""
    import torch
    import transformers

    seq = settings.pop("seq")
    ids = torch.zeros(1, seq, dtype=torch.long)
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return built, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "BERT-large": lambda: plain(Sizes(24, 1024, 16, 30522, 512, causal=False)),
    "GPT-2 XL": lambda: plain(Sizes(48, 1600, 25, 50257, 1024)),
    "GPT-3 20B": lambda: plain(Sizes(44, 6144, 64, 50257, 2048)),
    "BERT-large (transformers)": lambda: hugging_face(
        "BertForMaskedLM", "BertConfig", seq=512, hidden_size=1024, num_hidden_layers=24,
        num_attention_heads=16, intermediate_size=4096,
    ),
    "GPT-2 XL (transformers)": lambda: hugging_face(
        "GPT2LMHeadModel", "GPT2Config", seq=1024, n_embd=1600, n_layer=48, n_head=25
    ),
}  # fmt: skip


# ---------------------------------------------------------------- timing


@dataclass(frozen=True)
class Result:
    """One case. `seconds` is the whole process, Python's start and imports included;
    `validate_seconds` the call alone; `cpu_seconds` processor time of the process."""

    case: str
    seconds: float
    validate_seconds: float
    cpu_seconds: float
    peak_mib: float
    num_parameters: int
    ok: bool


def validate_here(case: str) -> None:
    """Validate one case in this process and print what was found."""
    import openwafer

    model, batch = CASES[case]()
    began = time.perf_counter()
    report = openwafer.validate(model, batch)
    seconds = time.perf_counter() - began
    num_parameters = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"seconds": seconds, "ok": report.ok, "num_parameters": num_parameters}))


def time_once(case: str) -> Result:
    """Validate one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.validation_speed", "--here", case]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{case} failed: {' '.join(command)}")
    found = json.loads(printed.splitlines()[-1])
    return Result(
        case=case,
        seconds=seconds,
        validate_seconds=found["seconds"],
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_mib=usage.ru_maxrss / 1024,
        num_parameters=found["num_parameters"],
        ok=found["ok"],
    )


def median(results: list[Result]) -> Result:
    """Each figure's median; the largest peak."""
    first = results[0]
    return Result(
        first.case,
        statistics.median(r.seconds for r in results),
        statistics.median(r.validate_seconds for r in results),
        statistics.median(r.cpu_seconds for r in results),
        max(r.peak_mib for r in results),
        first.num_parameters,
        all(r.ok for r in results),
    )


def page(results: list[Result], command: str, rounds: int, load: float) -> str:
    """The results as Markdown."""
    import torch

    rows = [
        f"| {r.case} | {r.num_parameters / 1e9:.2f} | {r.seconds:.1f} | {r.validate_seconds:.1f} "
        f"| {r.cpu_seconds:.1f} | {r.peak_mib:.0f} |"
        for r in results
    ]
    return "\n".join(
        [
            "# How long validating takes",
            "",
            f"`{command}`, {datetime.date.today()}; Linux {platform.machine()}, {os.cpu_count()} "
            f"cores, load average {load:.1f} before it began; "
            f"Python {platform.python_version()}, torch {torch.__version__}. Median of {rounds} "
            "rounds, a fresh process each. Models are on the meta device: nothing is allocated.",
            "",
            "| model | billion parameters | whole process, s | `openwafer.validate`, s | "
            "processor time, s | peak MiB |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "The whole process includes starting Python, importing torch (and `transformers`), and "
            "building the model.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.validation_speed")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--here", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return validate_here(options.here)
    load = os.getloadavg()[0]
    rounds = [[time_once(case) for case in options.cases] for _ in range(options.rounds)]
    results = [median(list(of_case)) for of_case in zip(*rounds, strict=True)]
    for result in results:
        print(json.dumps(asdict(result)), flush=True)
    if options.write:
        command = " ".join(["python -m benchmarks.validation_speed", *sys.argv[1:]])
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(page(results, command, options.rounds, load), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
