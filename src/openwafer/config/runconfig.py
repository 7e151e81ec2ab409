"""How a run is run: the `runconfig` section of params.yaml, which the command line overrides.

Decides the keys, their types, defaults and bounds, and which of them exclude each other. Does not
decide which of them are flags (flags.py) nor what the loop does with them (train/).

Keys and meanings are those of the CS-2 software 1.6 documentation; the ones below "no effect here"
are accepted, so that a 1.6 file loads unchanged, and `no_effect_notices` says so once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from openwafer.config.byte_size import parse_bytes
from openwafer.config.schema import KeyPath, Locate, Report, build, limits
from openwafer.errors import ConfigError

__all__ = [
    "DEFAULT_PORT",
    "MODES",
    "NO_EFFECT",
    "PipelineSchedule",
    "RunConfig",
    "RunMode",
    "build_runconfig",
    "no_effect_notices",
    "with_port",
]

DEFAULT_PORT = 9000
"""Port of a CS system when `cs_ip` names none."""

RunMode = Literal["train", "eval", "eval_all", "train_and_eval", "predict"]
MODES: tuple[str, ...] = get_args(RunMode)

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]

LogLevel = Literal["CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The resolved `runconfig` section."""

    mode: RunMode = "train"
    """What to do; eval_all evaluates every checkpoint of model_dir, predict writes the model's
    predictions to `<model_dir>/predict/`."""
    max_steps: int | None = field(default=None, metadata=limits(minimum=0))
    """Stop at this global step."""
    num_steps: int | None = field(default=None, metadata=limits(minimum=1))
    """Train for this many more steps; excludes num_epochs."""
    num_epochs: int | None = field(default=None, metadata=limits(minimum=1))
    """Train for this many epochs; needs a sized data loader; excludes num_steps."""
    steps_per_epoch: int | None = field(default=None, metadata=limits(minimum=1))
    """Upper bound of the steps in one epoch."""
    eval_steps: int | None = field(default=None, metadata=limits(minimum=1))
    """Number of batches to evaluate or predict; needed when the data loader has no length."""
    log_steps: int = field(default=10, metadata=limits(minimum=0))
    """Steps between two log lines; 0 logs the last step only."""
    checkpoint_steps: int = field(default=0, metadata=limits(minimum=0))
    """Steps between two checkpoints; 0 writes none; otherwise the last step is always saved."""
    save_initial_checkpoint: bool = False
    """Write a checkpoint before the first step."""
    save_losses: bool = True
    """Write the loss to TensorBoard at every logged step."""
    check_loss_values: bool = True
    """Stop at a loss that is NaN or infinite."""
    seed: int = field(default=1, metadata=limits(minimum=0, maximum=2**63 - 1))
    """Seed of weights, dropout and data order; null means 1, so that every run can be repeated."""
    model_dir: Path = Path("model_dir")
    """Where checkpoints, plans, logs and curves go."""
    compile_dir: Path | None = None
    """Where compiled plans go; null: model_dir."""
    checkpoint_path: Path | None = None
    """Checkpoint to start from."""
    is_pretrained_checkpoint: bool = False
    """Take matching weights only from checkpoint_path, and start at step 0."""
    cs_ip: str | None = None
    """`local`, or `host:port` where the coordinator listens; selects the compiled run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that computes."""
    cpu: bool = False
    """Compute on the CPU even if there is a GPU (the documented spelling of `device: cpu`)."""
    compile_only: bool = False
    """Compile fully, run nothing."""
    validate_only: bool = False
    """Stop after kernel matching."""
    multireplica: bool = False
    """Let the compiler choose the number of replicas; training only."""
    execution_mode: Literal["auto", "layer_pipelined", "weight_streaming"] = "auto"
    """How the plan is run; auto: by model size and device memory."""
    machine: str = "wse2"
    """Name of the wafer specification to plan for."""
    layer_compiler: Literal["auto", "eager", "inductor"] = "auto"
    """How layers run: as they are (`eager`), compiled by TorchInductor, or `auto`: compiled where
    there is a C++ compiler (Triton on a GPU) and enough work to repay it."""
    weight_store: str = "ram"
    """Where weights rest between uses: `ram`, or `disk:DIR`."""
    device_memory: str | None = None
    """Weight streaming: what a step may take of device memory, as `4GiB`; null: no limit."""
    activations: Literal["auto", "keep", "recompute", "spill"] = "auto"
    """Weight streaming: what the backward pass finds kept of each layer; auto: what fits."""
    keep_checkpoint_max: int = field(default=5, metadata=limits(minimum=0))
    """Newest checkpoints to keep; 0 keeps all."""
    checkpoint_shard_size: str | None = None
    """Split checkpoints into files of about this size, as `4GiB`; null: one file each."""
    logging: LogLevel = field(default="INFO", metadata=limits(ignore_case=True))
    """Log level of the coordinator."""
    streamer_logging: LogLevel = field(default="ERROR", metadata=limits(ignore_case=True))
    """Log level of the workers."""
    num_stages: int = field(default=1, metadata=limits(minimum=1))
    """Layer pipelined: processes that share the model's layers out among them."""
    num_replicas: int = field(default=1, metadata=limits(minimum=1))
    """Layer pipelined: copies of the model that train in parallel, each in its own processes."""
    num_microbatches: int | None = field(default=None, metadata=limits(minimum=1))
    """Equal parts that each training batch is split into; null: chosen for num_stages."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """In which order the stages work on the microbatches."""
    num_csx: int = field(default=1, metadata=limits(minimum=1))
    """Weight streaming: number of wafers, or processes, that share each batch and the weights."""
    fabric_config_file: Path | None = None
    """Overrides for the machine specification."""
    show_debug_metrics: bool = False
    """Print the counters at the end."""
    enable_summaries: bool = False
    """Write every module's tensors to summaries.npz; plain CPU or GPU run only."""
    save_stream_size: int = field(default=0, metadata=limits(minimum=0))
    """Write the first N batches to a file."""
    autoresume: bool = True
    """Go on from the newest whole checkpoint in model_dir."""
    timeline: Path | None = None
    """Weight streaming: write what happened when in the first steps to this trace file (JSON)."""
    timeline_steps: int = field(default=20, metadata=limits(minimum=1))
    """How many steps the timeline has."""

    appliance: bool = False
    """Appliance mode of 1.6: `cs_ip: local` with `execution_mode: weight_streaming`."""

    # No effect here.
    credentials_path: Path | None = None
    """Appliance credentials."""
    mgmt_address: str | None = None
    """Appliance management node."""
    num_wgt_servers: int | None = None
    """Weight servers of the appliance."""
    debug_args_path: Path | None = None
    """Debug arguments of the appliance."""
    mount_dirs: tuple[str, ...] = ()
    """Folders mounted in appliance containers."""
    python_paths: tuple[str, ...] = ()
    """PYTHONPATH of appliance containers."""
    volume_mount_path: Path | None = None
    """Older form of mount_dirs."""
    dist_addr: str | None = None
    """torch.distributed address of a multi-GPU run."""
    dist_backend: str | None = None
    """torch.distributed backend of a multi-GPU run."""
    init_method: str | None = None
    """torch.distributed start-up of a multi-GPU run."""
    main_process_id: int | None = None
    """Rank that logs in a multi-GPU run."""
    sync_batchnorm: bool = False
    """Synchronized batch normalization of a multi-GPU run."""
    save_summary_steps: int | None = None
    """Read by no PyTorch code of 1.6."""
    service_dir: Path | None = None
    """Folder of the 1.6 services; model_dir is used."""

    @property
    def trains(self) -> bool:
        """Whether the mode trains."""
        return self.mode in ("train", "train_and_eval")

    @property
    def device_memory_bytes(self) -> int | None:
        return None if self.device_memory is None else parse_bytes(self.device_memory)

    @property
    def checkpoint_shard_bytes(self) -> int | None:
        size = self.checkpoint_shard_size
        return None if size is None else parse_bytes(size)

    @property
    def pipeline_replicas(self) -> int:
        """Copies of a layer pipeline of stages; there is one where nothing is trained."""
        streams = self.execution_mode == "weight_streaming" or self.num_csx > 1
        pipelined = self.use_cs and not streams
        return self.num_replicas if pipelined and self.trains else 1

    @property
    def streaming_replicas(self) -> int:
        """Processes that stream the same weights; there is one where nothing is trained."""
        return self.num_csx if self.use_cs and self.trains else 1

    @property
    def num_compute(self) -> int:
        """Tasks that compute one model together; further ones stream data."""
        if self.cs_ip is None or self.compile_only or self.validate_only:
            return 1
        return self.num_stages * self.pipeline_replicas * self.streaming_replicas

    @property
    def use_cs(self) -> bool:
        """Whether the model is compiled, rather than run by the plain PyTorch loop."""
        return self.cs_ip is not None or self.compile_only or self.validate_only


