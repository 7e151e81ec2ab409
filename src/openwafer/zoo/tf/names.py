"""How the weights of a PyTorch model and the variables of its TensorFlow twin correspond.

Decides names and layouts, by one rule for all families. Does not decide how files are read and
written (convert_tf.py).

The rule: a variable lies in the name scopes that are the path of its module, with `/` for `.` (in a
PyTorch module, which the runtime makes of the graph, no name may hold a dot). The last part of the
name and the layout follow from the kind of the module:

    PyTorch                         TensorFlow
    Linear weight [out, in]         kernel [in, out]
    Conv weight [out, in, *window]  kernel [*window, in, out]
    ConvTranspose weight            kernel [*window, out, in]
      [in, out, *window]
    Embedding weight                embeddings
    LayerNorm, GroupNorm and
      BatchNorm weight, bias        gamma, beta
    BatchNorm running_mean,         moving_mean, moving_variance
      running_var
    any other parameter             its own name

A weight that several modules share is one variable, named after the first of them. A buffer that is
not a batch statistic is no variable: the TensorFlow model computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Counterpart", "counterparts", "path_name", "tf_name", "to_tf", "to_torch"]

Array = np.ndarray[Any, np.dtype[Any]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_STATISTICS = {"running_mean": "moving_mean", "running_var": "moving_variance"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterpart:
    """One variable.

    name: of the variable, without `:0`.
    keys: the state_dict's names of the tensor; more than one where modules share it.
    axes: PyTorch's axes in TensorFlow's order.
    trained: False of a batch statistic.
    """

    name: str
    keys: tuple[str, ...]
    axes: tuple[int, ...]
    trained: bool = True

    def to_tf(self, tensor: Tensor) -> Array:
        """The variable's value, float32."""
        return tensor.detach().float().permute(self.axes).contiguous().numpy()

    def to_torch(self, array: Array) -> Tensor:
        """The tensor for all of `keys`, float32."""
        back = np.argsort(self.axes).tolist()
        return torch.from_numpy(np.array(array, dtype=np.float32)).permute(back).contiguous()


def path_name(module_path: str) -> str:
    """The name scopes of a module: `decoder.layers.3.norm1` → `decoder/layers/3/norm1`."""
    return module_path.replace(".", "/")


def counterparts(model: nn.Module) -> tuple[Counterpart, ...]:
    """The variables of the model's TensorFlow twin, in the order of its state_dict.

    Args:
        model: on any device, "meta" too.
    """
    state = model.state_dict(keep_vars=True)
    keys_of: dict[int, list[str]] = {}
    for key, tensor in state.items():
        keys_of.setdefault(id(tensor), []).append(key)
    found: list[Counterpart] = []
    for keys in keys_of.values():
        path, _, last = keys[0].rpartition(".")
        module, tensor = model.get_submodule(path), state[keys[0]]
        trained = isinstance(tensor, nn.Parameter)
        if not trained and not (isinstance(module, _NORMS) and last in _STATISTICS):
            continue
        scopes = f"{path_name(path)}/" if path else ""
        found.append(
            Counterpart(
                name=scopes + _last_part(module, last),
                keys=tuple(keys),
                axes=_axes(module, last, tensor.dim()),
                trained=trained,
            )
        )
    return tuple(found)


def tf_name(model: nn.Module, key: str) -> str:
    """The name of the variable that has the parameter `key`, in any of its names."""
    return next(each.name for each in counterparts(model) if key in each.keys)


def to_tf(model: nn.Module) -> dict[str, Array]:
    """The values of all variables that have the model's weights, by name."""
    state = model.state_dict()
    return {each.name: each.to_tf(state[each.keys[0]]) for each in counterparts(model)}


def to_torch(model: nn.Module, values: Mapping[str, Array]) -> dict[str, Tensor]:
    """The state_dict entries for these values; variables that the model has not are left out.

    Raises:
        KeyError: a variable is missing.
    """
    return {
        key: tensor
        for each in counterparts(model)
        for tensor in (each.to_torch(values[each.name]),)
        for key in each.keys
    }


def _last_part(module: nn.Module, last: str) -> str:
    if isinstance(module, _NORMS):
        return {"weight": "gamma", "bias": "beta", **_STATISTICS}[last]
    if last == "weight" and isinstance(module, nn.Embedding):
        return "embeddings"
    if last == "weight" and isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        return "kernel"
    return last


def _axes(module: nn.Module, last: str, num_dims: int) -> tuple[int, ...]:
    """Keras' kernels have what they sum over in front of what they give; of a transposed
    convolution the two are swapped, as it is the gradient of one."""
    window = tuple(range(2, num_dims))
    if last == "weight" and isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        return (*window, 1, 0)
    return tuple(range(num_dims))
