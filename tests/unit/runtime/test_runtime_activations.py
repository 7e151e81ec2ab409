"""Ways to keep activations give the same bits; a step stays within what was planned for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import model_of
from runtime_reference import Setup, assert_states_equal, batches_like, optimizer_config, run_steps

from openwafer.errors import PlanError
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.memory.activations import LiveTensors, Policy
from openwafer.runtime.memory.layer_memory import ModelMemory, model_memory
from openwafer.runtime.memory.spill import SPILL_BUFFERS, DiskSpill
from openwafer.runtime.memory.step_memory import plan_step, step_memory

POLICIES: tuple[Policy, ...] = ("keep", "recompute", "spill")

MODELS = ("gpt, tied head", "gpt, softmax dropout", "unet", "conv with batch norm", "mlp")


@pytest.fixture(scope="module")
def setups() -> dict[str, Setup]:
    return {}


def setup_of(setups: dict[str, Setup], name: str) -> Setup:
    if name not in setups:
        setups[name] = Setup(*model_of(name))
    return setups[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_way_gives_the_same_bits_as_keeping(
    name: str, setups: dict[str, Setup], tmp_path: Path
) -> None:
    setup = setup_of(setups, name)
    config = optimizer_config("adamw", max_gradient_norm=1.0)
    data = batches_like(setup.batch, 4)
    expected = setup.streaming(config)
    losses = [result.loss for result in run_steps(expected, data, microbatches=2)]
    for policy in POLICIES:
        for folder in (None, tmp_path):
            for depth in (0, 2):
                found = setup.streaming(config, folder, policy=policy, depth=depth)
                results = run_steps(found, data, microbatches=2)
                assert [r.loss for r in results] == losses, (policy, folder, depth)
                assert_states_equal(found.state(), expected.state())
                found.close()
    expected.close()


# ---------------------------------------------------------------- the account and the plan


@pytest.mark.parametrize("waiting", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_takes_no_more_than_was_planned(
    name: str, policy: Policy, waiting: int, setups: dict[str, Setup], tmp_path: Path
) -> None:
    setup = setup_of(setups, name)
    memory = DeviceMemory()
    executor = setup.streaming(
        optimizer_config(), tmp_path, policy=policy, memory=memory, waiting=waiting
    )
    fixed = executor._store.staging_bytes
    run_steps(executor, batches_like(setup.batch, 4), microbatches=2)
    executor.close()
    planned = step_memory(
        model_memory(setup.train),
        (policy,) * len(setup.layers),
        prefetch_depth=1,
        returns_waiting=waiting,
        num_microbatches=2,
    )
    at_least = SPILL_BUFFERS * 4096 if policy == "spill" else 0  # a buffer is whole pages
    assert memory.peak_bytes - fixed <= max(planned.peak_bytes, planned.peak_bytes + at_least)
    assert memory.in_use_bytes == 0


def deep(setup: Setup, count: int) -> ModelMemory:
    """The sizes of a deeper model: its largest layer again and again."""
    memory = model_memory(setup.train)
    largest = max(memory.layers, key=lambda layer: layer.saved_bytes)
    return dataclasses.replace(memory, layers=(largest,) * count)


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 6),
    st.floats(0.05, 1.2),
    st.floats(0.0, 0.5),
)
def test_what_is_chosen_fits_or_the_error_says_what_would(
    num_layers: int, num_microbatches: int, waiting: int, share: float, kept_share: float
) -> None:
    model = deep(SETUP, num_layers)
    whole = step_memory(
        model, ("keep",) * num_layers, prefetch_depth=1, num_microbatches=num_microbatches
    )
    budget = int(whole.peak_bytes * share)
    options = {
        "choice": "auto",
        "prefetch_depth": 1,
        "returns_waiting": waiting,
        "num_microbatches": num_microbatches,
        "kept_share": kept_share,
        "spills_elsewhere": True,
    }
    try:
        plan = plan_step(model, budget_bytes=budget, **options)
    except PlanError as error:
        enough = int(error.allowed.split(" MiB")[0].replace(",", "")) * 2**20
        plan, budget = plan_step(model, budget_bytes=enough, **options), enough
    assert plan.memory.peak_bytes <= budget * (1 - kept_share)
    assert 1 <= plan.returns_waiting <= waiting
    kept = [policy == "keep" for policy in plan.policies]
    assert kept == sorted(kept)  # the last ones, which are needed first


SETUP = Setup(*model_of("mlp"))


def test_recomputing_grows_by_a_layers_inputs_alone() -> None:
    """48 layers take what 12 do, but for the inputs that are kept of each."""
    small, large = deep(SETUP, 12), deep(SETUP, 48)
    peaks = [
        step_memory(m, ("recompute",) * len(m.layers), prefetch_depth=1, num_microbatches=2)
        for m in (small, large)
    ]
    inputs = sum(large.value_bytes[name] for name in large.layers[0].inputs)
    assert peaks[1].peak_bytes - peaks[0].peak_bytes <= 2 * 36 * inputs


# ---------------------------------------------------------------- parts


def test_memory_that_several_tensors_show_counts_once() -> None:
    memory = DeviceMemory()
    live = LiveTensors(memory)
    whole = torch.zeros(64)
    live.hold([whole, whole[:8], whole.view(8, 8).t()])
    assert memory.in_use_bytes == 256
    live.drop([whole, whole[:8]])
    assert memory.in_use_bytes == 256
    live.drop([whole.view(8, 8).t()])
    assert memory.in_use_bytes == 0


def test_spilled_tensors_come_back_with_their_strides_and_shared_memory(tmp_path: Path) -> None:
    memory = DeviceMemory()
    spill = DiskSpill(tmp_path, 1000, 2, memory)
    units: dict[tuple[int, int], list[torch.Tensor]] = {}
    for layer in range(6):
        whole = torch.randn(40, 30)
        tensors = [
            whole[:, 10:20].unflatten(1, (2, 5)).transpose(0, 1),
            whole.t(),
            torch.randint(0, 9, (7,)),
            torch.randn(3, 3).bfloat16(),
            torch.empty(0, 4),
        ]
        units[layer, 0] = [t.clone(memory_format=torch.preserve_format) for t in tensors]
        units[layer, 0] = tensors
        spill.put((layer, 0), tensors)
    for layer in range(5, -1, -1):
        spill.ask((layer, 0))
    for layer in range(5, -1, -1):
        found = spill.get((layer, 0))
        for tensor, wanted in zip(found, units[layer, 0], strict=True):
            assert torch.equal(tensor, wanted)
            assert tensor.stride() == wanted.stride()
            assert tensor.dtype == wanted.dtype
        assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
        spill.done((layer, 0))
    spill.close()
    assert memory.in_use_bytes == 0
    assert list(tmp_path.iterdir()) == []
