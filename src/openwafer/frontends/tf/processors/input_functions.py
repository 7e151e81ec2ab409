"""Input functions of a script: the processor that a section names.

Decides which class `data_processor` means. `run(model_fn, train_input_fn, eval_input_fn)` of
`openwafer.tf` takes them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openwafer.data.params import Split
from openwafer.errors import ConfigError, nearest
from openwafer.frontends.tf.processors import documented, text_to_text

__all__ = ["eval_input_fn", "predict_input_fn", "train_input_fn"]

_PROCESSORS: Mapping[str, Any] = {
    **{name: getattr(documented, name) for name in documented.__all__},
    "T5DynamicDataProcessor": text_to_text.T5DynamicDataProcessor,
    "TransformerDynamicDataProcessor": text_to_text.TransformerDynamicDataProcessor,
}


def train_input_fn(params: Mapping[str, Any], input_context: Any = None) -> Any:
    """Batches of `train_input`, without an end.

    Raises:
        ConfigError, DataError: see `TfRecordsProcessor`.
    """
    return _dataset(params, "train", input_context)


def eval_input_fn(params: Mapping[str, Any], input_context: Any = None) -> Any:
    """Batches of `eval_input`, once."""
    return _dataset(params, "eval", input_context)


def predict_input_fn(params: Mapping[str, Any], input_context: Any = None) -> Any:
    """Batches of `predict_input`, once."""
    return _dataset(params, "predict", input_context)


def _dataset(params: Mapping[str, Any], split: Split, input_context: Any) -> Any:
    section: Mapping[str, Any] = params.get(f"{split}_input") or {}
    name = section.get("data_processor")
    if name not in _PROCESSORS:
        raise ConfigError(
            f"`data_processor` is {name!r}",
            where=f"{split}_input.data_processor",
            allowed=", ".join(_PROCESSORS),
            hint=nearest(str(name), _PROCESSORS),
        )
    return _PROCESSORS[str(name)](section, split).create_tf_dataset(input_context=input_context)
