"""Weights between Hugging Face's `transformers` and the zoo, both ways.

Decides which family a checkpoint is of, that every tensor is accounted for, and where a model's
parameters are found. Does not decide how names and layouts correspond (each family's weights.py) or
how files are read and written (hf_folder.py, train/checkpoint_file.py).

Beside a converted checkpoint `x.mdl` stands `x.yaml` with its `model` section, for `--params`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from openwafer.config.yaml_file import read_yaml
from openwafer.errors import CheckpointError, ConfigError, OpenWaferError, nearest
from openwafer.files import write_text
from openwafer.frontends.torch.weights_in_files import WeightsInFiles
from openwafer.train.checkpoint import from_contents
from openwafer.train.checkpoint_file import write_file
from openwafer.train.checkpoint_shards import read_checkpoint
from openwafer.zoo.catalog import families, family_of, load, model_config, names
from openwafer.zoo.family import Family
from openwafer.zoo.hf_folder import HFFolder, write_hf_folder
from openwafer.zoo.model import AnyModel, ModelConfig
from openwafer.zoo.outline import outline
from openwafer.zoo.weights import Rule, WeightMap

__all__ = ["ConversionResult", "convert", "from_pretrained"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """left_out: our tensors that the source does not have (a head to be trained)."""

    target: Path
    family: str
    num_tensors: int
    left_out: tuple[str, ...] = ()
    params: Path | None = None

    def __str__(self) -> str:
        lines = [f"{self.num_tensors} tensors of {self.family} in {self.target}"]
        if self.left_out:
            lines.append(f"not in the source, to be trained: {', '.join(self.left_out)}")
        if self.params is not None:
            lines.append(
                f"to go on: openwafer train {self.family}/… --params {self.params} "
                f"--checkpoint_path {self.target} --is_pretrained_checkpoint"
            )
        return "\n".join(lines)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    model: str | None = None,
    params: str | Path | None = None,
) -> ConversionResult:
    """Convert a Hugging Face folder to a checkpoint, or a checkpoint to a Hugging Face folder.

    Args:
        source: a folder with config.json, or one of our checkpoint files.
        target: a `.mdl` file, or a folder that is new or empty.
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
                    _require_shape(name, tensor, state[name], theirs.folder)
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
        expected = _shapes(family, config)
        state: dict[str, Tensor] = {}
        for names_of_ours, tensors in _ours(family, config, theirs):
            for name, tensor in zip(names_of_ours, tensors, strict=True):
                _require_shape(name, tensor, expected[name], source)
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                wide = tensor.to(dtype, copy=True)
                state.update(dict.fromkeys(sorted(_aliases(expected, name)), wide))
        ordered = {name: state[name] for name in expected if name in state}
        write_file(target, {"model": ordered})
    params = target.with_suffix(".yaml")
    _write_params(params, family, config)
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
    family, config = _described(source, model, Path(params) if params else None)
    weights = _weights_of(family)
    state = from_contents(read_checkpoint(source), None, where=str(source)).state.model
    expected = _shapes(family, config)
    for name, tensor in expected.items():
        if name not in state:
            raise CheckpointError(
                f"the checkpoint has no `{name}`",
                where=str(source),
                hint=nearest(name, state) or f"check that it is of {family.name}",
            )
        _require_shape(name, state[name], tensor, source)
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


def _described(
    checkpoint: Path, model: str | None, params: Path | None
) -> tuple[Family, ModelConfig]:
    """Family and configuration of one of our checkpoints."""
    beside = [
        checkpoint.with_suffix(".yaml"),
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


def _write_params(path: Path, family: Family, config: ModelConfig) -> None:
    section = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()
    }
    text = yaml.safe_dump({"description": family.name, "model": section}, sort_keys=False)
    write_text(path, text)


# ------------------------------------------------------------------ the tensors


def _shapes(family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """The model's state_dict, on "meta"; tied tensors are one object."""
    return outline(family, config).state_dict(keep_vars=True)


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


def _require_shape(name: str, tensor: Tensor, expected: Tensor, source: Path) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"`{name}` has the shape {list(tensor.shape)}",
            where=str(source),
            allowed=f"{list(expected.shape)}",
        )
