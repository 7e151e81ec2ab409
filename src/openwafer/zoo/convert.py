"""Weights between Hugging Face's `transformers` and the zoo, both ways.

Decides which family a folder is of, and that every tensor is accounted for. Chooses the conversion,
too: those from and to TensorFlow are in convert_tf.py. Does not decide how names and layouts
correspond (each family's weights.py) or how files are read and written (hf_folder.py,
train/checkpoint_file.py).

Beside a converted checkpoint `x.mdl` stands `x.yaml` with its `model` section, for `--params`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from openwafer.errors import CheckpointError, ConfigError, OpenWaferError, nearest
from openwafer.frontends.torch.weights_in_files import WeightsInFiles
from openwafer.train.checkpoint_file import write_file
from openwafer.zoo.catalog import families, family_of
from openwafer.zoo.conversion import (
    ConversionResult,
    described,
    is_tensorflow,
    require_shape,
    shapes,
    weights_of_checkpoint,
    write_params,
)
from openwafer.zoo.family import Family
from openwafer.zoo.hf_folder import HFFolder, write_hf_folder
from openwafer.zoo.model import AnyModel, ModelConfig
from openwafer.zoo.weights import Rule, WeightMap

__all__ = ["ConversionResult", "convert", "from_pretrained"]

_log = logging.getLogger("openwafer")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    model: str | None = None,
    params: str | Path | None = None,
) -> ConversionResult:
    """Convert a Hugging Face folder or a TensorFlow checkpoint to a checkpoint of ours, or one of
    ours to either.

    Args:
        source: a folder with config.json, one of our checkpoint files, or `model.ckpt-<step>`.
        target: a `.mdl` file, a folder that is new or empty, or `model.ckpt-<step>`.
        model: the model's name or family; needed where the source does not say (one of our
            checkpoints without its parameters beside it, a head other than the saved one).
        params: a parameter file with the `model` section of one of our checkpoints.

    Raises:
        CheckpointError: the source cannot be read or does not fit; nothing is written.
        ConfigError: unknown model, or parameters that do not say which.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if source.is_dir():
        return _to_ours(source, target, model)
    if is_tensorflow(source) or (source.is_file() and is_tensorflow(target)):
        from openwafer.zoo.convert_tf import convert_tf

        return convert_tf(source, target, model, Path(params) if params else None)
    if source.is_file():
        return _to_theirs(source, target, model, params)
    raise CheckpointError("there is no such file or folder", where=str(source))


def from_pretrained(folder: str | Path, family: str | None = None) -> AnyModel:
    """A zoo model with the weights of a Hugging Face folder, on the CPU in float32.

    Args:
        family: a family with another head than the saved one, as `bert_classifier` for a BERT that
            was only pre-trained; weights that it has and the folder lacks keep their initial
            values.

    Raises:
        CheckpointError, ConfigError: see `convert`.
    """
    with HFFolder(Path(folder).expanduser()) as theirs:
        chosen = _family_for(theirs, family)
        config = _config_from(chosen, theirs)
        model = chosen.model(config)
        state = model.state_dict()
        missing = set(state)
        with torch.no_grad():
            for names_of_ours, tensors in _ours(chosen, config, theirs):
                for name, tensor in zip(names_of_ours, tensors, strict=True):
                    require_shape(name, tensor, state[name], theirs.folder)
                    state[name].copy_(tensor)
                    missing -= _aliases(state, name)
    if missing:
        _log.warning("not in %s, initial values: %s", folder, ", ".join(sorted(missing)))
    return model


