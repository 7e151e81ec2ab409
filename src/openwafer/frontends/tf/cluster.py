"""Which task of the cluster this process is, as TensorFlow code asks for it.

Decides the contents of `TF_CONFIG`, which input functions read to choose their part of the data,
and `CSSlurmClusterResolver`, which older scripts build it with. Roles come from streaming/tasks.py:
task 0 is the chief, the others are workers.

Source of the form: sections 8.2 and 8.3 of the fact sheet.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.streaming import tasks

__all__ = ["CSSlurmClusterResolver", "set_tf_config", "tf_config"]

_log = logging.getLogger("openwafer")

_PORT, _PORTS_APART = 49600, 2
"""Of release 1.6, as its logs show them."""
_RESOLVER_PORT = 23111
"""Of scripts before it, whose ports follow each other."""


def tf_config(port_base: int = _PORT, ports_apart: int = _PORTS_APART) -> dict[str, Any]:
    """What `TF_CONFIG` holds for this task; {} where there are no workers.

    The addresses say how many workers there are: nothing of TensorFlow listens there.
    """
    environment = tasks.current()
    if not environment.num_workers:
        return {}
    hosts = [
        f"{environment.node}:{port_base + ports_apart * task}"
        for task in range(environment.num_workers + 1)
    ]
    worker = environment.role == "worker"
    return {
        "cluster": {"chief": hosts[:1], "worker": hosts[1:]},
        "task": {
            "type": "worker" if worker else "chief",
            "index": environment.worker_rank - 1 if worker else 0,
        },
    }


def set_tf_config() -> None:
    """Set the variable where it is not set, and show it, as every run of release 1.6 began."""
    config = tf_config()
    if config and "TF_CONFIG" not in os.environ:
        os.environ["TF_CONFIG"] = json.dumps(config)
    _log.info("TF_CONFIG environment variable: %s", os.environ.get("TF_CONFIG", "{}"))


class CSSlurmClusterResolver:
    """The tasks of a SLURM step as TensorFlow's cluster.

    Args:
        port_base: port of the first task; the others follow, one by one.
    """

    def __init__(self, port_base: int = _RESOLVER_PORT) -> None:
        self._config = tf_config(port_base, ports_apart=1)

    def cluster_spec(self) -> Any:
        """A tf.train.ClusterSpec; empty where there is one task."""
        return tf.train.ClusterSpec(self._config.get("cluster", {}))

    def get_task_info(self) -> tuple[str, int]:
        """Type and index of this task: ("chief", 0) or ("worker", index)."""
        task = self._config.get("task", {"type": "chief", "index": 0})
        return task["type"], task["index"]

    def master(self) -> str:
        """Address of the chief; empty where there is one task."""
        return next(iter(self._config.get("cluster", {}).get("chief", [])), "")
