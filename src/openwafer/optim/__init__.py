"""Optimizers, learning rates, clipping and loss scaling, from an OptimizerConfig."""

from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.loss_scale import LossScaler, build_loss_scaler
from openwafer.optim.schedule import learning_rate_at
from openwafer.optim.state import (
    from_torch_state_dict,
    load_optimizer_state,
    optimizer_state,
    to_torch_state_dict,
)

__all__ = [
    "LossScaler",
    "build_loss_scaler",
    "build_optimizer",
    "from_torch_state_dict",
    "learning_rate_at",
    "load_optimizer_state",
    "optimizer_state",
    "set_learning_rate",
    "to_torch_state_dict",
]
