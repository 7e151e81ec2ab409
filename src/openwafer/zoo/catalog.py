"""The catalog: the zoo's names, the parameters behind each, and models by name.

Decides which names there are (one for each `<family>/configs/<size>.yaml`), how the files, a file
of the user's own and `--set` become one parameter dictionary, and what is taken from the data where
no file says it. Does not decide what a family is (family.py) nor how a model is run (run_model.py).

A later source wins key by key: `defaults.yaml`, `<size>.yaml`, the user's file, `--set`. What is
inside a key (a list of learning rates, an initializer) is taken whole, and so is an `optimizer`
section that names another type.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from openwafer.config.params import SECTIONS, LoadedParams
from openwafer.config.schema import KeyPath, Locate, text_of
from openwafer.config.yaml_file import YamlFile, parse_value, read_yaml
from openwafer.errors import ConfigError, nearest
from openwafer.zoo.family import Family
from openwafer.zoo.model import RUN_KEYS, AnyModel, ModelConfig
from openwafer.zoo.outline import outline

__all__ = [
    "Override",
    "build",
    "data_info",
    "families",
    "family_of",
    "full_name",
    "load",
    "model_config",
    "names",
]

_ROOT = Path(__file__).parent

_ALIASES = {"gpt3/1.3b": "gpt3/xl", "gpt2/1.5b": "gpt2/xl", "gptj/base": "gptj/6b"}
"""Other names in use. Besides these, a name that ends early stands for the first one that goes on:
`bert/base` for `bert/base_msl128`."""


class Override(NamedTuple):
    """One value that wins over the files: `section.key`, and the place to name in messages."""

    key: str
    value: Any
    where: str


@cache
def names() -> tuple[str, ...]:
    """Every model, as `family/size`, sorted."""
    files = _ROOT.glob("*/configs/*.yaml")
    found = (f"{p.parent.parent.name}/{p.stem}" for p in files if p.stem != "defaults")
    return tuple(sorted(found))


@cache
def families() -> tuple[str, ...]:
    """The families' names, sorted."""
    return tuple(dict.fromkeys(name.partition("/")[0] for name in names()))


def full_name(name: str) -> str:
    """The catalog's own name for `name`, which may be an alias.

    Raises:
        ConfigError: there is no such model; the nearest name is offered.
    """
    if name in names():
        return name
    if name in _ALIASES:
        return _ALIASES[name]
    if "/" in name:
        longer = [known for known in names() if known.startswith(f"{name}_")]
        if longer:
            return longer[0]
    family = name.partition("/")[0]
    sizes = [known for known in names() if known.startswith(f"{family}/")]
    raise ConfigError(
        f"the zoo has no model {name!r}",
        allowed=", ".join(sizes or families()),
        hint=nearest(name, names()) or nearest(family, families()) or "`openwafer zoo` lists them",
    )


def family_of(name: str) -> Family:
    """The family of a model, or the one of that name.

    Raises:
        ConfigError: there is none.
    """
    family = name if name in families() else full_name(name).partition("/")[0]
    found = import_module(f"openwafer.zoo.{family}").FAMILY
    assert isinstance(found, Family), f"zoo/{family} brings no FAMILY"
    return found


def load(
    name: str,
    overrides: Iterable[str | Override] = (),
    *,
    params_path: str | Path | None = None,
) -> LoadedParams:
    """The parameters of a model, merged, with the place of each key.

    Args:
        overrides: in order; texts as `--set` takes them are `section.key=value` with a value in
            YAML. Short names of the family may be used: `model.layers`.
        params_path: a file of the user's own, which may hold differences only.

    Where no file has a `predict_input`, it is the `eval_input`.

    Raises:
        ConfigError: unknown name, section or key; the nearest is offered.
    """
    name = full_name(name)
    family = family_of(name)
    folder = _ROOT / family.name / "configs"
    files = [folder / "defaults.yaml", _ROOT / f"{name.replace('/', '/configs/')}.yaml"]
    merged = _Merged(family)
    for path in files:
        merged.add_file(_read(path))
    if params_path is not None:
        merged.add_file(read_yaml(params_path))
    for override in overrides:
        merged.set(_parsed(override) if isinstance(override, str) else override)
    merged.complete_predict_input()
    return LoadedParams(merged.values, merged.locate, ())


