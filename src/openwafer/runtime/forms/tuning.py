"""Which form of an attention is faster on this machine.

Decides by measuring, forward and backward, torch's own kernel against blocks of matrix products of
several sizes (attention.py), in the shapes of the model; says what was found in the log, and keeps
it beside what Inductor keeps (TORCHINDUCTOR_CACHE_DIR), so that the next run takes the same form
without measuring. Does not decide where a form may stand for another (forms.py).
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from openwafer.files import write_text
from openwafer.runtime.forms.attention import AttentionShape, attend_in_blocks
from openwafer.runtime.forms.inductor import compile_graph
from openwafer.runtime.forms.replacements import AttentionUse

__all__ = ["measured_block"]

_log = logging.getLogger("openwafer")

BLOCKS = (128, 256)
ROUNDS, SECONDS = 5, 5.0
"""The least of both that is spent on measuring, compiling apart."""

_Run = Callable[[], Any]


def measured_block(use: AttentionUse) -> int | None:
    """Queries at a time on a CPU, or None where torch's own kernel is faster."""
    if use.dropout:
        # Torch has no kernel with dropout on a CPU: it would hold all weights, several times.
        return BLOCKS[0]
    file = _file()
    known = _read(file)
    key = _key(use)
    if key not in known:
        seconds = _measure(use)
        known = {**_read(file), key: seconds}
        _write(file, known)
        told = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
        _log.info("attention %s: %s", "×".join(map(str, use.sizes)), told)
    fastest = min(known[key], key=known[key].__getitem__)
    return None if fastest == "kernel" else int(fastest.removeprefix("blocks of "))


def _measure(use: AttentionUse) -> dict[str, float]:
    """Seconds of forward and backward by form: the least of several rounds, the forms in turn.

    Whatever else the machine does only adds to a time, and adds more to forms of many small parts.
    """
    tensors = _example(use)
    bias = torch.zeros(use.sizes[2:4], dtype=use.dtype) if use.biased else None
    runs: dict[str, _Run] = {"kernel": _kernel(use, tensors, bias)}
    for block in BLOCKS:
        if block < use.sizes[2]:
            runs[f"blocks of {block}"] = _blocks(use, tensors, bias, block)
    found: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    while len(found["kernel"]) <= ROUNDS or time.perf_counter() < end:
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - began)
    return {name: min(seconds[1:]) for name, seconds in found.items()}


def _example(use: AttentionUse) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the result, laid out as projections give them."""
    batch, heads, queries, keys, features = use.sizes
    return [
        torch.rand(batch, length, heads, features, dtype=use.dtype).transpose(1, 2)
        for length in (queries, keys, keys, queries)
    ]


def _kernel(use: AttentionUse, tensors: list[torch.Tensor], bias: torch.Tensor | None) -> _Run:
    """As a layer would run it: a causal mask is one that torch's kernel is told of."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors[:3])

    def run() -> Any:
        result = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=use.causal
        )
        return torch.autograd.grad(result, (query, key, value), tensors[3])

    return run


def _blocks(
    use: AttentionUse, tensors: list[torch.Tensor], bias: torch.Tensor | None, block: int
) -> _Run:
    shape = AttentionShape(use.sizes[4] ** -0.5, block, use.causal)
    given = tensors if bias is None else [*tensors, bias]

    def both(*values: torch.Tensor) -> list[torch.Tensor]:
        query, key, value, gradient, *mask = values
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            given_mask = mask[0] if mask else None
            result = attend_in_blocks(leaves[0], leaves[1], leaves[2], given_mask, None, shape)
            return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]

    with torch.no_grad():
        graph = make_fx(both, tracing_mode="fake")(*given)
        compiled = compile_graph(graph, given)
    return lambda: compiled(*given)


# ------------------------------------------------------------------ what was found before


def _key(use: AttentionUse) -> str:
    facts = {name: str(value) for name, value in asdict(use).items()}
    machine = (_processor(), torch.get_num_threads(), torch.__version__)
    return json.dumps([*facts.values(), *map(str, machine)])


@cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _file() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "openwafer_attention.json"


def _read(file: Path) -> Mapping[str, dict[str, float]]:
    """What is known; nothing where the file is not there or not ours."""
    try:
        held: Any = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(key): {str(name): float(value) for name, value in seconds.items()}
            for key, seconds in held.items()
            if seconds
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(file: Path, known: Mapping[str, Mapping[str, float]]) -> None:
    try:
        write_text(file, json.dumps(known, indent=1))
    except OSError as error:
        _log.warning("the choice of attention's form is not kept: %s", error)
