"""The benchmark's GPU case: that it says so without one, and that its code runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from benchmarks.weight_streaming_case import carried_on
from benchmarks.weight_streaming_gpu import run
from benchmarks.weight_streaming_gpu_side import SETTINGS, make_model, microbatches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        next(iter(run("gpu")))


def test_the_operations_of_a_step_are_those_that_torch_counts() -> None:
    """Torch's counter takes attention whole; ours leaves out what a causal mask hides."""
    setting = SETTINGS["small"]
    model = make_model(setting, setting.layers)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in microbatches(setting):
            model(**batch).backward()
    hidden = 6.0 * setting.layers * setting.sequence * setting.width * setting.tokens
    counted = setting.step_flops(setting.layers) + hidden
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-3)


def test_times_of_few_layers_are_carried_on_to_all() -> None:
    """Of a model whose layers take 3 s each, and the rest 5 s."""
    assert carried_on((5 + 3 * 1, 5 + 3 * 8), (1, 8), 28) == 5 + 3 * 28


@pytest.mark.slow
def test_the_same_code_on_a_cpu() -> None:
    (result,) = run("gpu", repeat=1, name="small")
    line = result.line()
    assert line["ratio"] > 0
    assert line["share of bf16 peak"] > 0
    assert "compute" in line["line"]
    assert line["device"] == "no GPU: the CPU"
