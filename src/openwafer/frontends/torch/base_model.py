"""`PyTorchBaseModel`: what a user's model class derives from.

Decides the documented surface: construction, modes, state, optimizer and schedule. Does not decide
how a step is run; the same object serves the plain loop and the compiled modes.

Source of names and behaviour: CS-2 software 1.6 documentation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from openwafer.config.optimizer import OptimizerConfig, build_optimizer_config
from openwafer.config.schema import Report
from openwafer.errors import ConfigError
from openwafer.optim.build import build_optimizer
from openwafer.optim.torch_scheduler import ScheduledLR

__all__ = ["PyTorchBaseModel"]


class PyTorchBaseModel(ABC):
    """A model with its loss, made from a parameter dictionary.

    Subclasses build `self.model` and call this constructor with it, and define `__call__`.

    Args:
        params: the parameter dictionary; `model.mixed_precision` and `runconfig.mode` are read.
        model: the module that holds the weights; `state_dict` names are its own.
        device: where to put it; None leaves it where it is.

    Raises:
        ConfigError: a section that is needed is missing.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        model: nn.Module,
        device: torch.device | str | None = None,
    ) -> None:
        if "model" not in params or "runconfig" not in params:
            missing = "model" if "model" not in params else "runconfig"
            raise ConfigError(
                f"the parameters given to {type(self).__name__} have no `{missing}` section",
                allowed="sections model, runconfig, and optimizer for training",
            )
        self.params = params
        self.model = model if device is None else model.to(device)
        self.device = device
        self.mode: str = params["runconfig"].get("mode", "train")
        self.mixed_precision = bool(params["model"].get("mixed_precision", False))
        self.allow_multireplica = (
            bool(params["model"].get("allow_multireplica", True)) and self.mode == "train"
        )
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: ScheduledLR | None = None
        self._post_device_transfer()

    def _post_device_transfer(self) -> None:
        """Called once the model is on its device; tie weights here."""
        return

    @abstractmethod
    def __call__(self, data: Any) -> torch.Tensor:
        """The loss of one batch: a scalar, the mean over its samples."""

    def train(self) -> None:
        """Put the model in training mode."""
        self.model.train()

    def eval(self) -> None:
        """Put the model in evaluation mode."""
        self.model.eval()

    def modules(self) -> dict[str, nn.Module]:
        """Every module held in an attribute, `model` first."""
        others = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, nn.Module) and name != "model" and value is not self.model
        }
        return {"model": self.model, **others}

    @property
    def supported_cs_modes(self) -> tuple[str, ...]:
        """Modes of the compiled run; release 1.6 had no `train_and_eval` there."""
        return ("train", "eval", "train_and_eval", "predict")

    @property
    def supported_non_cs_modes(self) -> tuple[str, ...]:
        return ("train", "eval", "train_and_eval", "predict")

    def supports_mode(self, mode: str) -> bool:
        return mode in self.supported_cs_modes

    @property
    def duplicate_params_map(self) -> dict[str, list[str]]:
        """For each weight known under several names: the first name, and the others."""
        names: dict[int, list[str]] = {}
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), []).append(name)
        return {same[0]: same[1:] for same in names.values() if len(same) > 1}

    def display_name(self) -> str:
        """The model's name in plans and reports."""
        return type(self).__name__

    def trainable_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, w) for name, w in self.model.named_parameters() if w.requires_grad)

    def optimizer_config(self) -> OptimizerConfig:
        """The `optimizer` section, checked.

        Raises:
            ConfigError: it is missing or wrong.
        """
        if not self.params.get("optimizer"):
            raise ConfigError("there is no `optimizer` section", hint="training needs one")
        report = Report()
        config = build_optimizer_config(
            self.params["optimizer"],
            locate=lambda path: ".".join(map(str, path)),
            report=report,
            notices=[],
        )
        report.raise_if_any()
        assert config is not None, "a section failed without a report"
        return config

    def get_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer over all trainable weights, made on first use."""
        if self._optimizer is None:
            weights = dict(self.trainable_named_parameters())
            self._optimizer = build_optimizer(self.optimizer_config(), weights)
        return self._optimizer

    def get_lr_scheduler(self) -> ScheduledLR:
        """A scheduler over `get_optimizer()`, stepped once per optimizer step."""
        if self._scheduler is None:
            config = self.optimizer_config()
            self._scheduler = ScheduledLR(self.get_optimizer(), config.learning_rate)
        return self._scheduler

    def get_state(self) -> dict[str, Any]:
        """`model`, and `optimizer` and `lr_scheduler` where they have been made."""
        state: dict[str, Any] = {"model": self.model.state_dict()}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        if self._scheduler is not None:
            state["lr_scheduler"] = self._scheduler.state_dict()
        return state

    def set_state(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Take over what `get_state` gave; entries that are absent are left alone."""
        self.model.load_state_dict(state["model"], strict=strict)
        if "optimizer" in state:
            self.get_optimizer().load_state_dict(state["optimizer"])
        if "lr_scheduler" in state:
            self.get_lr_scheduler().load_state_dict(state["lr_scheduler"])
