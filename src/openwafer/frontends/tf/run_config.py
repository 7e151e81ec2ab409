"""`CSRunConfig`: how an Estimator runs, on TensorFlow itself or compiled.

Decides which settings there are besides those of `tf.estimator.RunConfig`. Does not decide what
they do (estimator.py, compiled_run.py).

Source of names: CS-2 software 1.6 documentation, section 4.2 of the fact sheet.
"""

from __future__ import annotations

import copy
from typing import Any

from openwafer.config.runconfig import with_port
from openwafer.frontends.tf.library import tf

__all__ = ["CSRunConfig"]


class CSRunConfig(tf.estimator.RunConfig):
    """A `tf.estimator.RunConfig` with the address of the machine.

    Args:
        cs_ip: `local`, or `host[:port]` where the coordinator listens for its workers; None leaves
            everything to TensorFlow.
        system_name, cs_config, stack_params: of the original's compiler; accepted, without effect.
        execution_mode: auto, layer_pipelined or weight_streaming.
        machine: name of the specification to plan for, or its path.
        weight_store: where weights rest between uses: `ram`, or `disk:DIR`.
        device: auto, cpu or cuda.
        kwargs: those of tf.estimator.RunConfig.

    Raises:
        ConfigError: `cs_ip` is no address.
    """

    def __init__(
        self,
        cs_ip: str | None = None,
        system_name: str | None = None,
        cs_config: Any = None,
        stack_params: Any = None,
        *,
        execution_mode: str = "auto",
        machine: str = "wse2",
        weight_store: str = "ram",
        device: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cs_ip = with_port(cs_ip) if cs_ip else None
        self.system_name, self.cs_config, self.stack_params = system_name, cs_config, stack_params
        self.execution_mode, self.machine = execution_mode, machine
        self.weight_store, self.compute_device = weight_store, device

    @classmethod
    def of(cls, config: Any) -> CSRunConfig:
        """`config` itself, or its settings without a machine.

        A RunConfig checks itself when it is made and has no way back to its arguments, so that a
        copy is made to be of this class.
        """
        if isinstance(config, cls):
            return config
        plain = cls()
        if config is not None:
            plain.__dict__.update(copy.deepcopy(vars(config)))
        return plain
