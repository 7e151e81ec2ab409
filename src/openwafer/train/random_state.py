"""The global random generators of this process, as values that a checkpoint can hold.

Decides which generators are kept: torch (CPU, and the GPUs if they are in use), NumPy and
Python. What the executors draw (dropout) depends on the seed and the step alone and needs none of
them; they are kept for a user's own code. Does not decide when they are seeded.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

__all__ = ["capture_random_state", "restore_random_state"]

_log = logging.getLogger("openwafer")


def capture_random_state(seed: int) -> dict[str, Any]:
    """The state of all generators, in tensors and plain numbers."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "seed": seed,
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every generator that `state` has; one that it lacks stays as it is."""
    if "torch" in state:
        torch.set_rng_state(state["torch"].clone())
    if "python" in state:
        entry = state["python"]
        random.setstate((entry["version"], tuple(entry["words"].tolist()), entry["gauss"]))
    if "numpy" in state:
        entry = state["numpy"]
        key = entry["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, entry["pos"], entry["has_gauss"], entry["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        saved = cast("list[torch.Tensor]", state["cuda"])
        if len(saved) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([tensor.clone() for tensor in saved])
        else:
            _log.warning(
                "the checkpoint is from another number of GPUs: their generators are not restored"
            )
