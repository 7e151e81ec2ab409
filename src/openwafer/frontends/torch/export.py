"""torch.export, and its graph put in order.

Decides how a module is traced (non-strict, functional ATen), what of the user's code is refused
because a trace would silently compute something else, and that every operation keeps its place in
the user's code. Does not decide what becomes of the graph (capture.py).
"""

from __future__ import annotations

import gc
import io
import logging
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
)
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from openwafer.errors import CaptureError, OpenWaferError
from openwafer.frontends.torch.blame import (
    UserLines,
    calling_user_line,
    explain_export_failure,
    is_user_file,
    user_line_of_node,
    value_dependent,
)
from openwafer.frontends.torch.functional import FunctionalStep, functional_step
from openwafer.frontends.torch.module_state import nothing_left_behind, refuse_unusual
from openwafer.frontends.torch.stand_ins import on_a_fake_cpu
from openwafer.frontends.torch.traced_python import tracing_rules
from openwafer.frontends.torch.written_attention import fuse_attention

__all__ = ["Step", "export_step"]

_log = logging.getLogger("openwafer")


class Step(nn.Module):
    """What is exported: `run(batch)`.

    `around` is what the user's code alone runs under. All of torch.export would be slower: it calls
    torch functions by the ten thousand itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.around: Sequence[AbstractContextManager[Any]] = ()

    def run(self, batch: Any) -> list[torch.Tensor]:
        raise NotImplementedError

    def forward(self, batch: Any) -> list[torch.Tensor]:
        with ExitStack() as stack:
            for context in self.around:
                stack.enter_context(context)
            return self.run(batch)


def export_step(
    step: Step, batch: Any, *, training: bool, autocast_dtype: torch.dtype | None = None
) -> FunctionalStep:
    """Export `step(batch)` as functional ATen operations, with explicit casts under autocast.

    Raises:
        CaptureError: the user's code cannot be traced, or not faithfully.
    """
    on_meta = any(weight.is_meta for weight in step.parameters())
    if on_meta and autocast_dtype is not None:
        with on_a_fake_cpu(step, batch) as stand_ins:
            return export_step(step, stand_ins, training=training, autocast_dtype=autocast_dtype)
    if on_meta:
        batch = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch)
    refusing = _refuse_custom_backward() if training else nullcontext()
    refuse_unusual(step, batch, training=training)
    lines = UserLines(training=training)
    step.around = (torch.device("meta") if on_meta else nullcontext(), lines)
    try:
        with (
            _quiet(),
            _only_new_garbage(),
            preserve_node_meta(),
            _autocast(step, autocast_dtype),
            refusing,
        ):
            with nothing_left_behind(step), tracing_rules(is_user_file):
                exported = torch.export.export(step, (batch,), strict=False)
            dropped = _unused_draws(exported.graph)
            _inline_grad_modes(exported.graph_module)
            _keep_places_in_autocast_regions(exported.graph_module)
            if autocast_dtype is not None:
                _loss_in_float32(exported.graph)
            functional = functional_step(exported)
    except OpenWaferError:
        raise
    except Exception as error:
        raise explain_export_failure(error) from error
    for place in dropped:
        _log.warning(
            "%s: a random result is not used; the compiled modes leave it out, so that later "
            "random numbers differ from the plain loop's",
            place,
        )
    for place in lines.unchecked:
        _log.warning("%s: a check of values; the compiled modes do not make it", place)
    _drop_assertions(functional.graph)
    fuse_attention(functional.graph)
    _refuse_value_dependent_shapes(functional.graph)
    return functional


@contextmanager
def _only_new_garbage() -> Generator[None]:
    """Garbage is looked for among what the trace makes alone: among all of torch's objects it takes
    a tenth of the time, and none at all leaves a third more memory behind, full of holes."""
    if gc.get_freeze_count():  # the user's own doing, which could not be taken up again
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Generator[None]:
    """Keep torch.export's notices and graph dumps, which no user can act on, off the terminal."""
    previous = logging.root.manager.disable
    printed = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(printed):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)
    # On success, what the user's own code printed; on failure, torch's dump of the graph so far.
    sys.stderr.write(printed.getvalue())


