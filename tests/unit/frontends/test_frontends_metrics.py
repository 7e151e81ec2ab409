"""Metrics: the same value whether their device part runs at once or in a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from openwafer.errors import ConfigError
from openwafer.frontends.torch.capture import capture_step, flatten_batch
from openwafer.frontends.torch.metrics import (
    AccuracyMetric,
    CBMetric,
    DeviceOutputs,
    PerplexityMetric,
    capture_metrics,
    compute_all_metrics,
    forget_all_metrics,
    get_all_metrics,
    reset_all_metrics,
)
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import compile_layers
from openwafer.runtime.randomness import DrawKey


@pytest.fixture(autouse=True)
def no_metrics() -> Iterator[None]:
    forget_all_metrics()
    yield
    forget_all_metrics()


class Noted(CBMetric):
    """Keeps what its host part is called with."""

    def init_state(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def update_on_host(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))

    def compute(self) -> float:
        return float(len(self.calls))


def test_accuracy_with_and_without_weights() -> None:
    accuracy = AccuracyMetric()
    labels, predictions = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])
    assert accuracy.compute() == 0.0
    accuracy(labels, predictions)
    assert accuracy.compute() == 0.5
    accuracy(labels=labels, predictions=predictions, weights=torch.tensor([1, 1, 0, 0]))
    assert accuracy.compute() == pytest.approx(4 / 6)
    accuracy.reset()
    assert (accuracy.compute(), accuracy.num_updates) == (0.0, 0)


def test_perplexity() -> None:
    perplexity = PerplexityMetric()
    assert perplexity.compute() == 0.0
    labels = torch.zeros(2, 5, dtype=torch.int64)
    perplexity(labels, torch.tensor(20.0))
    assert perplexity.compute() == pytest.approx(float(torch.exp(torch.tensor(2.0))))
    perplexity(labels, torch.tensor(10.0), weights=torch.ones(2, 5).tril())
    tokens = 10 + float(torch.ones(2, 5).tril().sum())
    assert perplexity.compute() == pytest.approx(float(torch.exp(torch.tensor(30.0 / tokens))))


def test_names_and_the_registry() -> None:
    first, second, third = Noted(), Noted(), Noted("Noted_1")
    assert [m.name for m in (first, second, third)] == ["Noted", "Noted_1", "Noted_1_1"]
    assert get_all_metrics() == {m.name: m for m in (first, second, third)}
    assert compute_all_metrics() == {}
    second(torch.ones(2))
    assert compute_all_metrics() == {"Noted_1": 1.0}
    reset_all_metrics()
    assert compute_all_metrics() == {}


def test_arguments_reach_the_host_as_they_were_given() -> None:
    metric = Noted()
    metric(torch.tensor([1.0], requires_grad=True), 2.5, flag=True)
    ((args, kwargs),) = metric.calls
    assert not args[0].requires_grad
    assert float(args[1]) == 2.5
    assert bool(kwargs["flag"])
    with pytest.raises(ConfigError, match="keywords other"):
        metric(torch.ones(1), other=1)


def test_collected_calls_do_not_run_the_host_part() -> None:
    metric = Noted()
    with capture_metrics() as calls:
        metric(torch.ones(2), flag=torch.zeros(1))
    assert metric.calls == []
    ((called, tensors),) = calls
    assert called is metric
    called.update_from_device(tensors)
    assert metric.calls[0][1].keys() == {"flag"}
    assert metric.num_updates == 1


class Split(Noted):
    """A device part with a result by position and one by name."""

    def update_on_device(self, hidden: torch.Tensor, scale: torch.Tensor) -> DeviceOutputs:
        return DeviceOutputs(args=[hidden.mean()], kwargs={"scale": scale})


def test_metrics_in_a_captured_graph_give_the_same() -> None:
    """Device parts become graph outputs: computed values, batch entries, weights and buffers."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6)
    model.register_buffer("level", torch.full((2,), 3.0))
    accuracy, split, noted = AccuracyMetric(), Split(), Noted()

    def call(batch: Any) -> torch.Tensor:
        x, labels = batch
        hidden = model(x)
        accuracy(labels, hidden.argmax(-1))
        split(hidden, model.weight)
        noted(labels)
        noted(model.level)
        return hidden.square().mean()

    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))
    with capture_metrics() as direct:
        call(batch)
    program = capture_step({"model": model}, call, batch, training=False, name="m").program
    compiled = compile_layers(program, cut_layers(program))
    values = compiled.feed(flatten_batch(batch), torch.device("cpu"))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    buffers = {b.node: model.level if b.name else b.value for b in program.buffers}
    for layer in compiled.layers:
        held = [weights[name] for name in layer.layer.parameters]
        layer.forward(DrawKey(0, 0, 0, 0), held, buffers, values)
    found = compiled.metric_values(values)
    assert [len(calls) for calls in found.values()] == [1, 1, 2]
    given = [tensors for calls in found.values() for tensors in calls]
    for (_, expected), tensors in zip(direct, given, strict=True):
        torch.testing.assert_close(tensors, tuple(t.detach() for t in expected))