_APPLIANCE = "there is no appliance; the launcher and --cs_ip decide where tasks run"
_CONTAINER = "bind folders with the container command instead"
_DISTRIBUTED = "the launcher starts and connects the processes"

NO_EFFECT: Mapping[str, str] = {
    "credentials_path": _APPLIANCE,
    "mgmt_address": _APPLIANCE,
    "num_wgt_servers": "the weight store needs no servers; see `weight_store`",
    "debug_args_path": _APPLIANCE,
    "mount_dirs": _CONTAINER,
    "python_paths": _CONTAINER,
    "volume_mount_path": _CONTAINER,
    "dist_addr": _DISTRIBUTED,
    "dist_backend": _DISTRIBUTED,
    "init_method": _DISTRIBUTED,
    "main_process_id": _DISTRIBUTED,
    "sync_batchnorm": "the global batch is the same in every mode",
    "save_summary_steps": "losses are written at every `log_steps`",
    "service_dir": "`model_dir` is used",
}
"""Documented keys that are accepted and change nothing, and what to use instead."""


def no_effect_notices(given: Mapping[str, object]) -> list[str]:
    """One line per key in `given` that is set but has no effect here."""
    unset = (None, False, (), [])
    return [
        f"`{key}` has no effect here: {reason}"
        for key, reason in NO_EFFECT.items()
        if given.get(key) not in unset
    ]


