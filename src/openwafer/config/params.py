"""The whole parameter file: from YAML and command line to one checked, frozen value.

Decides how the file and the flags merge, which sections a mode needs, and the few keys of `model`,
`csconfig` and the inputs that matter to every run. Does not decide what else `model` and the inputs
hold: they pass through as the dicts that the user's own functions expect.

The order: `load_params` reads and merges (`merge_flags` alone, where the parameters are in memory
already), the user's default_params_fn may change the dict, `resolve` checks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from openwafer.config.optimizer import OptimizerConfig, build_optimizer_config
from openwafer.config.runconfig import RunConfig, build_runconfig, no_effect_notices
from openwafer.config.schedule import Linear, SequentialLR
from openwafer.config.schema import KeyPath, Locate, Report, build
from openwafer.config.yaml_file import YamlFile, read_yaml
from openwafer.errors import ConfigError, nearest

__all__ = [
    "SECTIONS",
    "CSConfig",
    "LoadedParams",
    "Params",
    "load_params",
    "merge_flags",
    "resolve",
]

SECTIONS = (
    "train_input",
    "eval_input",
    "predict_input",
    "model",
    "optimizer",
    "runconfig",
    "csconfig",
    "description",
)
"""The keys a parameter file has at the top."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "train": ("train_input", "model", "optimizer"),
    "eval": ("eval_input", "model"),
    "eval_all": ("eval_input", "model"),
    "train_and_eval": ("train_input", "eval_input", "model", "optimizer"),
    "predict": ("predict_input", "model"),
}

ComputeDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CSConfig:
    """The `csconfig` section."""

    use_cbfloat16: bool = False
    """CB16 half precision (1 sign, 6 exponent, 9 mantissa bits); needs mixed_precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrecision:
    """The keys of `model` that every run reads."""

    mixed_precision: bool = False
    """Compute in 16 bits, keep the weights in 32."""
    fp16_type: Literal["bfloat16", "float16"] = "bfloat16"
    """The 16-bit type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """A checked parameter file.

    runconfig, optimizer, csconfig: those sections; optimizer is None where the mode needs none and
        the file has none.
    mixed_precision: compute in `compute_dtype`, keep float32 weights.
    compute_dtype: torch's name of the dtype of activations.
    raw: the merged dict that the user's functions get.
    notices: what the user should be told once: settings without effect, other spellings.
    """

    runconfig: RunConfig
    optimizer: OptimizerConfig | None
    csconfig: CSConfig
    mixed_precision: bool
    compute_dtype: ComputeDtype
    raw: dict[str, Any]
    notices: tuple[str, ...] = ()

    def log_notices(self) -> None:
        """Say the notices, one log line each."""
        for notice in self.notices:
            logging.getLogger("openwafer").warning(notice)


class LoadedParams(NamedTuple):
    """A merged file: the dict, where each key stands, and the names of the user's own flags."""

    raw: dict[str, Any]
    locate: Locate
    extra_keys: tuple[str, ...]


def load_params(
    path: str | Path,
    overrides: Mapping[str, object] | None = None,
    *,
    extra: Mapping[str, object] | None = None,
    default_model_dir: str | Path = "model_dir",
    environ: Mapping[str, str] | None = None,
) -> LoadedParams:
    """Read a parameter file and merge the command line into its `runconfig`.

    Args:
        overrides: flags; one that is not None wins over the file, one that is None is written only
            where the file has no such key. `config` is special: it names the top-level key whose
            mapping is used as the whole file.
        extra: values of the user's own flags, merged the same way.
        default_model_dir: `runconfig.model_dir` where neither the file nor the flags have one.
        environ: the environment; `K8S_CS_IP` in it takes the place of `cs_ip`.

    Raises:
        ConfigError: the file cannot be read, `config` names no mapping in it, or `cs_ip` is given
            as well as `K8S_CS_IP`.
    """
    given = dict(overrides or {})
    selected = given.pop("config", None)
    file = read_yaml(path)
    raw = file.values if selected is None else _select(file, str(selected))
    prefix: KeyPath = () if selected is None else (selected,)

    def locate(at: KeyPath) -> str:
        return file.locate((*prefix, *at))

    return merge_flags(
        raw, locate, given, extra=extra, default_model_dir=default_model_dir, environ=environ
    )