def build(name: str, **model_overrides: Any) -> AnyModel:
    """A model by name, with its initial weights: `build("gpt2/small", layers=4)`.

    Args:
        model_overrides: keys of the `model` section, or the family's short names.

    Under `torch.manual_seed` the weights are always the same; under `torch.device("meta")` nothing
    is allocated. What the files leave to the data (the size of a vocabulary) is read from the
    embedded data.

    Raises:
        ConfigError: unknown name or key, or a value out of bounds.
    """
    loaded = load(
        name,
        [
            Override(f"model.{key}", value, f"build({name!r}, {key}={value!r})")
            for key, value in model_overrides.items()
        ],
    )
    family = family_of(name)
    config = model_config(family, loaded.raw, loaded.locate)
    on_meta = torch.get_default_device().type == "meta"
    model = outline(family, config) if on_meta else family.model(config)
    section = loaded.raw.get("model") or {}
    if section.get("mixed_precision"):
        model.compute_dtype = getattr(torch, section.get("fp16_type", "bfloat16"))
    return model


def model_config(
    family: Family, raw: Mapping[str, Any], locate: Locate, *, section: str = "train_input"
) -> ModelConfig:
    """The checked `model` section of merged parameters.

    Args:
        section: the input whose data give what `model` leaves open.
    """
    model = dict(raw.get("model") or {})
    data = _input_section(raw, section)
    for key, of_info in family.from_data.items():
        if model.get(key) is not None:
            continue
        if data.get(of_info) is not None and not data.get("data_dir"):
            model[key] = data[of_info]  # embedded data are made as asked for: no need to open them
        else:
            model[key] = getattr(data_info(family, raw, section), of_info)
    return family.config.from_section(model, locate)


def data_info(family: Family, raw: Mapping[str, Any], section: str) -> Any:
    """What the data of an input section say about themselves (`openwafer.data.DataInfo`)."""
    from openwafer.data import build_dataset

    split = cast("Any", section.removesuffix("_input"))
    with torch.device("cpu"):  # the caller may build its model on "meta"
        return build_dataset(family.task, _input_section(raw, section), split).info


