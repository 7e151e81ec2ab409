"""What a train_op does to the variables of a model.

Decides how the parts are put together: the optimizer, its rate at each step, loss scale and
clipping, accumulation, and the variables that change besides the weights. Whatever else a train_op
would change is refused, so that nothing is left out in silence. Does not decide what a gradient
goes through (gradient_chain.py), what an optimizer is (known_optimizers.py) or what stands around
it (optimizer_wrappers.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.errors import CaptureError
from openwafer.frontends.tf.gradient_chain import GradientRule, gradient_rule, values_of
from openwafer.frontends.tf.importing import ancestors, handle_names
from openwafer.frontends.tf.known_optimizers import KnownOptimizer, known_optimizer
from openwafer.frontends.tf.learning_rate import function_of_step
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import ModelGraph
from openwafer.frontends.tf.optimizer_wrappers import LossScaling, around
from openwafer.frontends.tf.places import user_line
from openwafer.frontends.tf.recording import ApplyCall, GradientCall
from openwafer.frontends.tf.skipped_steps import StepsBehind

__all__ = ["TrainOp", "understand_train_op"]

_log = logging.getLogger("openwafer")

_WRITES = re.compile(r"^(Resource)?(Sparse)?(Apply|Scatter)|^Assign")
_HOW = {
    "Assign": "assign",
    "AssignAdd": "add",
    "AssignAddVariableOp": "add",
    "AssignSub": "sub",
    "AssignSubVariableOp": "sub",
    "AssignVariableOp": "assign",
}


_INSTEAD = {
    "AdamW": "openwafer.tf.AdamWOptimizer",
    "Adagrad": "tf.compat.v1.train.AdagradOptimizer",
    "RMSprop": "tf.compat.v1.train.RMSPropOptimizer",
    "SGD": "tf.compat.v1.train.MomentumOptimizer",
}
"""Where to go from an optimizer of Keras."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOp:
    """A train_op, understood.

    optimizer: its `learning_rate` is that of step 0; `learning_rate_at` is the user's expression,
    and `learning_rate_from` what the runtime's optimizer is given.
    trained: the variables with a gradient, by name. updates: (variable, how, tensor) of others.
    slots: weight → torch's name of a state → the variable that holds it, all by name.
    powers: names of the variables with the powers of `known.powers`.
    loss_scale: an entry of the runtime's loss scale → the variable that holds it, by name.
    """

    optimizer: OptimizerConfig
    learning_rate_at: Callable[[int], float]
    trained: tuple[Any, ...]
    updates: tuple[tuple[Any, str, Any], ...]
    known: KnownOptimizer
    slots: Mapping[str, Mapping[str, str]]
    powers: tuple[str, ...]
    loss_scale: Mapping[str, str] = field(default_factory=dict[str, str])

    def learning_rate_from(self, behind: StepsBehind) -> Callable[[int], float]:
        """The rate to use at a global step where the optimizer has seen fewer steps."""
        factor = self.known.rate_factor
        return lambda step: self.learning_rate_at(step) * factor(step - behind.num_steps)

    @property
    def trained_names(self) -> frozenset[str]:
        return frozenset(variable.op.name for variable in self.trained)


