"""What conversions of checkpoints share.

Decides where a model's parameters are found, how a checkpoint's kind is told by its name, and what
is said in the end. Does not decide how tensors correspond (convert.py, convert_tf.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from openwafer.config.yaml_file import read_yaml
from openwafer.errors import CheckpointError, ConfigError, nearest
from openwafer.files import write_text
from openwafer.train.checkpoint import from_contents
from openwafer.train.checkpoint_shards import read_checkpoint
from openwafer.zoo.catalog import families, family_of, load, model_config, names
from openwafer.zoo.family import Family
from openwafer.zoo.model import ModelConfig
from openwafer.zoo.outline import outline

__all__ = [
    "ConversionResult",
    "described",
    "is_tensorflow",
    "params_path",
    "require_shape",
    "shapes",
    "weights_of_checkpoint",
    "weights_of_contents",
    "write_params",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """left_out: our tensors that the source does not have (a head to be trained).
    optimizer: what became of the optimizer's state; has_optimizer: it is in the target.
    """

    target: Path
    family: str
    num_tensors: int
    left_out: tuple[str, ...] = ()
    params: Path | None = None
    optimizer: str = ""
    has_optimizer: bool = False

    def __str__(self) -> str:
        lines = [f"{self.num_tensors} tensors of {self.family} in {self.target}"]
        if self.left_out:
            lines.append(f"not in the source, to be trained: {', '.join(self.left_out)}")
        if self.optimizer:
            lines.append(self.optimizer)
        if self.params is not None:
            command = f"openwafer train {self.family}/… --params {self.params}"
            lines.append(f"to go on: {command} {self._flags()}")
        return "\n".join(lines)

    def _flags(self) -> str:
        frontend = "--frontend tf " if is_tensorflow(self.target) else ""
        if frontend and self.has_optimizer:
            return f"{frontend}--model_dir {self.target.parent}"
        pretrained = "" if self.has_optimizer else " --is_pretrained_checkpoint"
        return f"{frontend}--checkpoint_path {self.target}{pretrained}"


def is_tensorflow(path: Path) -> bool:
    """Whether `path` is called as TensorFlow's Estimator calls its checkpoints."""
    return re.fullmatch(r"model\.ckpt-\d+", path.name) is not None


def described(
    checkpoint: Path, model: str | None, params: Path | None
) -> tuple[Family, ModelConfig]:
    """Family and configuration of one of our checkpoints, or of a TensorFlow one.

    Raises:
        ConfigError: nothing says them.
    """
    beside = [
        params_path(checkpoint),
        *(checkpoint.parent / m / f"params_{m}.yaml" for m in ("train", "train_and_eval")),
    ]
    found = params or next((path for path in beside if path.is_file()), None)
    file = read_yaml(found) if found is not None else None
    said = str(file.values.get("description")).partition(":")[0] if file is not None else ""
    name = model or (said if said in (*names(), *families()) else None)
    if name is None or (file is None and name in families()):
        raise ConfigError(
            "nothing says which model the checkpoint is of",
            where=str(checkpoint),
            allowed="--model NAME as in `openwafer zoo`, with --params FILE if its parameters were "
            "changed",
        )
    family = family_of(name)
    if file is None:
        loaded = load(name)
        return family, model_config(family, loaded.raw, loaded.locate)
    section = dict(file.values.get("model") or {})
    return family, family.config.from_section(section, file.locate)


def params_path(checkpoint: Path) -> Path:
    """Beside a converted checkpoint: `x.yaml` of `x.mdl`, `model.ckpt-5.yaml` of `model.ckpt-5`."""
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.mdl')}.yaml")


def write_params(path: Path, family: Family, config: ModelConfig) -> None:
    """Write the `model` section, for `--params`."""
    section = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()
    }
    text = yaml.safe_dump({"description": family.name, "model": section}, sort_keys=False)
    write_text(path, text)


def shapes(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """The model's state_dict, on "meta"; tied tensors are one object."""
    return outline(family, config).state_dict(keep_vars=True)


def weights_of_checkpoint(
    source: Path, family: Family, config: ModelConfig
) -> Mapping[str, Tensor]:
    """The weights in one of our checkpoint files, all of the model.

    Raises:
        CheckpointError: it cannot be read, lacks one, or has one of another shape.
    """
    return weights_of_contents(read_checkpoint(source), source, family, config)


def weights_of_contents(
    contents: Mapping[str, Any], source: Path, family: Family, config: ModelConfig
) -> Mapping[str, Tensor]:
    """The weights among the entries of the file `source`.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    state = from_contents(contents, None, where=str(source)).state.model
    for name, tensor in shapes(family, config).items():
        if name not in state:
            raise CheckpointError(
                f"the checkpoint has no `{name}`",
                where=str(source),
                hint=nearest(name, state) or f"check that it is of {family.name}",
            )
        require_shape(name, state[name], tensor, source)
    return state


def require_shape(name: str, tensor: Tensor, expected: Tensor, source: Path) -> None:
    """Raises: CheckpointError: `tensor` has another shape than `expected`."""
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"`{name}` has the shape {list(tensor.shape)}",
            where=str(source),
            allowed=f"{list(expected.shape)}",
        )
