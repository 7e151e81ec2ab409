"""Weights between the zoo's PyTorch checkpoints and TensorFlow's `model.ckpt-<step>`, both ways.

Decides what is read and written. Does not decide which variable is which weight (tf/names.py).

The weights and batch statistics are converted; the optimizer's state is not, and begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from openwafer.errors import CheckpointError
from openwafer.frontends.tf.checkpoint import CheckpointWriter, read_checkpoint
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.nodes import Array
from openwafer.train.checkpoint_file import write_file
from openwafer.zoo.conversion import (
    ConversionResult,
    described,
    is_tensorflow,
    params_path,
    require_shape,
    weights_of_checkpoint,
    write_params,
)
from openwafer.zoo.family import Family
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.outline import outline
from openwafer.zoo.tf.names import counterparts, to_torch

__all__ = ["convert_tf"]


def convert_tf(
    source: Path, target: Path, model: str | None, params: Path | None
) -> ConversionResult:
    """Convert; `source`, `target` or neither may be a `.mdl` file.

    Raises:
        CheckpointError: the source cannot be read or is of another model; nothing is written.
        ConfigError: nothing says which model it is, or TensorFlow is not there.
    """
    family, config = described(source, model, params)
    if is_tensorflow(source):
        left_out = _to_torch(source, target, family, config)
    else:
        left_out = ()
        _to_tensorflow(source, target, family, config)
    written = params_path(target)
    write_params(written, family, config)
    return ConversionResult(
        target=target,
        family=family.name,
        num_tensors=len(counterparts(outline(family, config))),
        left_out=left_out,
        params=written,
    )


def _to_torch(source: Path, target: Path, family: Family, config: ModelConfig) -> tuple[str, ...]:
    """Write the file; gives the names of what TensorFlow's model has not."""
    if target.is_dir() or target.suffix != ".mdl":
        raise CheckpointError(
            "a checkpoint is a file", where=str(target), allowed="a name that ends in .mdl"
        )
    twin = outline(family, config)
    expected = twin.state_dict(keep_vars=True)
    values = read_checkpoint(str(source), [each.name for each in counterparts(twin)])
    state = to_torch(twin, values)
    for name, tensor in state.items():
        require_shape(name, tensor, expected[name], source)
    ordered = {name: state[name] for name in expected if name in state}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, {"model": ordered})
    return tuple(name for name in expected if name not in state)


def _to_tensorflow(source: Path, target: Path, family: Family, config: ModelConfig) -> None:
    state: Mapping[str, Tensor] = weights_of_checkpoint(source, family, config)
    step = int(target.name.rpartition("-")[2])
    values: dict[str, Array] = {
        each.name: each.to_tf(state[each.keys[0]]) for each in counterparts(outline(family, config))
    }
    values["global_step"] = np.asarray(step, dtype=np.int64)
    graph = tf.Graph()
    with graph.as_default():
        for name, value in values.items():
            zeros = tf.compat.v1.zeros_initializer()
            tf.compat.v1.get_variable(name, value.shape, value.dtype, zeros)
    CheckpointWriter(target.parent, graph, keep_max=None).save(step, values)
