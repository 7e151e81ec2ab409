"""The small parts: draws, the account of memory, sums of gradients, the update rule."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from runtime_reference import optimizer_config

from openwafer.errors import PlanError
from openwafer.runtime.gradients import add_gradients, sum_over_layers
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.randomness import DrawKey, KeyedDraws, draw_bernoulli, keyed_dropout
from openwafer.runtime.update import UpdateRule

KEY = DrawKey(1, 2, 3, 4)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "other", [DrawKey(0, 2, 3, 4), DrawKey(1, 0, 3, 4), DrawKey(1, 2, 0, 4), DrawKey(1, 2, 3, 0)]
)
def test_a_draw_depends_on_every_part_of_its_key(other: DrawKey) -> None:
    like = torch.empty(1000)
    assert torch.equal(draw_bernoulli(KEY, 0, like, 0.5), draw_bernoulli(KEY, 0, like, 0.5))
    assert not torch.equal(draw_bernoulli(KEY, 0, like, 0.5), draw_bernoulli(other, 0, like, 0.5))
    assert torch.equal(
        draw_bernoulli(KEY, 3, like, 0.5), draw_bernoulli(DrawKey(1, 2, 3, 7), 0, like, 0.5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_does_not_change_the_pattern(dtype: torch.dtype) -> None:
    wide = draw_bernoulli(KEY, 0, torch.empty(500), 0.3)
    assert torch.equal(draw_bernoulli(KEY, 0, torch.empty(500, dtype=dtype), 0.3).float(), wide)


def test_draws_have_their_probability() -> None:
    share = float(draw_bernoulli(KEY, 0, torch.empty(100_000), 0.3).mean())
    assert share == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_keyed_dropout_is_dropout(probability: float) -> None:
    value = torch.randn(1000)
    result, mask = keyed_dropout(KEY, 0, value, probability)
    kept = value / (1 - probability) if probability < 1 else torch.zeros_like(value)
    torch.testing.assert_close(result, torch.where(mask, kept, 0.0))
    assert float(mask.float().mean()) == pytest.approx(1 - probability, abs=0.05)


def test_torch_generator_and_seeds_are_left_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with KeyedDraws(KEY):
        F.dropout(torch.ones(10), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_counted_in_order() -> None:
    with KeyedDraws(KEY) as draws:
        first, second = F.dropout(torch.ones(100), 0.5), F.dropout(torch.ones(100), 0.5)
        F.dropout(torch.ones(100), 0.5, training=False)
    assert draws.num_draws == 2
    assert torch.equal(first, keyed_dropout(KEY, 0, torch.ones(100), 0.5)[0])
    assert torch.equal(second, keyed_dropout(KEY, 1, torch.ones(100), 0.5)[0])


# ---------------------------------------------------------------- the account of memory


def test_a_budget_is_kept_and_an_overdraft_changes_nothing() -> None:
    memory = DeviceMemory(budget_bytes=100)
    memory.take("weights", 60)
    memory.take("activations", 40)
    with pytest.raises(PlanError, match="1 bytes for weights") as caught:
        memory.take("weights", 1)
    assert "weights 60, activations 40" in caught.value.what
    assert memory.in_use_bytes == memory.peak_bytes == 100
    memory.give("weights", 60)
    memory.give_all("activations")
    assert memory.in_use_bytes == 0
    assert memory.peak_bytes == 100


def test_giving_back_too_much_is_our_own_bug() -> None:
    memory = DeviceMemory()
    memory.take("weights", 1)
    with pytest.raises(AssertionError):
        memory.give("weights", 2)


def test_the_account_is_safe_between_threads() -> None:
    memory = DeviceMemory()

    def work() -> None:
        for _ in range(2000):
            memory.take("weights", 3)
            memory.give("weights", 3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.in_use_bytes == 0
    assert memory.peak_bytes <= 12


# ---------------------------------------------------------------- gradients


def test_sums_pass_over_missing_gradients_and_keep_the_order() -> None:
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for scale in (1.0, 2.0):
        add_gradients(parts[0], ["a", "b"], [torch.full((2,), scale), None])
        add_gradients(parts[1], ["a"], [torch.full((2,), 10 * scale)])
    total = sum_over_layers(parts)
    assert total.keys() == {"a"}
    assert total["a"].tolist() == [33.0, 33.0]


# ---------------------------------------------------------------- the update rule


def test_the_rule_without_anything_to_do() -> None:
    rule = UpdateRule(optimizer_config())
    assert not rule.needs_all_gradients
    assert rule.norms({"w": torch.ones(2)}) == {}
    assert rule.decide({}, ["w"]).apply
    assert rule.state() == {}


def test_clipping_equals_torch() -> None:
    rule = UpdateRule(optimizer_config(max_gradient_norm=0.5))
    weights = {name: torch.nn.Parameter(torch.zeros(5)) for name in "ab"}
    gradients = {name: torch.randn(5) for name in "ab"}
    for name, weight in weights.items():
        weight.grad = gradients[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
    decision = rule.decide(rule.norms(gradients), ["a", "b"])
    rule.clip_(list(gradients.values()), decision)
    assert decision.grad_norm == pytest.approx(float(norm))
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad)


def test_no_gradient_at_all_is_a_norm_of_zero() -> None:
    assert UpdateRule(optimizer_config(max_gradient_norm=0.5)).decide({}, ["w"]).grad_norm == 0.0


def test_an_overflow_is_skipped_and_halves_the_scale() -> None:
    rule = UpdateRule(optimizer_config(loss_scaling_factor="dynamic", initial_loss_scale=8.0))
    gradients = {"w": torch.tensor([8.0, float("inf")])}
    rule.unscale_(list(gradients.values()))
    assert gradients["w"][0] == 1.0
    decision = rule.decide(rule.norms(gradients), ["w"])
    assert not decision.apply
    assert rule.loss_scale == 4.0
    copy = UpdateRule(optimizer_config(loss_scaling_factor="dynamic"))
    copy.load_state(rule.state())
    assert copy.loss_scale == 4.0


def test_a_constant_scale_is_no_reason_to_wait() -> None:
    rule = UpdateRule(optimizer_config(loss_scaling_factor=16.0))
    assert rule.loss_scale == 16.0
    assert not rule.needs_all_gradients