def _to_ours(source: Path, target: Path, model: str | None) -> ConversionResult:
    if target.is_dir() or target.suffix != ".mdl":
        raise CheckpointError(
            "a checkpoint is a file", where=str(target), allowed="a name that ends in .mdl"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Copies lie in files, so that a model larger than the memory can be converted.
    with HFFolder(source) as theirs, WeightsInFiles(target.parent):
        family = _family_for(theirs, model)
        config = _config_from(family, theirs)
        expected = shapes(family, config)
        state: dict[str, Tensor] = {}
        for names_of_ours, tensors in _ours(family, config, theirs):
            for name, tensor in zip(names_of_ours, tensors, strict=True):
                require_shape(name, tensor, expected[name], source)
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                wide = tensor.to(dtype, copy=True)
                state.update(dict.fromkeys(sorted(_aliases(expected, name)), wide))
        ordered = {name: state[name] for name in expected if name in state}
        write_file(target, {"model": ordered})
    params = target.with_suffix(".yaml")
    write_params(params, family, config)
    left_out = tuple(name for name in expected if name not in state)
    return ConversionResult(
        target=target,
        family=family.name,
        num_tensors=len(ordered),
        left_out=left_out,
        params=params,
    )


def _to_theirs(
    source: Path, target: Path, model: str | None, params: str | Path | None
) -> ConversionResult:
    family, config = described(source, model, Path(params) if params else None)
    weights = _weights_of(family)
    state = weights_of_checkpoint(source, family, config)
    theirs = weights.config_to(config)
    count = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal count
        for ours, names_of_theirs, rule in _expanded(weights, config):
            given = [state[name] for name in ours]
            parts = rule.split(*given) if rule.split else tuple(given)
            for name, tensor in zip(names_of_theirs, parts, strict=True):
                count += 1
                yield name, tensor.detach()

    write_hf_folder(target, theirs, tensors())
    return ConversionResult(target=target, family=family.name, num_tensors=count)


# ------------------------------------------------------------------ which model it is


def _family_for(theirs: HFFolder, wanted: str | None) -> Family:
    if wanted is not None:
        family = family_of(wanted)
        _weights_of(family)
        return family
    known: list[str] = []
    for name in families():
        weights = family_of(name).weights
        if weights is None:
            continue
        if theirs.architecture in weights.architectures:
            return family_of(name)
        known += weights.architectures
    raise CheckpointError(
        f"no model of the zoo has weights of {theirs.architecture or 'an unnamed architecture'}",
        where=str(theirs.folder / "config.json"),
        allowed=", ".join(dict.fromkeys(known)),
        hint=nearest(theirs.architecture, known) or "--model NAME takes over what fits",
    )


def _weights_of(family: Family) -> WeightMap:
    if family.weights is None:
        having = [name for name in families() if family_of(name).weights is not None]
        raise ConfigError(
            f"{family.name} has no counterpart in transformers", allowed=", ".join(having)
        )
    return family.weights


def _config_from(family: Family, theirs: HFFolder) -> ModelConfig:
    where = str(theirs.folder / "config.json")
    try:
        weights = _weights_of(family)
        section = weights.config_from(theirs.config)
        if weights.config_from_names is not None:
            section |= weights.config_from_names(theirs.config, theirs.names)
        return family.config.from_section(section, lambda _: where)
    except KeyError as error:
        raise CheckpointError(f"its configuration has no {error}", where=where) from error
    except OpenWaferError as error:
        error.where = error.where or where
        raise


# ------------------------------------------------------------------ the tensors


def _aliases(state: Mapping[str, Tensor], name: str) -> set[str]:
    """All names of the tensor `name`."""
    tensor = state[name]
    if tensor.is_meta:
        return {other for other, value in state.items() if value is tensor}
    place = tensor.data_ptr()
    return {name} | {
        other
        for other, value in state.items()
        if value.data_ptr() == place and value.shape == tensor.shape and place
    }


def _expanded(
    weights: WeightMap, config: ModelConfig
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Rule]]:
    """Every rule for every layer: our names, their names, the rule."""
    for rule in weights.rules(config):
        ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        numbers: tuple[int | None, ...] = (None,)
        if rule.layers:
            numbers = tuple(range(getattr(config, rule.layers)))
        for number in numbers:
            yield (
                tuple(_numbered(name, number) for name in ours),
                tuple(_numbered(name, number) for name in rule.theirs),
                rule,
            )


def _numbered(name: str, number: int | None) -> str:
    return name if number is None else name.replace("{layer}", str(number))


def _ours(
    family: Family, config: ModelConfig, theirs: HFFolder
) -> Iterator[tuple[tuple[str, ...], tuple[Tensor, ...]]]:
    """Our names and tensors, rule by rule; then what is in the file and was not used is said.

    Raises:
        CheckpointError: the file lacks a tensor that is not optional.
    """
    weights = _weights_of(family)
    used: set[str] = set()
    for ours, wanted, rule in _expanded(weights, config):
        found = [theirs.name_of(name) for name in wanted]
        if None in found:
            if all(name in weights.optional for name in ours):
                continue
            absent = wanted[found.index(None)]
            raise CheckpointError(
                f"the checkpoint has no `{absent}`",
                where=str(theirs.folder),
                hint=nearest(absent, theirs.names)
                or f"it was saved as {theirs.architecture}; --model takes another family",
            )
        present = [name for name in found if name is not None]
        used.update(present)
        given = [theirs.tensor(name) for name in present]
        joined = rule.join(*given) if rule.join else given[0]
        yield ours, (joined,) if isinstance(joined, Tensor) else tuple(joined)
    ignored = re.compile("|".join(map(_pattern, weights.ignored)) or "$^")
    unused = sorted(name for name in theirs.names - used if not ignored.match(name))
    if unused:
        _log.warning("%d tensors are not used: %s", len(unused), ", ".join(unused[:8]))


def _pattern(prefix: str) -> str:
    """Of names that begin with `prefix`, also without its first part (a base model's own names)."""
    first, dot, rest = re.escape(prefix).replace(re.escape("{layer}"), r"\d+").partition(r"\.")
    return f"(?:{first}{dot})?{rest}" if rest else first + dot
