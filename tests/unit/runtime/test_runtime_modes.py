"""The executors: the same numbers in every mode, and nothing done by halves when a step fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runtime_cases import Net, model_of
from runtime_reference import (
    Setup,
    assert_states_equal,
    batches_like,
    optimizer_config,
    run_steps,
)
from torch import nn

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import CheckpointError, PlanError
from openwafer.frontends.torch.plain import PlainExecutor
from openwafer.runtime.executor import Executor, ModelState
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.weight_streaming import WeightStreaming

MODES = ("plain", "pipelined", "ram", "disk")


@pytest.fixture(scope="module")
def gpt() -> Setup:
    """Tied weights, dropout, four kinds of layers."""
    return Setup(*model_of("gpt, fused attention dropout"), evaluates=True)


@pytest.fixture(scope="module")
def convolutions() -> Setup:
    return Setup(*model_of("conv with batch norm"), evaluates=True)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Executor]]:
    """`make(setup, mode, config)`: an executor that is closed after the test."""
    made: list[Executor] = []

    def build(setup: Setup, mode: str, config: OptimizerConfig, **options) -> Executor:
        if mode in ("ram", "disk"):
            folder = tmp_path if mode == "disk" else None
            made.append(setup.streaming(config, folder, **options))
        else:
            made.append(getattr(setup, mode)(config, **options))
        return made[-1]

    yield build
    for executor in made:
        executor.close()


CONFIGS = {
    "adamw": optimizer_config("adamw"),
    "clipped by norm": optimizer_config("adamw", max_gradient_norm=0.5),
    "clipped by value": optimizer_config("sgd", momentum=0.9, max_gradient_value=0.01),
    "constant loss scale": optimizer_config("adam", loss_scaling_factor=1024.0),
    "dynamic loss scale": optimizer_config(
        "adam", loss_scaling_factor="dynamic", max_gradient_norm=1.0, steps_per_increase=2
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_mode_gives_the_same_numbers(name: str, gpt: Setup, make) -> None:
    data = batches_like(gpt.batch, 6)
    config = CONFIGS[name]
    resident = make(gpt, "pipelined", config)
    expected = run_steps(resident, data, microbatches=2)
    plain = make(gpt, "plain", config)
    for found, wanted in zip(run_steps(plain, data, microbatches=2), expected, strict=True):
        torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=1e-6)
        assert found.grad_norm == (wanted.grad_norm and pytest.approx(wanted.grad_norm, rel=1e-5))
    assert_states_equal(plain.state(), resident.state(), 2e-5)
    for mode, depth in (("ram", 0), ("ram", 1), ("ram", 3), ("disk", 0), ("disk", 2)):
        streamed = make(gpt, mode, config, depth=depth)
        for found, wanted in zip(run_steps(streamed, data, microbatches=2), expected, strict=True):
            assert float(found.loss) == float(wanted.loss)
            assert found.grad_norm == wanted.grad_norm
            assert found.loss_scale == wanted.loss_scale
        assert_states_equal(streamed.state(), resident.state())


def test_batch_statistics_agree(convolutions: Setup, make) -> None:
    data = batches_like(convolutions.batch, 4)
    states: dict[str, ModelState] = {}
    losses: dict[str, float] = {}
    for mode in MODES:
        executor = make(convolutions, mode, optimizer_config())
        run_steps(executor, data, microbatches=2)
        losses[mode] = float(executor.eval_step(data[0], step=2).loss)
        states[mode] = executor.state()
    assert_states_equal(states["ram"], states["pipelined"])
    assert_states_equal(states["disk"], states["pipelined"])
    assert_states_equal(states["plain"], states["pipelined"], 2e-5)
    assert states["plain"].model["net.1.num_batches_tracked"] == 4
    assert losses["ram"] == losses["disk"] == losses["pipelined"]
    assert losses["plain"] == pytest.approx(losses["pipelined"], rel=1e-5)


# bf16 and fp16: the same kernels on the same operands; only the sum of a tied weight's gradients
# differs (test_runtime_lower.py), so that a model without one is equal to fp32 rounding.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_equals_the_plain_loop(dtype: torch.dtype, make) -> None:
    setup = Setup(*model_of("unet"), dtype=dtype)
    scaling = "dynamic" if dtype == torch.float16 else None
    config = optimizer_config("adamw", loss_scaling_factor=scaling, max_gradient_norm=1.0)
    data = batches_like(setup.batch, 4)
    states = {}
    for mode in ("plain", "pipelined", "ram"):
        executor = make(setup, mode, config)
        run_steps(executor, data, microbatches=2)
        states[mode] = executor.state()
    assert_states_equal(states["ram"], states["pipelined"])
    assert_states_equal(states["plain"], states["pipelined"], 1e-6)


def _overflowing() -> Setup:
    """loss = Σ w·x with |x| near the largest float: finite, but no room for a loss scale."""
    torch.manual_seed(0)
    weight = nn.Parameter(1e-6 * torch.randn(3, 6))
    return Setup(Net(lambda m, x: (m.w * x).sum(), w=weight), (torch.full((3, 6), 1e38),))


def test_an_overflow_is_skipped_in_every_mode(make) -> None:
    setup = _overflowing()
    config = optimizer_config("adamw", loss_scaling_factor="dynamic", initial_loss_scale=2.0**10)
    small = (torch.ones(3, 6),)
    states = []
    for mode in MODES:
        executor = make(setup, mode, config)
        before = executor.state()
        result = executor.train_step([setup.batch], step=0)
        assert not result.applied
        assert result.loss_scale == 2.0**10
        after = executor.state()
        assert after.loss_scale["scale"] == 2.0**9
        assert torch.equal(after.model["w"], before.model["w"])
        assert executor.train_step([small], step=1).applied
        states.append(executor.state())
        assert not torch.equal(states[-1].model["w"], before.model["w"])
    for state in states[1:]:
        assert_states_equal(state, states[0], 1e-6)


# ---------------------------------------------------------------- order of updates


class Watched:
    """A store that notes in which order it is asked, and can fail."""

    def __init__(self, executor: WeightStreaming) -> None:
        self.calls: list[str] = []
        self.fail_at: str | None = None
        store = executor._store
        fetch, update = store.fetch, store.update

        def watched_fetch(wanted):
            self._note(f"fetch {wanted[0].name if wanted else '-'}")
            return fetch(wanted)

        def watched_update(shard, *arguments):
            self._note(f"update {shard.index}")
            return update(shard, *arguments)

        store.fetch, store.update = watched_fetch, watched_update

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fail_at:
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_unclipped_updates_run_as_gradients_arrive(mode: str, gpt: Setup, make) -> None:
    executor = make(gpt, mode, optimizer_config())
    watched = Watched(executor)
    executor.train_step([gpt.batch], step=0)
    executor._traffic._thread.submit(int).result()
    assert [c for c in watched.calls if c.startswith("update")] == [
        "update 3", "update 2", "update 1", "update 0",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_clipped_updates_wait_for_the_next_fetch_of_their_layer(mode, gpt: Setup, make) -> None:
    executor = make(gpt, mode, optimizer_config(max_gradient_norm=1.0), depth=0)
    watched = Watched(executor)
    executor.train_step([gpt.batch], step=0)
    executor._traffic._thread.submit(int).result()
    assert not any(call.startswith("update") for call in watched.calls)
    watched.calls.clear()
    executor.train_step([gpt.batch], step=1)
    assert watched.calls[:8:2] == ["update 0", "update 1", "update 2", "update 3"]


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_evaluation_and_state_see_every_update(mode: str, gpt: Setup, make) -> None:
    config = optimizer_config(max_gradient_norm=1.0)
    resident, streamed = make(gpt, "pipelined", config), make(gpt, mode, config)
    for step, batch in enumerate(batches_like(gpt.batch, 3)):
        for executor in (resident, streamed):
            executor.train_step([batch], step=step)
        losses = [float(e.eval_step(batch, step=step).loss) for e in (resident, streamed)]
        assert losses[0] == losses[1]
    assert_states_equal(streamed.state(), resident.state())
    assert_states_equal(streamed.state(), streamed.state())


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("source", MODES)
def test_a_run_goes_on_in_another_mode(source: str, gpt: Setup, make) -> None:
    config = CONFIGS["dynamic loss scale"]
    data = batches_like(gpt.batch, 4)
    whole = make(gpt, source, config)
    run_steps(whole, data)
    first = make(gpt, source, config)
    run_steps(first, data[:2])
    saved = first.state()
    run_steps(first, data[2:])  # what was saved is a copy
    for target in MODES:
        second = make(gpt, target, config)
        run_steps(second, data[3:])  # what it held does not matter
        second.load_state(saved)
        assert_states_equal(second.state(), saved)
        run_steps(second, data[2:], first=2)
        exact = source == target or "plain" not in (source, target)
        assert_states_equal(second.state(), whole.state(), 0.0 if exact else 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_loading_weights_alone_keeps_the_optimizer(mode: str, gpt: Setup, make) -> None:
    config = CONFIGS["dynamic loss scale"]
    executor = make(gpt, mode, config)
    run_steps(executor, batches_like(gpt.batch, 3))
    before = executor.state()
    weights = {name: torch.zeros_like(t) for name, t in before.model.items()}
    executor.load_state(ModelState(model=weights, optimizer={}, loss_scale={}), weights_only=True)
    after = executor.state()
    assert all(not tensor.any() for tensor in after.model.values())
    expected = ModelState(model=weights, optimizer=before.optimizer, loss_scale=before.loss_scale)
    assert_states_equal(after, expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_state_that_lacks_a_weight_is_refused(mode, gpt: Setup, make) -> None:
    executor = make(gpt, mode, optimizer_config())
    saved = executor.state()
    del saved.optimizer["h.1.ffn1.weight"]
    with pytest.raises(CheckpointError):
        executor.load_state(saved)


@pytest.fixture(scope="module")
def tied() -> Setup:
    return Setup(*model_of("gpt, tied head"))


@pytest.mark.parametrize("mode", MODES)
def test_state_has_every_name_of_a_tied_weight(mode: str, tied: Setup, make) -> None:
    model = tied.model
    executor = make(tied, mode, optimizer_config("sgd", momentum=0.0))
    executor.train_step([tied.batch], step=0)
    state = executor.state()
    assert state.model.keys() == model.state_dict().keys()
    assert torch.equal(state.model["wte.weight"], state.model["head.weight"])
    # An optimizer without state still has an entry for each weight: a checkpoint needs them.
    assert state.optimizer.keys() == {name for name, _ in model.named_parameters()}


# ---------------------------------------------------------------- values that are not finite


def _poisoned(setup: Setup, executor: Executor, weight: str) -> None:
    state = executor.state()
    state.model[weight].view(-1)[0] = float("nan")
    executor.load_state(state, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_changes_nothing(mode, convolutions: Setup, make) -> None:
    executor = make(convolutions, mode, optimizer_config(max_gradient_norm=1.0))
    good = batches_like(convolutions.batch, 3)
    run_steps(executor, good)
    before = executor.state()
    bad = (torch.full_like(good[0][0], float("inf")), good[0][1])
    result = executor.train_step([good[0], bad], step=3)
    assert not result.loss.isfinite()
    assert not result.applied
    assert "entry [0] of microbatch 1" in executor.explain_nonfinite([good[0], bad], step=3) or (
        mode == "plain"
    )
    assert_states_equal(executor.state(), before)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_bad_layer_is_named(mode: str, gpt: Setup, make) -> None:
    executor = make(gpt, mode, optimizer_config())
    _poisoned(gpt, executor, "h.1.ffn2.bias")
    result = executor.train_step([gpt.batch], step=0)
    assert result.loss.isnan()
    before = executor.state()
    text = executor.explain_nonfinite([gpt.batch], step=0)
    assert "h.1.ffn2" in text
    assert "h.0" not in text
    assert_states_equal_with_nan(executor.state(), before)


def assert_states_equal_with_nan(found: ModelState, expected: ModelState) -> None:
    for name, tensor in expected.model.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_inside_is_named_with_its_line(mode: str, make) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.h[1](m.h[0](x).exp()).mean(), h=nn.ModuleList(nn.Linear(4, 4) for _ in "ab")
    )
    setup = Setup(model, (torch.randn(2, 4),))
    executor = make(setup, mode, optimizer_config())
    bad = (torch.full((2, 4), 1e9),)
    assert not executor.train_step([bad], step=0).applied
    text = executor.explain_nonfinite([bad], step=0)
    # exp() runs between the modules: the compiled modes have it in the layer it follows.
    assert ("h.1" if mode == "plain" else "h.0") in text
    assert mode == "plain" or "test_runtime_modes.py:" in text


def test_without_the_guard_the_update_is_made(gpt: Setup, make) -> None:
    for mode in MODES:
        executor = make(gpt, mode, optimizer_config(), guard_loss=False)
        _poisoned(gpt, executor, "h.1.ffn2.bias")
        assert executor.train_step([gpt.batch], step=0).applied
        assert executor.state().model["wte.weight"].isnan().any()


# ---------------------------------------------------------------- refusals and failures


def _nothing_trained(m, x):
    return m.a(x).detach().square().mean()


@pytest.mark.parametrize("forward", [_nothing_trained, lambda m, x: x.square().mean()])
def test_a_loss_without_gradient_is_refused(forward, make) -> None:
    setup = Setup(Net(forward, a=nn.Linear(6, 6)), (torch.randn(2, 6),))
    for mode in MODES:
        with pytest.raises(PlanError, match="nothing to train"):
            make(setup, mode, optimizer_config()).train_step([setup.batch], step=0)


def test_accumulation_with_a_late_buffer_is_refused_in_streaming(make) -> None:
    setup = Setup(*model_of("batch norm used twice"))
    data = batches_like(setup.batch, 2)
    streamed, resident = (make(setup, m, optimizer_config()) for m in ("ram", "pipelined"))
    with pytest.raises(PlanError, match=r"bn\.running_mean"):
        streamed.train_step(data, step=0)
    for executor in (streamed, resident):
        run_steps(executor, data)
    assert_states_equal(streamed.state(), resident.state())


@pytest.mark.parametrize("config", [CONFIGS["adamw"], CONFIGS["clipped by norm"]])
@pytest.mark.parametrize("call", ["fetch h.0.ln1.weight", "fetch ln.weight", "update 2"])
@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_a_store_that_fails_stops_the_run(mode, call, config, gpt: Setup, make, caplog) -> None:
    executor = make(gpt, mode, config, depth=2)
    watched = Watched(executor)
    watched.fail_at = call
    with pytest.raises(OSError, match="Input/output"):
        run_steps(executor, batches_like(gpt.batch, 3))
    with pytest.raises(OSError, match="Input/output"):
        executor.state()
    executor.close()
    executor.close()
    assert executor._memory.in_use_bytes == 0
    assert not caplog.records


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_a_failure_in_the_very_last_update_is_told_on_close(mode, gpt: Setup, make, caplog) -> None:
    executor = make(gpt, mode, optimizer_config())
    Watched(executor).fail_at = "update 0"
    executor.train_step([gpt.batch], step=0)
    executor.close()
    assert "Input/output error" in caplog.text


def test_a_step_that_fails_midway_leaves_the_executor_usable(gpt: Setup, make) -> None:
    executor = make(gpt, "ram", optimizer_config(max_gradient_norm=1.0), depth=3)
    resident = make(gpt, "pipelined", optimizer_config(max_gradient_norm=1.0))
    layer = executor._workload.train.layers[2]
    graph = layer.functions.forward_graph
    forward = graph.forward
    for one in (executor, resident):
        one.train_step([gpt.batch], step=0)

    def broken(*arguments):
        raise MemoryError

    graph.forward = broken
    try:
        with pytest.raises(MemoryError):
            executor.train_step([gpt.batch], step=1)
    finally:
        graph.forward = forward
    assert executor._memory.in_use_bytes == 0
    for one in (executor, resident):
        one.train_step([gpt.batch], step=1)
    assert_states_equal(executor.state(), resident.state())


@pytest.mark.parametrize(("mode", "waits"), [("ram", False), ("disk", True)])
def test_threads_run_where_a_store_is_waited_for_and_end(mode, waits, gpt: Setup, make) -> None:
    before = threading.active_count()
    executor = make(gpt, mode, optimizer_config(max_gradient_norm=1.0))
    executor.train_step([gpt.batch], step=0)
    assert (threading.active_count() > before) == waits
    executor.close()
    executor.close()
    assert threading.active_count() == before


# ---------------------------------------------------------------- the budget


def test_the_account_is_balanced_and_bounded(gpt: Setup, make) -> None:
    memory = DeviceMemory()
    executor = make(gpt, "ram", optimizer_config(), depth=1, memory=memory)
    run_steps(executor, batches_like(gpt.batch, 4), microbatches=2)
    executor.eval_step(gpt.batch, step=2)
    executor.state()  # waits for the updates, which still hold gradients
    assert memory.in_use_bytes == 0
    layers = executor._workload.train.layers
    kept = 2 * sum(layer.functions.saved_bytes for layer in layers)
    sizes = [
        sum(executor._workload.weights[n].numel() * 4 for n in layer.layer.parameters)
        for layer in layers
    ]
    # Weights: two layers' at a time, a third where the next fetch is done before the main thread
    # has said that it is through with the last. Gradients: of the layer that runs and of two that
    # the store takes over. Saved tensors of two layers may show the same memory.
    assert max(sizes) < memory.peak_bytes <= kept + 6 * max(sizes)


def test_a_step_beyond_the_budget_is_refused_and_cleaned_up(gpt: Setup, make) -> None:
    whole = DeviceMemory()
    make(gpt, "ram", optimizer_config(), memory=whole).train_step([gpt.batch], step=0)
    memory = DeviceMemory(budget_bytes=whole.peak_bytes // 2)
    executor = make(gpt, "ram", optimizer_config(), memory=memory)
    with pytest.raises(PlanError, match="device memory") as caught:
        executor.train_step([gpt.batch], step=0)
    assert f"{whole.peak_bytes // 2:,} bytes" in caught.value.allowed
    executor.close()
    assert memory.in_use_bytes == 0
    assert memory.peak_bytes <= whole.peak_bytes // 2


def test_the_plain_loop_ends_as_a_torch_loop_does(gpt: Setup) -> None:
    """Independent of every part of ours but the draws: a hand-written AdamW loop."""
    setup = Setup(*model_of("mlp"))
    executor = setup.plain(optimizer_config("adamw", max_gradient_norm=0.5))
    assert isinstance(executor, PlainExecutor)
    data = batches_like(setup.batch, 4)
    run_steps(executor, data, microbatches=2)
    torch.manual_seed(0)
    model = model_of("mlp")[0]
    decayed = [w for n, w in model.named_parameters() if "bias" not in n]
    others = [w for n, w in model.named_parameters() if "bias" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05, eps=1e-6)
    for state in (optimizer.state[w] for w in model.parameters()):
        assert not state
    for step in range(2):
        optimizer.zero_grad()
        for batch in data[2 * step : 2 * step + 2]:
            (model(*batch) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        # Release 1.6 has no bias correction by default.
        for weight in model.parameters():
            optimizer.state[weight].setdefault("step", torch.tensor(float("inf")))
            optimizer.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
            optimizer.state[weight].setdefault("exp_avg_sq", torch.zeros_like(weight))
        optimizer.step()
    found = executor.state().model
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