def understand_train_op(model: ModelGraph) -> TrainOp:
    """Find out what a model's train_op does.

    Raises:
        CaptureError: it is missing, or something in it is not understood.
    """
    if model.spec.train_op is None:
        raise CaptureError("model_fn gave no train_op", allowed="a train_op where mode is TRAIN")
    cone = ancestors([model.spec.train_op], control=True)
    call = _only_update(model, {operation.name for operation in cone})
    pairs = [(g, v) for g, v in call.gradients_and_variables if g is not None]
    with _at_line_of(model, call):
        known = known_optimizer(call.optimizer, [variable.op.name for _, variable in pairs])
    gradients = [gradient for gradient, _ in pairs]
    source = _source(model, gradients)
    rule = gradient_rule(model.graph, gradients, source.gradients)
    with _at_line_of(model, call):
        wrappers = around(call, source, model.graph)
    scaling = _scaling(model, source, rule, wrappers.scaling)
    with _at_line_of(model, call):
        _check_sparse(known, pairs, rule)
    rate = function_of_step(model.graph, model.global_step, known.rate)
    optimizer = OptimizerConfig(
        optimizer_type=known.optimizer_type,
        hyperparameters=known.hyperparameters,
        learning_rate=Constant(learning_rate=rate(0)),
        weight_decay_rate=known.weight_decay_rate,
        exclude_from_weight_decay=known.exclude_from_weight_decay,
        grad_accum_steps=wrappers.num_batches,
        **scaling.options,
        max_gradient_norm=rule.max_norm,
        max_gradient_value=rule.max_value,
    )
    trained = tuple(variable for _, variable in pairs)
    return TrainOp(
        optimizer=optimizer,
        learning_rate_at=rate,
        trained=trained,
        updates=_other_updates(model, cone, call, {v.op.name for v in trained}),
        known=known,
        slots={
            variable.op.name: {
                key: str(call.optimizer.get_slot(variable, slot).op.name)
                for key, slot in known.slots.items()
            }
            for variable in trained
        },
        powers=_powers(model, call.optimizer) if known.powers else (),
        loss_scale=scaling.variables,
    )


def _only_update(model: ModelGraph, cone: set[str]) -> ApplyCall:
    """The one call of `apply_gradients` that the train_op runs."""
    calls = [call for call in model.recording.updates if call.operations & cone]
    if not calls and model.recording.foreign:
        raise _of_keras(model, model.recording.foreign[-1])
    if len(calls) != 1:
        what = "several optimizers" if calls else "no optimizer of tf.compat.v1.train"
        file, line = user_line(getattr(model.spec.train_op, "op", model.spec.train_op))
        raise CaptureError(
            f"the train_op has {what}",
            where=f"{file}:{line}" if file else "",
            allowed="one optimizer for all weights",
            hint="tf.compat.v1.train.AdamOptimizer(rate).minimize(loss, global_step=…)",
        )
    call = calls[0]
    if call.global_step is None:
        raise CaptureError(
            "the train_op does not count the global step",
            where=_line_of(model, call),
            allowed="global_step=tf.compat.v1.train.get_global_step() in minimize or "
            "apply_gradients",
        )
    return call


def _of_keras(model: ModelGraph, optimizer: Any) -> CaptureError:
    file, line = user_line(getattr(model.spec.train_op, "op", model.spec.train_op))
    name = type(optimizer).__name__
    return CaptureError(
        f"the train_op is of tf.keras.optimizers.{name}",
        where=f"{file}:{line}" if file else "",
        allowed="an optimizer of tf.compat.v1.train, or openwafer.tf.Trainer",
        hint=f"{_INSTEAD.get(name, 'tf.compat.v1.train.AdamOptimizer')}"
        "(rate).minimize(loss, global_step=tf.compat.v1.train.get_global_step())",
    )


@contextmanager
def _at_line_of(model: ModelGraph, call: ApplyCall) -> Generator[None]:
    """An error without a place is at the line that applied the gradients."""
    try:
        yield
    except CaptureError as error:
        error.where = error.where or _line_of(model, call)
        raise


def _line_of(model: ModelGraph, call: ApplyCall) -> str:
    operation = model.graph.get_operation_by_name(min(call.operations))
    file, line = user_line(operation)
    return f"{file}:{line}" if file else ""


def _source(model: ModelGraph, gradients: list[Any]) -> GradientCall:
    """The call of tf.gradients that these gradients come from."""
    cone = {operation.name for operation in ancestors(values_of(g) for g in gradients)}
    calls = [
        call
        for call in model.recording.gradients
        if any(g is not None and values_of(g).op.name in cone for g in call.gradients)
    ]
    if len(calls) != 1 or len(calls[0].losses) != 1:
        raise CaptureError(
            "the gradients are not those of one loss",
            allowed="one call of minimize, compute_gradients or tf.gradients, with one loss",
        )
    return calls[0]