def _autocast(step: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype is None:
        return nullcontext()
    types = {weight.device.type for weight in step.parameters()}
    return torch.autocast(next(iter(types), "cpu"), dtype)


def _loss_in_float32(graph: fx.Graph) -> None:
    """Make explicit the one cast of autocast that is inside an operation which is kept whole: the
    negative log likelihood is computed in fp32."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.nll_loss_nd.default:
            with graph.inserting_before(node):
                wide = (node.args[0], torch.float32)
                cast = graph.call_function(torch.ops.aten.to.dtype, wide)
            cast.meta.update(node.meta)
            node.args = (cast, *node.args[1:])


@contextmanager
def _refuse_custom_backward() -> Generator[None]:
    """A trace sees the forward of a torch.autograd.Function and would make up its own backward."""
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            # It runs its function without autograd, to do so again in the backward pass.
            function, _preserves_random_state, *rest = args
            return function(*rest)
        if cls.__module__.partition(".")[0] == "torch":
            return original.__func__(cls, *args, **kwargs)
        file, line = calling_user_line() or ("", 0)
        raise CaptureError(
            f"{cls.__name__} is a custom torch.autograd.Function, whose backward a static graph "
            "does not see",
            where=f"{file}:{line}" if file else "",
            allowed="torch operations, whose backward is known",
            hint="write the forward with torch operations, or wrap it as a torch.library custom op",
        )

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


def _unused_draws(graph: fx.Graph) -> list[str]:
    """Places of random operations whose results nothing reads."""
    used: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or (schema is not None and schema.is_mutable) or node in used:
            used.update(node.all_input_nodes)
            used.add(node)
    tag = torch.Tag.nondeterministic_seeded
    return [
        "{}:{}".format(*user_line_of_node(node))
        for node in graph.nodes
        if node not in used
        and tag in getattr(node.target, "tags", ())
        and False not in node.args  # dropout that is off
    ]


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """Replace `with torch.no_grad():` regions by their operations and a detach of each result.

    torch.export keeps such a region as a call of a submodule; kernels and layers want plain
    operations, and a detach stops the gradient just as well.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            continue
        enabled, target, *arguments = node.args
        with graph.inserting_before(node):
            outputs = _inlined(graph, getattr(module, target.target), arguments)
            if not enabled:
                outputs = [_detached(graph, value) for value in outputs]
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not target.users:
            graph.erase_node(target)


def _inlined(graph: fx.Graph, region: fx.GraphModule, arguments: list[Any]) -> list[fx.Node]:
    """Copy a region's operations into `graph` where it stands, and give its results."""
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    environment: dict[fx.Node, Any] = dict(zip(placeholders, arguments, strict=True))
    for node in region.graph.nodes:
        if node.op not in ("placeholder", "output"):
            environment[node] = graph.node_copy(node, environment.__getitem__)
    returned: Any = region.graph.output_node().args[0]
    return [environment[node] for node in returned]


def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
    result = graph.call_function(torch.ops.aten.detach.default, (value,))
    result.meta.update(value.meta)
    return result


class _Interpreted(nn.Module):
    """A graph module that runs node by node, so that a trace of it keeps each node's place."""

    def __init__(self, region: fx.GraphModule) -> None:
        super().__init__()
        self.region = region

    def forward(self, *arguments: Any) -> Any:
        return fx.Interpreter(self.region).run(*arguments)


def _keep_places_in_autocast_regions(module: fx.GraphModule) -> None:
    """torch.export keeps a `with torch.autocast(...)` region as a call of a submodule; tracing it
    again makes its casts explicit, and loses where its operations come from."""
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") == "wrap_with_autocast":
            name = node.args[4].target
            region = getattr(module, name)
            if isinstance(region, fx.GraphModule):
                _inline_grad_modes(region)
                _keep_places_in_autocast_regions(region)
                setattr(module, name, _Interpreted(region))


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove checks of static facts, which hold for every batch of the captured shape."""
    for node in reversed(list(graph.nodes)):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _refuse_value_dependent_shapes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            if any(
                isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes
            ):
                file, line = user_line_of_node(node)
                raise value_dependent(f"{file}:{line}" if file else "")