def merge_flags(
    raw: dict[str, Any],
    locate: Locate,
    overrides: Mapping[str, object],
    *,
    extra: Mapping[str, object] | None = None,
    default_model_dir: str | Path = "model_dir",
    environ: Mapping[str, str] | None = None,
) -> LoadedParams:
    """Merge a command line into the `runconfig` of parameters that are in memory, in place.

    Args:
        locate: gives the place of a key of `raw`.
        Others: as `load_params` has them, but for `config`.

    Raises:
        ConfigError: `runconfig` is no mapping, or `cs_ip` is given as well as `K8S_CS_IP`.
    """
    own = dict(extra or {})
    runconfig = raw.get("runconfig")
    if runconfig is None:
        runconfig = raw["runconfig"] = {}
    if not isinstance(runconfig, dict):
        raise ConfigError(
            f"`runconfig` is {runconfig!r}",
            where=locate(("runconfig",)),
            allowed="a mapping",
        )
    flags = {**overrides, **own}
    from_flags = {key for key, value in flags.items() if value is not None}
    for key, value in flags.items():
        if value is not None or key not in runconfig:
            runconfig[key] = value
    _apply_environment(runconfig, os.environ if environ is None else environ)
    if runconfig.get("model_dir") is None:
        runconfig["model_dir"] = str(default_model_dir)
    if runconfig.get("service_dir") is None:
        runconfig["service_dir"] = runconfig["model_dir"]

    def locate_merged(at: KeyPath) -> str:
        if len(at) > 1 and at[0] == "runconfig" and at[1] in from_flags:
            return f"command line: --{at[1]}"
        return locate(at)

    return LoadedParams(raw, locate_merged, tuple(own))


def _select(file: YamlFile, name: str) -> dict[str, Any]:
    chosen = file.values.get(name)
    if isinstance(chosen, dict):
        return cast("dict[str, Any]", chosen)
    names = [str(key) for key, value in file.values.items() if isinstance(value, dict)]
    raise ConfigError(
        f"the parameter file has no configuration `{name}`",
        where=file.locate((name,)),
        allowed=", ".join(names),
        hint=nearest(name, names),
    )


def _apply_environment(runconfig: dict[str, Any], environ: Mapping[str, str]) -> None:
    address = environ.get("K8S_CS_IP")
    if not address:
        return
    if runconfig.get("cs_ip") is not None:
        raise ConfigError(
            "`cs_ip` is given, and the environment has K8S_CS_IP",
            where="environment: K8S_CS_IP",
            allowed="one of them",
        )
    runconfig["cs_ip"] = address


def resolve(
    raw: dict[str, Any],
    locate: Callable[[KeyPath], str],
    *,
    extra_keys: tuple[str, ...] = (),
) -> Params:
    """Check a merged dict, after the user's default_params_fn, and freeze what a run reads.

    `raw` itself is kept as it is, except that `runconfig.cs_ip` gets its port.

    Raises:
        ConfigError: lists every mistake; its `where` is the first one's.
    """
    report = Report()
    notices: list[str] = []
    sections = _sections(raw, locate, report)
    config = build_runconfig(
        sections["runconfig"], locate=locate, report=report, extra_keys=extra_keys
    )
    mode = config.mode if config is not None else str(sections["runconfig"].get("mode"))
    if mode in _NEEDED:
        _check_needed(raw, mode, locate, report)
    for name in ("train_input", "eval_input", "predict_input"):
        _check_batch_size(name, sections[name], locate, report)
    optimizer = None
    if raw.get("optimizer") is not None:
        optimizer = build_optimizer_config(
            sections["optimizer"], locate=locate, report=report, notices=notices
        )
    csconfig = build(
        CSConfig, sections["csconfig"], path=("csconfig",), locate=locate, report=report
    )
    precision = _build_precision(sections["model"], locate, report)
    if csconfig and precision:
        _check_cb16(csconfig, precision, locate, report)
    report.raise_if_any()
    assert config is not None, "a section failed without a report"
    assert csconfig is not None, "a section failed without a report"
    assert precision is not None, "a section failed without a report"
    return _frozen(raw, config, optimizer, csconfig, precision, notices)


def _frozen(
    raw: dict[str, Any],
    config: RunConfig,
    optimizer: OptimizerConfig | None,
    csconfig: CSConfig,
    precision: ModelPrecision,
    notices: list[str],
) -> Params:
    section = raw.get("runconfig") or {}
    if config.cs_ip is not None:
        section["cs_ip"] = config.cs_ip
    params = Params(
        runconfig=_with_appliance(
            replace(config, multireplica=config.multireplica and config.mode == "train")
        ),
        optimizer=optimizer,
        csconfig=csconfig,
        mixed_precision=precision.mixed_precision,
        compute_dtype=precision.fp16_type if precision.mixed_precision else "float32",
        raw=raw,
    )
    said = (*_runconfig_notices(section, config), *notices, *_notices(params))
    return replace(params, notices=said)


