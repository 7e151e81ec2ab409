"""From a model's graph in TensorFlow to a Program.

Decides in which order import, rewriting, lowering and torch's tracing follow each other, and that
every operation of the Program has the name scope and line of the TensorFlow operation it comes
from. Does not decide what any of them does, nor what an update of the weights is (update_rule.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openwafer.frontends.tf.importing import import_graph
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.lowering import SITE_KEY, GraphModule, refuse_unknown
from openwafer.frontends.tf.model_graph import ModelGraph
from openwafer.frontends.tf.nodes import TensorGraph
from openwafer.frontends.tf.rewriting import fuse
from openwafer.frontends.torch.capture import Captured, capture_step
from openwafer.frontends.torch.metrics import CBMetric
from openwafer.graph.program import Site

__all__ = ["ImportedModel", "import_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedModel:
    """The forward graph of one form of a model, ready to be captured for any values."""

    name: str
    graph: TensorGraph
    training: bool

    def module(self, values: Mapping[str, torch.Tensor]) -> GraphModule:
        """With these values of its variables; without, on the meta device."""
        return GraphModule(self.graph, values)

    def capture(
        self, module: GraphModule, batch: Any, *, metric: CBMetric | None = None
    ) -> Captured:
        """The Program; what the host wants of each step goes to `metric`.

        Raises:
            CaptureError, UnsupportedOpError: it cannot be a static graph of torch operations.
        """

        def call(data: Any) -> torch.Tensor:
            loss, *wanted = module.run(data)
            if wanted and metric is not None:
                metric(*wanted)
            return loss

        captured = capture_step(
            {"model": module}, call, batch, training=self.training, name=self.name, defined_at=" "
        )
        for node in captured.program.graph.nodes:
            site = (node.meta.get("custom") or {}).get(SITE_KEY)
            node.meta["site"] = site if site is not None else Site()
        return captured


def import_model(
    model: ModelGraph,
    batch: Any,
    *,
    name: str,
    trained: frozenset[str] = frozenset(),
    updates: Sequence[tuple[Any, str, Any]] = (),
    host_tensors: Sequence[Any] = (),
    loss: Any = None,
) -> ImportedModel:
    """Import a model's forward graph, and refuse what cannot be taken.

    Args:
        batch: an example: torch tensors in the structure of the input function's batches.
        trained, updates: see `import_graph`.
        host_tensors: what the host wants of each step, besides the loss.
        loss: None takes the one that model_fn returned.

    Raises:
        UnsupportedOpError: it lists every operation that cannot be taken.
    """
    results = [model.spec.loss if loss is None else loss, *host_tensors]
    graph = fuse(import_graph(model, results, trained=trained, updates=updates))
    refuse_unknown(graph, batch)
    return ImportedModel(
        name=name,
        graph=graph,
        training=model.mode == tf.estimator.ModeKeys.TRAIN,
    )
