"""Weights and gradients between the host and a simulated GPU, which runs as late as it may."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_cases import model_of
from runtime_reference import Setup, assert_states_equal, batches_like, optimizer_config, run_steps
from simulated_gpu import SimulatedGpu, installed, kernels_waiting, names_of

from openwafer.errors import PlanError
from openwafer.runtime import weight_streaming
from openwafer.runtime.compiled import StreamedWeight
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.stores.device_link import CudaLink
from openwafer.runtime.stores.disk_store import DiskStore
from openwafer.runtime.stores.store import RamStore, Shard, WeightStore
from openwafer.runtime.stores.weight_traffic import WeightTraffic
from openwafer.runtime.update import UpdateRule

LAYERS, STEPS, RATE = 4, 3, 0.1
CONFIG = optimizer_config("sgd", weight_decay_rate=0.0)
BF16 = torch.bfloat16


def first_weights() -> dict[str, torch.Tensor]:
    """A matrix, taken in 16 bits, and a bias, taken as it is, for each layer."""
    torch.manual_seed(0)
    shapes = {"matrix": (40, 3), "bias": (7,)}
    return {f"{i}.{n}": torch.randn(shape) for i in range(LAYERS) for n, shape in shapes.items()}


def layers_of(weights: dict[str, torch.Tensor]) -> list[Any]:
    names = [[name for name in weights if name.startswith(f"{i}.")] for i in range(LAYERS)]
    return [
        SimpleNamespace(
            layer=SimpleNamespace(name=f"layer {i}", parameters=own),
            streamed=tuple(
                StreamedWeight(n, BF16 if n.endswith("matrix") else torch.float32) for n in own
            ),
        )
        for i, own in enumerate(names)
    ]


def forward(state: dict[str, float], *weights: torch.Tensor) -> None:
    state["x"] = 0.9 * state["x"] + sum(float(weight.float().mean()) for weight in weights)


def backward(state: dict[str, float], count: int, *tensors: torch.Tensor) -> None:
    """The gradients after the weights; float32."""
    for weight, gradient in zip(tensors[:count], tensors[count:], strict=True):
        gradient.copy_(0.1 * weight.float() + state["x"])
    state["x"] *= 0.5


def expected_weights() -> dict[str, torch.Tensor]:
    """The same network, one thing after another."""
    weights = first_weights()
    for _ in range(STEPS):
        state = {"x": 1.0}
        taken = [
            [weights[w.name].to(w.dtype) for w in layer.streamed] for layer in layers_of(weights)
        ]
        for given_weights in taken:
            forward(state, *given_weights)
        for layer, given_weights in zip(reversed(layers_of(weights)), reversed(taken), strict=True):
            gradients = [torch.empty(w.shape) for w in given_weights]
            backward(state, len(given_weights), *given_weights, *gradients)
            for weight, gradient in zip(layer.streamed, gradients, strict=True):
                weights[weight.name] -= RATE * gradient
    return weights


class Streamed:
    """The network on a simulated GPU, its kernels queued by a thread that waits for none."""

    def __init__(self, gpu: SimulatedGpu, folder: Path | None, depth: int) -> None:
        weights = first_weights()
        shards = [
            Shard(index=i, names=tuple(layer.layer.parameters), trained=layer.layer.parameters)
            for i, layer in enumerate(layers_of(weights))
        ]
        copies = {name: {BF16} for name in weights if name.endswith("matrix")}
        self.store: WeightStore = (
            RamStore(weights, shards, CONFIG, copies=copies, pin=True)
            if folder is None
            else DiskStore(weights, shards, CONFIG, folder, copies=copies, pin=True)
        )
        self.gpu, self.layers, self.state = gpu, layers_of(weights), {"x": 1.0}
        self.memory = DeviceMemory()
        self.traffic = WeightTraffic(
            self.store,
            shards,
            rule=UpdateRule(CONFIG),
            link=CudaLink(torch.device("cpu")),
            memory=self.memory,
            prefetch_depth=depth,
        )

    def step(self, waiting: int = 1) -> None:
        gpu, state = self.gpu, self.state
        gpu.computing.push("run", lambda: state.update(x=1.0))
        for _, _, weights in self.traffic.stream(self.layers):
            gpu.compute(lambda *given_weights: forward(state, *given_weights), *weights)
        for index, layer, weights in self.traffic.stream(self.layers, backward=True):
            self.traffic.wait_for_returns(at_most=waiting)
            gradients = [gpu.empty(*w.shape, dtype=torch.float32) for w in weights]
            self.memory.take("gradients", sum(gradient.nbytes for gradient in gradients))
            count = len(weights)
            gpu.compute(lambda *t, n=count: backward(state, n, *t), *weights, *gradients)
            named = dict(zip(layer.layer.parameters, gradients, strict=True))
            del gradients
            self.traffic.update(index, layer.layer.name, named, RATE)
            del named

    def finished_step(self) -> None:
        self.step()
        self.traffic.flush()

    def close(self) -> dict[str, torch.Tensor]:
        self.traffic.flush()
        self.gpu.finish()
        found = {name: weight.clone() for name, weight in self.store.weights().items()}
        self.traffic.close()
        self.store.close()
        return found


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def trained(
    gpu: SimulatedGpu, folder: Path | None, *, depth: int = 1, waiting: int = 1
) -> dict[str, torch.Tensor]:
    side = Streamed(gpu, folder, depth)
    for _ in range(STEPS):
        side.step(waiting)
    return side.close()


@pytest.mark.parametrize("kind", ["ram", "disk"])
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.none() | st.integers(0, 10**6), depth=st.integers(0, 3), waiting=st.integers(1, 3))
def test_any_order_that_the_events_allow_gives_the_same_numbers(
    kind: str,
    seed: int | None,
    depth: int,
    waiting: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with installed(SimulatedGpu(seed), monkeypatch) as gpu:
        folder = tmp_path if kind == "disk" else None
        found = trained(gpu, folder, depth=depth, waiting=waiting)
    for name, weight in expected_weights().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6, msg=name)
    assert not gpu.registered, "memory is still pinned"


def test_the_computing_thread_waits_for_no_event_and_memory_is_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with installed(SimulatedGpu(), monkeypatch) as gpu:
        side = Streamed(gpu, None, depth=1)
        side.step()
        for _ in range(9):
            side.step()
        # Two layers of weights, and per layer waiting or computing two gradients; how many wait at
        # a time is the threads' luck.
        assert gpu.num_blocks <= 2 + 3 * 2
        side.close()
    assert names_of(gpu.host_waits) == {"weight-store"}
    assert gpu.pageable_copies == 0
    assert side.memory.in_use_bytes == 0


def test_gradients_do_not_wait_for_layers_queued_later(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(SimulatedGpu(), monkeypatch) as gpu:
        link = CudaLink(torch.device("cpu"))
        gradient = gpu.empty(3, dtype=torch.float32)
        gpu.compute(lambda place: place.fill_(2.0), gradient)
        ready = link.gradients_ready()
        later = gpu.empty(3, dtype=torch.float32)
        gpu.compute(lambda place: place.fill_(3.0), later)
        on_host = link.to_host({"w": gradient}, ready)
        assert on_host["w"].tolist() == [2.0] * 3
        assert kernels_waiting(gpu.computing) == 1, "the later layer has not run"


def test_only_what_is_fetched_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"big": torch.randn(100_000), "bias": torch.randn(10)}
    shard = Shard(index=0, names=tuple(weights), trained=tuple(weights))
    with installed(SimulatedGpu(), monkeypatch) as gpu:
        store = RamStore(weights, [shard], CONFIG, copies={"big": {BF16}}, pin=True)
        # Whole pages around 200,000 bytes of the copy and 40 of the bias.
        assert sum(gpu.registered.values()) == 49 * 4096
        fetched = store.fetch([StreamedWeight("big", BF16), StreamedWeight("bias", torch.float32)])
        assert all(gpu._is_registered(tensor) for tensor in fetched.tensors)
        assert store.weights()["big"].data_ptr() == weights["big"].data_ptr(), "trained in place"
        store.close()
    assert not gpu.registered


def test_memory_that_cannot_be_pinned_is_an_error_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {"w": torch.zeros(10)}
    shard = Shard(index=0, names=("w",), trained=("w",))
    with installed(SimulatedGpu(), monkeypatch) as gpu:
        gpu.cudaHostRegister = lambda *given: 2
        with pytest.raises(PlanError, match="4,096 bytes of host memory cannot be pinned") as info:
            RamStore(weights, [shard], CONFIG, pin=True)
    assert "ulimit -l" in str(info.value)


@pytest.mark.parametrize("failing", ["to_device", "to_host"])
def test_a_copy_that_fails_surfaces(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(SimulatedGpu(), monkeypatch) as gpu:
        side = Streamed(gpu, None, depth=1)
        side.step()

        def fail(*given: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        monkeypatch.setattr(CudaLink, failing, fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            side.finished_step()
        side.traffic.close()
        side.store.close()


@pytest.fixture(scope="module")
def tied() -> Setup:
    """The first layer's weight is the last layer's as well."""
    return Setup(*model_of("gpt, tied head"), dtype=BF16)


@pytest.mark.parametrize(("kind", "clipped"), [("ram", False), ("ram", True), ("disk", True)])
def test_whole_steps_give_the_bits_of_the_host(
    kind: str, clipped: bool, tied: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that really compute, whose copies are late; two microbatches."""
    config = optimizer_config(max_gradient_norm=0.5 if clipped else 0.0)
    folder = tmp_path if kind == "disk" else None
    data = batches_like(tied.batch, 4)
    expected = tied.streaming(config, folder)
    run_steps(expected, data, microbatches=2)
    wanted = expected.state().copied()
    expected.close()
    monkeypatch.setattr(weight_streaming, "link_to", CudaLink)
    for seed in (None, 1):
        with installed(SimulatedGpu(seed, at_once=True), monkeypatch):
            executor = tied.streaming(config, folder)
            run_steps(executor, data, microbatches=2)
            assert_states_equal(executor.state(), wanted)
            executor.close()