def _with_appliance(config: RunConfig) -> RunConfig:
    """The appliance of 1.6 was its way to weight streaming."""
    if not config.appliance:
        return config
    mode = "weight_streaming" if config.execution_mode == "auto" else config.execution_mode
    return replace(config, cs_ip=config.cs_ip or "local", execution_mode=mode)


def _check_cb16(
    csconfig: CSConfig, precision: ModelPrecision, locate: Locate, report: Report
) -> None:
    if csconfig.use_cbfloat16 and not precision.mixed_precision:
        report.add(
            "`csconfig.use_cbfloat16` needs mixed precision",
            where=locate(("csconfig", "use_cbfloat16")),
            allowed="model.mixed_precision: true with it",
        )


def _sections(raw: Mapping[str, Any], locate: Locate, report: Report) -> dict[str, dict[str, Any]]:
    """Every section but the description as a dict; an absent one is empty."""
    for key in raw:
        if key not in SECTIONS:
            configurations = [name for name, value in raw.items() if _is_configuration(value)]
            report.add(
                f"unknown section `{key}`",
                where=locate((key,)),
                allowed=", ".join(SECTIONS),
                hint=f"--config {configurations[0]} (one of {', '.join(configurations)})"
                if configurations
                else nearest(str(key), SECTIONS),
            )
    found: dict[str, dict[str, Any]] = {}
    for name in SECTIONS[:-1]:
        section = raw.get(name)
        if section is not None and not isinstance(section, dict):
            report.add(f"`{name}` is {section!r}", where=locate((name,)), allowed="a mapping")
        found[name] = cast("dict[str, Any]", section) if isinstance(section, dict) else {}
    return found


def _is_configuration(value: object) -> bool:
    return isinstance(value, dict) and "model" in value


def _check_needed(raw: Mapping[str, Any], mode: str, locate: Locate, report: Report) -> None:
    for name in _NEEDED[mode]:
        if raw.get(name) is None:
            report.add(
                f"the section `{name}` is missing",
                where=locate((name,)),
                allowed=f"mode {mode} needs {', '.join(_NEEDED[mode])}",
                hint=nearest(name, [str(key) for key in raw if key not in SECTIONS]),
            )


def _check_batch_size(
    name: str, section: Mapping[str, Any], locate: Locate, report: Report
) -> None:
    for key in ("batch_size", "train_batch_size", "eval_batch_size"):
        if key not in section:
            continue
        size = section[key]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            report.add(
                f"`{name}.{key}` is {size!r}",
                where=locate((name, key)),
                allowed="a whole number (>= 1)",
            )


def _build_precision(
    model: Mapping[str, Any], locate: Locate, report: Report
) -> ModelPrecision | None:
    keys = ("mixed_precision", "fp16_type")
    given = {key: model[key] for key in keys if key in model}
    return build(ModelPrecision, given, path=("model",), locate=locate, report=report)


def _runconfig_notices(section: Mapping[str, Any], config: RunConfig) -> list[str]:
    given = dict(section)
    if given.get("service_dir") == given.get("model_dir"):
        given.pop("service_dir", None)
    notices = no_effect_notices(given)
    if "seed" in section and section["seed"] is None:
        notices.append("`runconfig.seed` is null: seed 1 is used, so that the run can be repeated")
    if config.multireplica and config.mode != "train":
        notices.append("`multireplica` is for mode train; it is off in this run")
    for key, asked in (
        ("multireplica", config.multireplica and config.mode == "train"),
        ("num_replicas", config.num_replicas > config.num_compute),
        ("num_csx", config.num_csx > config.num_compute),
    ):
        if asked:
            notices.append(f"`{key}`: the plan predicts it; the run here has one copy of the model")
    if config.appliance:
        notices.append("`appliance`: weight streaming on this machine, as with `cs_ip: local`")
    return notices


def _notices(params: Params) -> list[str]:
    notices: list[str] = []
    optimizer = params.optimizer
    if params.csconfig.use_cbfloat16:
        notices.append(
            f"`csconfig.use_cbfloat16`: no device here has CB16; {params.compute_dtype} is used"
        )
    if optimizer is None:
        return notices
    trains = params.runconfig.trains
    if params.compute_dtype == "float16" and optimizer.loss_scaling_factor is None and trains:
        notices.append(
            "float16 without loss scaling: small gradients become 0; "
            "`optimizer.loss_scaling_factor: dynamic` keeps them"
        )
    rate = optimizer.learning_rate
    forms = rate.schedules if isinstance(rate, SequentialLR) else (rate,)
    if any(isinstance(form, Linear) and form.cycle for form in forms):
        notices.append("`cycle` of a learning rate changes nothing, as in release 1.6")
    return notices
