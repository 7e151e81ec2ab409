"""One process's part of one step: its stages' work on the microbatches, in a table's order.

Decides how an action becomes calls of layer functions: what a stage's forward pass is given and
leaves, how gradients that come back from several stages are summed, what waits between the two
parts of a split backward pass. Does not decide the order (pipeline_schedule.py), nor what happens
to summed gradients (pipeline_process.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from openwafer.runtime.compiled import CompiledLayer, Gradients, Values
from openwafer.runtime.gradients import add_gradients
from openwafer.runtime.randomness import DrawKey
from openwafer.runtime.stages.cuts import Stage, StagedModel
from openwafer.runtime.stages.messages import Mailbox, Post
from openwafer.runtime.stages.schedule import Action
from openwafer.runtime.stages.split_backward import SplitBackward, split_backward

__all__ = ["StageRun"]

Place = tuple[int, int]
"""Stage and microbatch."""

SplitParts = dict[int, SplitBackward]
"""By identity of a layer's functions: kept between steps."""


class StageRun:
    """One pass of one process over its microbatches; made anew for each step.

    Args:
        inputs: per microbatch, the batch entries by node that this process reads.
        weights_of: the weights of a layer, ready for its functions.
        buffers: by node; changed in the order of the microbatches.
        key_of: the draw key of a microbatch of this pass.
        seed: the gradient of each microbatch's loss; None runs forward only.
    """

    def __init__(
        self,
        staged: StagedModel,
        mail: Mailbox,
        *,
        inputs: Sequence[Mapping[str, torch.Tensor]],
        weights_of: Callable[[CompiledLayer], list[torch.Tensor]],
        buffers: dict[str, torch.Tensor],
        key_of: Callable[[int], DrawKey],
        seed: float | None,
        split: SplitParts,
    ) -> None:
        self._staged, self._mail = staged, mail
        self._inputs, self._weights_of, self._buffers = inputs, weights_of, buffers
        self._key_of, self._seed, self._split = key_of, seed, split
        self._saved: dict[Place, list[Sequence[torch.Tensor]]] = {}
        self._waiting: dict[Place, list[tuple[int, CompiledLayer, Sequence[Any]]]] = {}
        self.parts: dict[int, dict[str, torch.Tensor]] = {}
        """Sums of gradients by layer and weight."""
        self.results: list[dict[str, torch.Tensor]] = [{} for _ in inputs]
        """Per microbatch, loss and metric values by node, where this process computes them."""

    def run(self, table: Sequence[Action]) -> None:
        """All actions, then wait until what was sent is taken."""
        for action in table:
            stage = self._staged.stages[action.stage]
            if action.kind == "F":
                self._forward(stage, action.microbatch)
            elif action.kind == "W":
                self._backward_weights(stage, action.microbatch)
            else:
                self._backward(stage, action.microbatch, split=action.kind == "I")
        self._mail.finish()

    def _forward(self, stage: Stage, microbatch: int) -> None:
        given = self._inputs[microbatch]
        values: Values = {name: given[name] for name in stage.batch_inputs}
        for crossing in stage.incoming:
            taken = self._mail.take(Post("F", crossing.source, stage.index, microbatch))
            values.update(zip(crossing.names, taken, strict=True))
        key = self._key_of(microbatch)
        saved = [
            layer.forward(key, self._weights_of(layer), self._buffers, values)
            for layer in stage.layers
        ]
        for crossing in stage.outgoing:
            post = Post("F", stage.index, crossing.target, microbatch)
            self._mail.send(post, [values[name] for name in crossing.names])
        self.results[microbatch].update({name: values[name] for name in stage.results})
        if self._seed is not None:
            self._saved[stage.index, microbatch] = saved

    def _backward(self, stage: Stage, microbatch: int, *, split: bool) -> None:
        gradients = self._gradients_of_outputs(stage, microbatch)
        saved = self._saved.pop((stage.index, microbatch))
        waiting: list[tuple[int, CompiledLayer, Sequence[Any]]] = []
        for number in range(len(stage.layers) - 1, -1, -1):
            layer, index = stage.layers[number], stage.first_layer + number
            if split:
                waiting.append((index, layer, self._inputs_part(layer, saved.pop(), gradients)))
            else:
                found = layer.backward(self._weights_of(layer), saved.pop(), gradients)
                self._add(index, layer, found)
        if split:
            self._waiting[stage.index, microbatch] = waiting
        for crossing in stage.incoming:
            if crossing.returned:
                post = Post("B", crossing.source, stage.index, microbatch)
                self._mail.send(post, [gradients.pop(name) for name in crossing.returned])
        assert not gradients, f"gradients that no stage takes: {', '.join(gradients)}"

    def _gradients_of_outputs(self, stage: Stage, microbatch: int) -> Gradients:
        """What the loss and later stages give, the last stage's first as in one process."""
        gradients: Gradients = {}
        loss = self._staged.model.program.loss
        if loss in stage.results and self._staged.model.trained:
            value = self.results[microbatch][loss]
            assert self._seed is not None
            gradients[loss] = torch.full_like(value, self._seed)
        for crossing in reversed(stage.outgoing):
            if not crossing.returned:
                continue
            taken = self._mail.take(Post("B", stage.index, crossing.target, microbatch))
            for name, gradient in zip(crossing.returned, taken, strict=True):
                held = gradients.get(name)
                gradients[name] = gradient if held is None else held + gradient
        return gradients

    def _inputs_part(
        self, layer: CompiledLayer, saved: Sequence[torch.Tensor], gradients: Gradients
    ) -> Sequence[Any]:
        """Gradients of a layer's inputs go on their way; what its weights' need is kept."""
        incoming = layer.take_gradients(gradients)
        parts = self._parts_of(layer)
        grad_inputs, kept = parts.inputs(self._weights_of(layer), saved, incoming)
        layer.give_gradients(gradients, grad_inputs)
        return kept

    def _backward_weights(self, stage: Stage, microbatch: int) -> None:
        for index, layer, kept in self._waiting.pop((stage.index, microbatch)):
            found = self._parts_of(layer).weights(self._weights_of(layer), kept)
            self._add(index, layer, found)

    def _parts_of(self, layer: CompiledLayer) -> SplitBackward:
        key = id(layer.functions)
        if key not in self._split:
            self._split[key] = split_backward(layer.functions)
        return self._split[key]

    def _add(self, index: int, layer: CompiledLayer, found: Sequence[torch.Tensor | None]) -> None:
        add_gradients(self.parts.setdefault(index, {}), layer.layer.parameters, found)
