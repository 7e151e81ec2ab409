"""Which variables a run begins with that continues another one's weights.

Decides the settings for `warm_start_from`. Does not decide how they are read (model_graph.py).

Source: section 4.7 of the fact sheet (CS-2 software 1.6).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openwafer.frontends.tf.library import tf

__all__ = ["create_warm_start_settings"]


def create_warm_start_settings(
    runconfig_params: Mapping[str, Any], exclude_string: str | None = None
) -> Any:
    """tf.estimator.WarmStartSettings for `checkpoint_path` of the `runconfig` section, for all
    trainable variables but those whose name contains `exclude_string`: the output layer of a model
    that is fine-tuned. None where there is no checkpoint_path."""
    checkpoint = runconfig_params.get("checkpoint_path")
    if not checkpoint:
        return None
    wanted = ".*" if not exclude_string else f"(?!.*{re.escape(exclude_string)}).*$"
    return tf.estimator.WarmStartSettings(
        ckpt_to_initialize_from=str(checkpoint), vars_to_warm_start=wanted
    )
