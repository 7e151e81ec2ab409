"""How much device memory a weight-streaming step takes, and how to make it fit.

Decides the peak of a step from its layers' sizes, and the choice of prefetch depth, of how many
layers' gradients may wait for the store, and of what is kept of each layer, so that the peak stays
within the budget. Does not decide what one layer takes
(layer_memory.py) or what is counted while a step runs (memory.py); tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

from openwafer.errors import PlanError
from openwafer.runtime.memory.activations import Policy
from openwafer.runtime.memory.layer_memory import ModelMemory
from openwafer.runtime.memory.spill import SPILL_BUFFERS

__all__ = ["ActivationChoice", "StepMemory", "StepPlan", "plan_step", "step_memory"]

ActivationChoice = Literal["auto", "keep", "recompute", "spill"]

MARGIN = 0.06
"""Share of the budget left for what no graph shows: what operations take inside, and what the
allocator cannot give back at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """The peak of a step: where it is, and what is in use there, by purpose."""

    peak_bytes: int
    where: str
    parts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What was chosen: see `StreamingOptions`. spill_unit_bytes: see `DiskSpill`."""

    prefetch_depth: int
    returns_waiting: int
    policies: tuple[Policy, ...]
    memory: StepMemory
    spill_unit_bytes: int

    def __str__(self) -> str:
        counts = [(p, self.policies.count(p)) for p in dict.fromkeys(self.policies)]
        kept = ", ".join(f"{policy} {count}" for policy, count in counts)
        return (
            f"{self.prefetch_depth} layers ahead, gradients of {self.returns_waiting} may wait; "
            f"activations: {kept or 'none'}; "
            f"peak {_mebibytes(self.memory.peak_bytes)} in the {self.memory.where}"
        )


def step_memory(
    model: ModelMemory,
    policies: Sequence[Policy],
    *,
    prefetch_depth: int,
    num_microbatches: int,
    returns_waiting: int = 1,
) -> StepMemory:
    """The peak of one step over all microbatches; what is fixed (the store's buffers) is not in."""
    moments = [
        *_forward_moments(model, policies, prefetch_depth, num_microbatches),
        *_backward_moments(model, policies, prefetch_depth, returns_waiting, num_microbatches),
    ]
    spill = SPILL_BUFFERS * _spill_unit(model, policies)
    where, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    parts = {**parts, "spill buffers": spill} if spill else parts
    return StepMemory(peak_bytes=sum(parts.values()), where=where, parts=parts)


_Moment = tuple[str, dict[str, int]]


def _forward_moments(
    model: ModelMemory, policies: Sequence[Policy], depth: int, count: int
) -> Iterator[_Moment]:
    values = set(model.batch)
    kept: set[str] = set()
    own = 0
    for index, layer in enumerate(model.layers):
        shown, saved = _kept(model, index, policies[index])
        results = _bytes(model, layer.outputs) + saved
        alive = count * _bytes(model, values | kept) + count * own + (count - 1) * results
        yield (
            f"forward pass of {layer.name}",
            {
                "weights": _weights(model, range(index, index + depth + 1)),
                "activations": alive,
                "temporaries": max(layer.forward_peak, results),
            },
        )
        values = (values | set(layer.outputs)) - set(layer.spent)
        kept |= shown
        own += saved


def _backward_moments(
    model: ModelMemory, policies: Sequence[Policy], depth: int, waiting: int, count: int
) -> Iterator[_Moment]:
    last = len(model.layers) - 1
    spent = {name for layer in model.layers for name in layer.spent}
    ends = {n for layer in model.layers for n in layer.outputs} | set(model.batch)
    values = ends - spent
    kept = [_kept(model, index, policies[index]) for index in range(last + 1)]
    owner = {
        name: index for index in range(last, -1, -1) for name in model.layers[index].gradient_bytes
    }
    flowing = set(model.layers[-1].grad_outputs) if model.layers else set[str]()
    carried: dict[str, int] = {}
    returning: list[int] = []
    for index in range(last, -1, -1):
        layer = model.layers[index]
        shown = set[str]().union(*(names for names, _ in kept[: index + 1]))
        held = count * (_bytes(model, values | shown) + sum(own for _, own in kept[: index + 1]))
        flows = flowing - set(layer.grad_outputs) | set(layer.grad_inputs)
        again = policies[index] == "recompute"
        run_again = layer.saved_bytes + _bytes(model, layer.saved_values) if again else 0
        gradients = {**layer.gradient_bytes, **carried}
        yield (
            f"backward pass of {layer.name}",
            {
                "weights": _weights(model, range(index - depth, index + 1)),
                "activations": held + count * _bytes(model, flowing | flows),
                "gradients": sum(gradients.values()) + sum(returning[-waiting if index else -1 :]),
                "temporaries": max(
                    layer.forward_peak if again else 0, run_again + layer.backward_peak
                ),
            },
        )
        flowing = flows
        done = {name for name in gradients if owner[name] == index}
        carried = {name: size for name, size in gradients.items() if name not in done}
        returning.append(sum(gradients[name] for name in done))


def _kept(model: ModelMemory, index: int, policy: Policy) -> tuple[set[str], int]:
    """Per microbatch: values that a layer keeps until its backward pass, and bytes besides."""
    layer = model.layers[index]
    if policy == "keep":
        return set(layer.saved_values), layer.saved_bytes
    return (set(layer.inputs), 0) if policy == "recompute" else (set(), 0)


def _spill_unit(model: ModelMemory, policies: Sequence[Policy]) -> int:
    return max(
        (
            layer.saved_bytes + _bytes(model, layer.saved_values) + 64 * len(layer.saved_values)
            for layer, policy in zip(model.layers, policies, strict=True)
            if policy == "spill"
        ),
        default=0,
    )


def _weights(model: ModelMemory, indices: Iterable[int]) -> int:
    return sum(model.layers[i].weight_bytes for i in indices if 0 <= i < len(model.layers))


def _bytes(model: ModelMemory, names: Iterable[str]) -> int:
    return sum(model.value_bytes[name] for name in names)


# ------------------------------------------------------------------ the choice


def plan_step(
    model: ModelMemory,
    *,
    choice: ActivationChoice,
    prefetch_depth: int,
    num_microbatches: int,
    returns_waiting: int = 1,
    budget_bytes: int | None = None,
    fixed: Mapping[str, int] | None = None,
    kept_share: float = 0.0,
    spills_elsewhere: bool = False,
) -> StepPlan:
    """The fastest way that fits: everything kept, else the last layers kept (they are needed first)
    and the others spilled, or run again where there is nowhere else to spill to.

    Args:
        choice: `auto`, or one way for all layers.
        prefetch_depth: the most layers to fetch ahead; less where that makes a step fit.
        returns_waiting: the most layers whose gradients may wait for the store; fewer, down to one,
            where that makes a step fit.
        budget_bytes: of device memory; None for no limit.
        fixed: bytes in use besides the step, by purpose.
        kept_share: of the budget, for freed memory that is not given back at once.
        spills_elsewhere: spilled tensors leave the memory that the budget is of.

    Raises:
        PlanError: nothing fits; says what is short and what would make it fit.
    """
    fixed_bytes = sum((fixed or {}).values())
    usable = 1 - MARGIN - kept_share
    limit = None if budget_bytes is None else int(budget_bytes * usable) - fixed_bytes
    smallest: StepPlan | None = None
    for depth in range(prefetch_depth, -1, -1) if limit is not None else (prefetch_depth,):

        def planned(policies: tuple[Policy, ...], waiting: int, depth: int = depth) -> StepPlan:
            memory = step_memory(
                model,
                policies,
                prefetch_depth=depth,
                num_microbatches=num_microbatches,
                returns_waiting=waiting,
            )
            return StepPlan(
                prefetch_depth=depth,
                returns_waiting=waiting,
                policies=policies,
                memory=memory,
                spill_unit_bytes=_spill_unit(model, policies),
            )

        ways = _ways(choice, spills_elsewhere, limited=limit is not None)
        for other, waiting in product(ways, range(returns_waiting, 0, -1)):
            plan_for = partial(planned, waiting=waiting)
            found = _most_kept(len(model.layers), other, plan_for, limit, mixes=choice == "auto")
            if limit is None or found.memory.peak_bytes <= limit:
                return found
            if smallest is None or found.memory.peak_bytes < smallest.memory.peak_bytes:
                smallest = found
    assert smallest is not None
    assert budget_bytes is not None
    needed = int((smallest.memory.peak_bytes + fixed_bytes) / usable) + 1
    raise _does_not_fit(smallest, choice, needed, budget_bytes, fixed or {})


def _ways(choice: ActivationChoice, elsewhere: bool, *, limited: bool) -> tuple[Policy, ...]:
    if choice != "auto":
        return (choice,)
    if not limited:
        return ("keep",)
    return ("spill", "recompute") if elsewhere else ("recompute",)


def _most_kept(
    num_layers: int,
    other: Policy,
    planned: Callable[[tuple[Policy, ...]], StepPlan],
    limit: int | None,
    *,
    mixes: bool,
) -> StepPlan:
    """As many of the last layers kept as fit; none where not even that fits."""

    def keeping(count: int) -> StepPlan:
        return planned((other,) * (num_layers - count) + ("keep",) * count)

    if not mixes or limit is None:
        return keeping(0)
    low, high = 0, num_layers
    if keeping(high).memory.peak_bytes <= limit:
        return keeping(high)
    while high - low > 1:
        middle = (low + high) // 2
        if keeping(middle).memory.peak_bytes <= limit:
            low = middle
        else:
            high = middle
    return keeping(low)


def _does_not_fit(
    plan: StepPlan,
    choice: ActivationChoice,
    needed: int,
    budget_bytes: int,
    fixed: Mapping[str, int],
) -> PlanError:
    parts = {**plan.memory.parts, **fixed}
    largest = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {_mebibytes(size)}" for name, size in largest if size)
    ways = ["smaller batches with more gradient accumulation (optimizer.grad_accum_steps)"]
    if choice not in ("auto", "recompute"):
        ways.append("--activations auto")
    return PlanError(
        f"the plan does not fit: a step needs {_mebibytes(needed)} of device memory, "
        f"{_mebibytes(needed - budget_bytes)} more than there are; most in the "
        f"{plan.memory.where}: {listed}",
        where="--device_memory",
        allowed=f"{_mebibytes(needed)} or more",
        hint=", or ".join(ways),
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20):,} MiB"