def with_port(address: str) -> str:
    """`host:port` of a `cs_ip`: port 9000 is appended where there is none; `local` is kept.

    An IPv6 address must be in brackets when it has a port.

    Raises:
        ConfigError: no host, or a port that is not a number from 1 to 65535.
    """
    text = address.strip()
    if text == "local":
        return text
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"`cs_ip` is {address!r}", allowed="local, HOST or HOST:PORT")
    return f"{host}:{port}"


def build_runconfig(
    values: Mapping[str, object],
    *,
    locate: Locate,
    report: Report,
    extra_keys: tuple[str, ...] = (),
) -> RunConfig | None:
    """The RunConfig of a merged `runconfig` section, or None with the mistakes in `report`.

    A null means the default, since the command line writes one for every flag that is not given.
    `extra_keys` are the user's own flags.
    """
    path: KeyPath = ("runconfig",)
    config = build(
        RunConfig,
        values,
        path=path,
        locate=locate,
        report=report,
        passed_over=extra_keys,
        none_means_default=True,
    )
    if config is None:
        return None
    before = len(report.mistakes)
    _check_exclusions(config, locate, report)
    config = _with_address(config, locate, report)
    store, _, folder = config.weight_store.partition(":")
    if config.weight_store != "ram" and not (store == "disk" and folder):
        report.add(
            f"`runconfig.weight_store` is {config.weight_store!r}",
            where=locate((*path, "weight_store")),
            allowed="ram or disk:DIR",
        )
    sizes = {
        "device_memory": config.device_memory,
        "checkpoint_shard_size": config.checkpoint_shard_size,
    }
    for name, size in sizes.items():
        try:
            _ = size is None or parse_bytes(size)
        except ConfigError as error:
            report.add(
                f"`runconfig.{name}`: {error.what}",
                where=locate((*path, name)),
                allowed=error.allowed,
            )
    return config if len(report.mistakes) == before else None


def _with_address(config: RunConfig, locate: Locate, report: Report) -> RunConfig:
    if config.cs_ip is None:
        return config
    try:
        return replace(config, cs_ip=with_port(config.cs_ip))
    except ConfigError as error:
        report.add(error.what, where=locate(("runconfig", "cs_ip")), allowed=error.allowed)
        return config


def _check_exclusions(config: RunConfig, locate: Locate, report: Report) -> None:
    trains = config.trains and not (config.compile_only or config.validate_only)
    rules = (
        (
            config.compile_only and config.validate_only,
            "compile_only",
            "`compile_only` and `validate_only` exclude each other",
            "one of them; compile_only validates too",
        ),
        (
            config.num_steps is not None and config.num_epochs is not None,
            "num_steps",
            "`num_steps` and `num_epochs` exclude each other",
            "one of them",
        ),
        (
            trains and config.max_steps is config.num_steps is config.num_epochs is None,
            "max_steps",
            "nothing says how long to train",
            "one of runconfig.max_steps, runconfig.num_steps, runconfig.num_epochs",
        ),
        (
            config.is_pretrained_checkpoint and config.checkpoint_path is None,
            "is_pretrained_checkpoint",
            "`is_pretrained_checkpoint` is given without a checkpoint",
            "`checkpoint_path` with it",
        ),
        (
            config.cpu and config.device == "cuda",
            "device",
            "`cpu` and `device: cuda` exclude each other",
            "one of them",
        ),
        (
            config.num_stages > 1 and not config.use_cs,
            "num_stages",
            "`num_stages` needs a compiled run",
            "cs_ip with it: --cs_ip local",
        ),
        (
            config.num_stages > 1 and config.execution_mode == "weight_streaming",
            "num_stages",
            "`num_stages` and `execution_mode: weight_streaming` exclude each other",
            "execution_mode: layer_pipelined",
        ),
        (
            config.num_csx > 1 and config.execution_mode == "layer_pipelined",
            "num_csx",
            "`num_csx` and `execution_mode: layer_pipelined` exclude each other",
            "execution_mode: weight_streaming; num_replicas are the copies of a layer pipeline",
        ),
        (
            config.num_csx > 1 and (config.num_stages > 1 or config.num_replicas > 1),
            "num_csx",
            "`num_csx` excludes `num_stages` and `num_replicas`: it is for weight streaming",
            "one of them",
        ),
        (
            config.enable_summaries and config.use_cs,
            "enable_summaries",
            "`enable_summaries` needs the plain CPU or GPU run",
            "no cs_ip, compile_only or validate_only with it",
        ),
    )
    for broken, key, what, allowed in rules:
        if broken:
            report.add(what, where=locate(("runconfig", key)), allowed=allowed)
