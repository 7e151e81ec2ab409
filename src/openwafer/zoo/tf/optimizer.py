"""The `optimizer` section of the zoo's parameter files for TensorFlow's `Trainer`.

Decides how the keys of a PyTorch run are said there, so that one file trains both twins alike. Does
not decide what an optimizer computes (frontends/tf/trainer.py).

Adam and AdamW are both `AdamWOptimizer`, which has PyTorch's place for epsilon;
`tf.compat.v1.train.AdamOptimizer` has it elsewhere, and its losses would differ. What decays is
decided by the PyTorch names, as the file's `exclude_from_weight_decay` means them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from openwafer.config.hyperparameters import (
    AdamOptions,
    AdamWOptions,
    RMSpropOptions,
    SGDOptions,
)
from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import ConfigError
from openwafer.optim.build import has_weight_decay
from openwafer.zoo.tf.names import Counterpart

__all__ = ["trainer_section"]

_SAME = (
    "max_gradient_norm",
    "max_gradient_value",
    "grad_accum_steps",
    "disable_lr_steps_reset",
    "log_summaries",
)
_DYNAMIC = (
    "initial_loss_scale",
    "steps_per_increase",
    "min_loss_scale",
    "max_loss_scale",
    "overflow_tolerance",
)


def trainer_section(
    optimizer: OptimizerConfig, raw: Mapping[str, Any], variables: Iterable[Counterpart]
) -> dict[str, Any]:
    """The section for `Trainer`.

    Args:
        optimizer: the checked section.
        raw: the section as written, for its `learning_rate`.
        variables: of the model.

    Raises:
        ConfigError: an optimizer or a setting that TensorFlow's have not.
    """
    section = {key: getattr(optimizer, key) for key in _SAME}
    section["learning_rate"] = raw["learning_rate"]
    scale = optimizer.loss_scaling_factor
    section["loss_scaling_factor"] = 1.0 if scale is None else scale
    if scale == "dynamic":
        section |= {key: getattr(optimizer, key) for key in _DYNAMIC}
    return section | _of_type(optimizer, variables)


def _of_type(optimizer: OptimizerConfig, variables: Iterable[Counterpart]) -> dict[str, Any]:
    options = optimizer.hyperparameters
    if isinstance(options, AdamWOptions):
        return _adamw(options, options.correct_bias) | _decay(optimizer, variables)
    _require_no_decay(optimizer)
    if isinstance(options, AdamOptions):
        return _adamw(options, corrects=True)
    if isinstance(options, RMSpropOptions):
        if options.centered:
            raise _refusal("centered", "False")
        if not options.as_tensorflow:
            raise _refusal("as_tensorflow: False", "as_tensorflow: True, for both frontends")
        return {
            "optimizer_type": "rmsprop",
            "rmsprop_decay": options.alpha,
            "rmsprop_momentum": options.momentum,
            "epsilon": options.eps,
        }
    if isinstance(options, SGDOptions):
        if options.use_nesterov:
            raise _refusal("use_nesterov", "False")
        if not options.momentum:
            return {"optimizer_type": "sgd"}
        return {"optimizer_type": "momentum", "momentum": options.momentum}
    raise ConfigError(
        f"TensorFlow models are not trained by {optimizer.optimizer_type}",
        where="optimizer.optimizer_type",
        allowed="SGD, Adam, AdamW, RMSprop",
        hint="--set optimizer.optimizer_type=AdamW, or --frontend torch",
    )


def _adamw(options: AdamOptions, corrects: bool) -> dict[str, Any]:
    if options.amsgrad:
        raise _refusal("amsgrad", "False")
    return {
        "optimizer_type": "adamw",
        "beta1": options.beta1,
        "beta2": options.beta2,
        "epsilon": options.eps,
        "use_bias_correction": corrects,
    }


def _decay(optimizer: OptimizerConfig, variables: Iterable[Counterpart]) -> dict[str, Any]:
    spared = [each.name for each in variables if not has_weight_decay(optimizer, each.keys[0])]
    return {
        "weight_decay_rate": optimizer.weight_decay_rate,
        "exclude_from_weight_decay": [f"^{re.escape(name)}$" for name in spared],
    }


def _require_no_decay(optimizer: OptimizerConfig) -> None:
    if optimizer.weight_decay_rate:
        raise _refusal("weight_decay_rate", "0, or AdamW")


def _refusal(key: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"`optimizer.{key}` is not there for TensorFlow models",
        where=f"optimizer.{key}",
        allowed=allowed,
        hint="--frontend torch has it",
    )