def _scaling(
    model: ModelGraph, source: GradientCall, rule: GradientRule, declared: LossScaling
) -> LossScaling:
    """The loss scale: of an optimizer around the one that updates, or written out."""
    written = _written_scale(model, source, rule)
    if written == 1:
        return declared
    if declared.options:
        raise CaptureError("the loss is scaled twice", allowed="one loss scale")
    return LossScaling(options={"loss_scaling_factor": written})


def _written_scale(model: ModelGraph, source: GradientCall, rule: GradientRule) -> float:
    """The factor between the loss that model_fn returned and the one that is derived."""
    derived, returned = source.losses[0], model.spec.loss
    scale = 1.0
    while derived.name != returned.name:
        operation = derived.op
        if operation.type in ("Identity", "Cast"):
            derived = operation.inputs[0]
            continue
        value = tf.get_static_value(operation.inputs[1]) if len(operation.inputs) == 2 else None
        if operation.type != "Mul" or value is None:
            file, line = user_line(operation)
            raise CaptureError(
                "the loss that is minimized is not the one that model_fn returns",
                where=f"{file}:{line}" if file else "",
                allowed="the same tensor, or a constant times it",
                hint="return the total loss: EstimatorSpec(mode, loss=total_loss, …)",
            )
        scale, derived = scale * float(value), operation.inputs[0]
    if abs(scale * rule.scale - 1) > 1e-5:
        raise CaptureError(
            f"gradients are {scale * rule.scale:g} times those of the loss",
            allowed="a loss scale that is divided out of the gradients again",
            hint="a constant factor belongs into the learning rate",
        )
    return scale


def _powers(model: ModelGraph, optimizer: Any) -> tuple[str, ...]:
    with model.graph.as_default():
        return tuple(str(power.op.name) for power in optimizer._get_beta_accumulators())


def _check_sparse(known: KnownOptimizer, pairs: list[tuple[Any, Any]], rule: GradientRule) -> None:
    sparse = [variable.op.name for gradient, variable in pairs if hasattr(gradient, "values")]
    if sparse and not known.sparse:
        raise CaptureError(
            f"{sparse[0]} has a sparse gradient, with which this optimizer leaves the rows alone "
            "that a batch does not name",
            allowed="dense gradients with momentum",
            hint="tf.convert_to_tensor(gradient) before apply_gradients",
        )
    if sparse and rule.max_value:
        raise CaptureError(
            f"the gradient of {sparse[0]} is sparse: tf.clip_by_value bounds its parts, of which a "
            "row has one for each time that it is looked up, and not their sum",
            allowed="dense gradients where elements are bounded",
            hint="tf.convert_to_tensor(gradient) before tf.clip_by_value",
        )
    if sparse and rule.max_norm:
        _log.warning(
            "the gradient of %s is summed for each row before its norm is taken; TensorFlow clips "
            "by the norm of the parts",
            sparse[0],
        )


def _other_updates(
    model: ModelGraph, cone: set[Any], call: ApplyCall, trained: set[str]
) -> tuple[tuple[Any, str, Any], ...]:
    """What the train_op changes besides weights, optimizer and global step: batch statistics."""
    handles = handle_names(model.graph)
    found: list[tuple[Any, str, Any]] = []
    for operation in model.graph.get_operations():
        if operation not in cone or operation.name in call.operations:
            continue
        if not _WRITES.match(operation.type):
            continue
        variable = handles.get(operation.inputs[0].name)
        if variable is None:
            continue
        how = _HOW.get(operation.type)
        after = any(o.name in call.operations for o in ancestors([operation], control=True))
        if how is None or after or variable.op.name in trained or variable is model.global_step:
            raise _other_change(operation, variable)
        found.append((variable, how, operation.inputs[1]))
    return tuple(found)


def _other_change(operation: Any, variable: Any) -> CaptureError:
    file, line = user_line(operation)
    return CaptureError(
        f"the train_op changes {variable.op.name} besides the optimizer ({operation.type})",
        where=f"{file}:{line}" if file else "",
        allowed="updates of batch statistics, from values of the forward pass",
        hint="without cs_ip, TensorFlow itself runs any train_op",
    )