def _input_section(raw: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    return raw.get(section) or raw.get("train_input") or raw.get("eval_input") or {}


@cache
def _read(path: Path) -> YamlFile:
    return read_yaml(path)


class _Merged:
    """A parameter dictionary under construction, with the source of each `section.key`."""

    def __init__(self, family: Family) -> None:
        self.values: dict[str, Any] = {}
        self._family = family
        self._files: list[YamlFile] = []
        self._source: dict[KeyPath, Locate] = {}

    def add_file(self, file: YamlFile) -> None:
        self._files.append(file)
        for section, content in copy.deepcopy(file.values).items():
            self._check_section(section, file.locate((section,)))
            if not isinstance(content, dict):
                self.values[section] = content
                continue
            if section == "optimizer" and self._is_another_optimizer(content):
                self.values[section] = {}
            for key, value in content.items():
                for name in self._long_names(section, key, file.locate((section, key))):
                    self._section(section)[name] = value
                    self._source[section, name] = _at(file, (section, key))

    def set(self, override: Override) -> None:
        """One override: `section.key`, or deeper into a mapping or a list."""
        dotted, value, where = override
        section, _, rest = dotted.partition(".")
        if not rest:
            raise ConfigError(
                f"`{dotted}` names no key of a section",
                where=where,
                allowed=f"SECTION.KEY=VALUE with one of {', '.join(SECTIONS[:-1])}",
                hint=f"`model.{dotted}`" if dotted in self._known("model") else "",
            )
        self._check_section(section, where)
        first, *deeper = rest.split(".")
        for name in self._long_names(section, first, where):
            if deeper:
                _set_inside(self._section(section).get(name), deeper, value, where)
            else:
                self._section(section)[name] = value
            self._source[section, name] = lambda _, where=where: where

    def complete_predict_input(self) -> None:
        """What `predict_input` lacks is as in `eval_input`."""
        if self.values.get("predict_input") or self.values.get("eval_input"):
            own = self.values.get("predict_input") or {}
            self.values["predict_input"] = {**self.values.get("eval_input", {}), **own}

    def locate(self, path: KeyPath) -> str:
        source = self._source.get(tuple(path[:2]))
        if source is None and path[:1] == ("predict_input",):
            source = self._source.get(("eval_input", *path[1:2]))
        if source is not None:
            return source(path)
        holding = [file for file in self._files if file.holds(tuple(path[:1]))]
        return (holding or self._files)[-1].locate(path)

    def _section(self, name: str) -> dict[str, Any]:
        section = self.values.get(name)
        if not isinstance(section, dict):
            section = self.values[name] = {}
        return cast("dict[str, Any]", section)

    def _is_another_optimizer(self, content: Mapping[str, Any]) -> bool:
        before = self._section("optimizer").get("optimizer_type")
        after = content.get("optimizer_type", before)
        return str(before).casefold() != str(after).casefold()

    def _check_section(self, section: object, where: str) -> None:
        if section not in SECTIONS:
            raise ConfigError(
                f"unknown section `{section}`",
                where=where,
                allowed=", ".join(SECTIONS),
                hint=nearest(str(section), SECTIONS),
            )

    def _long_names(self, section: str, key: str, where: str) -> tuple[str, ...]:
        """The keys that `key` sets: itself, or those that a short name stands for."""
        known = self._known(section)
        if not known or key in known:
            short = self._family.config.SHORT if section == "model" else {}
            return short.get(key, (key,))
        raise ConfigError(
            f"unknown key `{text_of((section, key))}`",
            where=where,
            allowed=", ".join(sorted(known)),
            hint=nearest(key, known),
        )

    def _known(self, section: str) -> tuple[str, ...]:
        """The keys of a section; empty where its own room checks them."""
        if section == "model":
            config = self._family.config
            return (*(field.name for field in fields(config)), *RUN_KEYS, *config.SHORT)
        if section.endswith("_input"):
            return _input_keys(self._family.task)
        return ()


@cache
def _input_keys(task: str) -> tuple[str, ...]:
    from openwafer.data import input_keys
    from openwafer.data.params import NO_EFFECT

    return (*input_keys(task), *sorted(NO_EFFECT))


def _at(file: YamlFile, written: KeyPath) -> Locate:
    """Places in `file`; `written` are the keys as they stand there (a short name, maybe)."""
    return lambda path: file.locate((*written, *path[2:]))


def _set_inside(container: Any, path: Sequence[str], value: Any, where: str) -> None:
    for position, part in enumerate(path):
        last = position == len(path) - 1
        key: Any = int(part) if isinstance(container, list) and part.isdigit() else part
        try:
            if last:
                container[key] = value
            else:
                container = container[key]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(
                f"there is no `{part}` to set", where=where, allowed="a key or list entry there is"
            ) from None


def _parsed(text: str) -> Override:
    """The override in a `--set` text."""
    key, equals, value = text.partition("=")
    where = f"--set {text}"
    if not equals or not key:
        raise ConfigError(
            f"`{where}` sets nothing",
            where="command line",
            allowed="--set SECTION.KEY=VALUE, as in --set model.layers=4",
        )
    try:
        return Override(key.strip(), parse_value(value), where)
    except ConfigError as error:
        error.where = where
        raise
