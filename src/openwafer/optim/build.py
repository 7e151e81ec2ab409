"""The torch optimizer for an OptimizerConfig.

Decides which class and which implementation updates which parameter, with which settings and first
state. Does not decide the rate at a step (schedule.py) nor when to step (runtime/). Saving and
loading the state is in state.py.

An optimizer may be built for any subset of a model's parameters, as weight streaming does per
layer: no parameter's update depends on another parameter, so the results are the same bits.

torch's fused implementations are used where it has them. They walk parameter, gradient and state as
flat memory, and on the CPU do so even where the strides differ, which silently gives wrong numbers
(torch 2.13). So a gradient is brought into its parameter's layout before the step, and a parameter
that is not dense is updated unfused. Elsewhere torch's default holds: foreach on a GPU, and one
parameter after the other on a CPU, where foreach would only add temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from openwafer.config.hyperparameters import (
    AdadeltaOptions,
    AdafactorOptions,
    AdagradOptions,
    AdamaxOptions,
    AdamOptions,
    AdamWOptions,
    ASGDOptions,
    LambOptions,
    NAdamOptions,
    OptimizerType,
    RAdamOptions,
    RMSpropOptions,
    RpropOptions,
    SGDOptions,
)
from openwafer.config.optimizer import CommonOptions, OptimizerConfig
from openwafer.errors import ConfigError
from openwafer.optim.adafactor import Adafactor
from openwafer.optim.lamb import Lamb
from openwafer.optim.rmsprop import TensorFlowRMSprop
from openwafer.optim.schedule import learning_rate_at

__all__ = ["build_optimizer", "has_weight_decay", "set_learning_rate", "split_by_decay"]

Groups = list[dict[str, Any]]

_FUSED_DEVICES: Mapping[OptimizerType, tuple[str, ...]] = {
    "adam": ("cpu", "cuda"),
    "adamw": ("cpu", "cuda"),
    "sgd": ("cpu", "cuda"),
    "adagrad": ("cpu",),
}


def build_optimizer(config: OptimizerConfig, named_parameters: Mapping[str, Tensor]) -> Optimizer:
    """The optimizer over `named_parameters`: all of a model, or any part of it.

    Its parameter groups carry `param_names`; the state of every parameter exists before the first
    step, and is what the first step would have made. The rate is that of step 0 until
    `set_learning_rate`.

    Raises:
        ConfigError: there is no parameter.
    """
    if not named_parameters:
        raise ConfigError("there is no parameter to train", where="optimizer")
    groups = _groups(config, named_parameters)
    rate = learning_rate_at(config.learning_rate, 0)
    optimizer = _MAKERS[config.optimizer_type](groups, config.hyperparameters, rate)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not optimizer.state[weight]:
                state = _initial_state(config.optimizer_type, weight, group)
                optimizer.state[weight].update(state)
    if any(group.get("fused") for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(_align_gradients)
    return optimizer


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use `rate` in the next steps, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def has_weight_decay(config: CommonOptions, name: str) -> bool:
    """Whether the parameter called `name` decays: no excluded text is in its name."""
    return not any(part in name for part in config.exclude_from_weight_decay)


def split_by_decay(config: CommonOptions, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """(names with weight decay, names without), each in the given order."""
    names = list(names)
    with_decay = [name for name in names if has_weight_decay(config, name)]
    return with_decay, [name for name in names if not has_weight_decay(config, name)]


def _groups(config: OptimizerConfig, named_parameters: Mapping[str, Tensor]) -> Groups:
    """Parameter groups: with and without decay, fused and not. Empty ones are left out."""
    groups: Groups = []
    with_decay, without_decay = split_by_decay(config, named_parameters)
    for names, weight_decay in ((with_decay, config.weight_decay_rate), (without_decay, 0.0)):
        for fused in (True, False):
            chosen = [
                (name, named_parameters[name])
                for name in names
                if _can_fuse(config.optimizer_type, named_parameters[name]) == fused
            ]
            if chosen:
                group: dict[str, Any] = {"params": chosen, "weight_decay": weight_decay}
                groups.append(group | ({"fused": True} if fused else {}))
    return groups


def _can_fuse(optimizer_type: OptimizerType, weight: Tensor) -> bool:
    dense = torch.empty_like(weight, device="meta").stride() == weight.stride()
    supported = weight.device.type in _FUSED_DEVICES.get(optimizer_type, ())
    return dense and supported and weight.is_floating_point()


def _align_gradients(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for weight in group["params"]:
            gradient = weight.grad
            if gradient is not None and gradient.stride() != weight.stride():
                weight.grad = torch.empty_like(weight).copy_(gradient)


def _adam(groups: Groups, options: AdamOptions, rate: float) -> Optimizer:
    betas = (options.beta1, options.beta2)
    return optim.Adam(groups, rate, betas, options.eps, amsgrad=options.amsgrad)


def _adamw(groups: Groups, options: AdamWOptions, rate: float) -> Optimizer:
    # Seen by _initial_state, and kept in checkpoints: which rule `step` was counted for.
    groups = [{**group, "correct_bias": options.correct_bias} for group in groups]
    betas = (options.beta1, options.beta2)
    return optim.AdamW(groups, rate, betas, options.eps, amsgrad=options.amsgrad)


def _adamax(groups: Groups, options: AdamaxOptions, rate: float) -> Optimizer:
    betas = (options.beta1, options.beta2)
    return optim.Adamax(groups, rate, betas, options.eps, maximize=options.maximize)


def _adadelta(groups: Groups, options: AdadeltaOptions, rate: float) -> Optimizer:
    return optim.Adadelta(groups, rate, options.rho, options.eps)


def _adafactor(groups: Groups, options: AdafactorOptions, rate: float) -> Optimizer:
    return Adafactor(
        groups,
        rate,
        eps=(options.eps1, options.eps2),
        clip_threshold=options.clip_threshold,
        decay_rate=options.decay_rate,
        scale_parameter=options.scale_parameter,
    )


def _adagrad(groups: Groups, options: AdagradOptions, rate: float) -> Optimizer:
    # torch.optim.Adagrad makes its state itself, in the constructor.
    return optim.Adagrad(
        groups,
        rate,
        lr_decay=options.lr_decay,
        initial_accumulator_value=options.initial_accumulator_value,
        eps=options.eps,
        maximize=options.maximize,
    )


def _asgd(groups: Groups, options: ASGDOptions, rate: float) -> Optimizer:
    return optim.ASGD(
        groups, rate, options.lambd, options.alpha, options.t0, maximize=options.maximize
    )


def _lamb(groups: Groups, options: LambOptions, rate: float) -> Optimizer:
    betas = (options.beta1, options.beta2)
    return Lamb(groups, rate, betas, options.eps, adam=options.adam)


def _nadam(groups: Groups, options: NAdamOptions, rate: float) -> Optimizer:
    betas = (options.beta1, options.beta2)
    return optim.NAdam(groups, rate, betas, options.eps, momentum_decay=options.momentum_decay)


def _radam(groups: Groups, options: RAdamOptions, rate: float) -> Optimizer:
    return optim.RAdam(groups, rate, (options.beta1, options.beta2), options.eps)


def _rmsprop(groups: Groups, options: RMSpropOptions, rate: float) -> Optimizer:
    make = TensorFlowRMSprop if options.as_tensorflow else optim.RMSprop
    return make(
        groups,
        rate,
        options.alpha,
        options.eps,
        momentum=options.momentum,
        centered=options.centered,
    )


def _rprop(groups: Groups, options: RpropOptions, rate: float) -> Optimizer:
    etas = (options.eta1, options.eta2)
    return optim.Rprop(groups, rate, etas, (options.step_size_min, options.step_size_max))


def _sgd(groups: Groups, options: SGDOptions, rate: float) -> Optimizer:
    return optim.SGD(groups, rate, options.momentum, nesterov=options.use_nesterov)


_MAKERS: Mapping[OptimizerType, Callable[[Groups, Any, float], Optimizer]] = {
    "adadelta": _adadelta,
    "adafactor": _adafactor,
    "adagrad": _adagrad,
    "adam": _adam,
    "adamax": _adamax,
    "adamw": _adamw,
    "asgd": _asgd,
    "lamb": _lamb,
    "nadam": _nadam,
    "radam": _radam,
    "rmsprop": _rmsprop,
    "rprop": _rprop,
    "sgd": _sgd,
}


_ZEROS: Mapping[OptimizerType, tuple[str, ...]] = {
    "adadelta": ("square_avg", "acc_delta"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "asgd": ("ax",),
    "nadam": ("exp_avg", "exp_avg_sq"),
    "radam": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "rprop": ("prev",),
}
"""The state of each of torch's lazy optimizers that starts at 0 in the parameter's shape."""


def _initial_state(
    optimizer_type: OptimizerType, weight: Tensor, group: dict[str, Any]
) -> dict[str, Tensor]:
    """What torch would make in the first step, plus a momentum buffer of 0 for SGD.

    AdamW without bias correction counts its steps from infinity: both corrections 1 - β^step are
    then exactly 1, in every one of torch's implementations, and stay so.
    """
    state: dict[str, Tensor] = {}
    if optimizer_type != "sgd":
        first = math.inf if group.get("correct_bias") is False else 0.0
        on_device = bool(group.get("fused")) or optimizer_type == "asgd"
        state["step"] = _scalar(first, weight, on_device=on_device, fused=bool(group.get("fused")))
    names = list(_ZEROS.get(optimizer_type, ()))
    if group.get("amsgrad"):
        names.append("max_exp_avg_sq")
    if group.get("momentum"):
        names.append("momentum_buffer")
    if group.get("centered"):
        names.append("grad_avg")
    for name in names:
        state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    rate = cast("float", group["lr"])
    if optimizer_type == "nadam":
        state["mu_product"] = _scalar(1.0, weight)
    elif optimizer_type == "rprop":
        state["step_size"] = torch.full_like(weight, rate)
    elif optimizer_type == "asgd":
        state["eta"] = _scalar(rate, weight, on_device=True)
        state["mu"] = _scalar(1.0, weight, on_device=True)
    return state


def _scalar(
    value: float, weight: Tensor, *, on_device: bool = False, fused: bool = False
) -> Tensor:
    """A 0-d tensor as torch's optimizers make it: on the CPU, which reads it, unless fused."""
    wide = torch.get_default_dtype() == torch.float64 and not fused
    return torch.tensor(
        value,
        dtype=torch.float64 if wide else torch.float32,
        device=weight.device if on_device else "cpu",
    )
