"""The published numbers that the machine model is compared with.

Decides the rows: what was published, by whom, for which network and setting, and how the same
number is read from a plan. Rows that cannot be used are listed with the reason. Does not decide how
they are run or printed (machine_model.py).

The identifiers O01 ... O18 are those of the open validation set; the other rows are from the same
compile reports and tables. Unit `[est]`: estimated by the vendor's compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.machine_model_networks import (
    Classifier,
    DecoderLm,
    EncoderDecoder,
    Mlp,
    Network,
    Unet,
    decoder_batch,
    encoder_batch,
    image_batch,
    mlp_batch,
    translation_batch,
)
from benchmarks.machine_model_primitives import (
    LlamaSize,
    decode_tokens_per_second,
    gemv_cycles,
    local_gemm_cycles,
    prefill_tokens_per_second,
    stencil_seconds,
)
from openwafer import zoo
from openwafer.machine.spec import Machine
from openwafer.plan.plan import Plan

__all__ = ["KERNEL_ROWS", "NOT_USABLE", "PLAN_ROWS", "STREAMING_ROWS", "KernelResult", "PlanRow"]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One network planned once, and the published numbers that its plan is compared with.

    readings: (identifier, what, published, unit, how to read it from the plan).
    batch: samples of a step; systems: that share it (weight streaming).
    """

    name: str
    build: Callable[[], Network]
    machine: str
    mode: str
    source: str
    readings: tuple[tuple[str, str, float, str, Callable[[Plan], float]], ...]
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class KernelResult:
    """A microbenchmark: no plan, the machine's numbers alone."""

    row: str
    what: str
    published: float
    unit: str
    source: str
    predict: Callable[[Machine], float]


def _meta(kind: Callable[..., torch.nn.Module], *sizes: int, **more: object) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(*sizes, **more).to(torch.bfloat16)


def _rate(plan: Plan) -> float:
    return plan.predicted.samples_per_second


def _batch_rate(plan: Plan) -> float:
    return plan.predicted.batch_samples_per_second


def _transmission(plan: Plan) -> float:
    return plan.predicted.transmission_samples_per_second


def _compute(plan: Plan) -> float:
    return plan.predicted.compute_samples_per_second


def _pes(plan: Plan) -> float:
    return plan.fabric.active_pes


def _percent(plan: Plan) -> float:
    return 100 * plan.fabric.active_fraction


def _delta_t(plan: Plan) -> float:
    return plan.predicted.delta_t_cycles


def _group(names: tuple[str, ...], plan: Plan) -> float:
    """PEs of all kernels of some families, with their transport."""
    return sum(
        row.pes + row.transport_pes
        for row in plan.fabric.kernels
        if row.name.rstrip("0123456789") in names
    )


def _attention_pes(plan: Plan) -> float:
    """Of attention with its projections, as the reports group it."""
    return sum(
        row.pes + row.transport_pes
        for row in plan.fabric.kernels
        if row.group.endswith((".attention", ".cross")) and row.name.startswith(("fc", "attention"))
    )


def _feed_forward_pes(plan: Plan) -> float:
    return sum(
        row.pes + row.transport_pes
        for row in plan.fabric.kernels
        if row.group.endswith(".feed_forward") and row.name.startswith("fc")
    )


def _head_pes(plan: Plan) -> float:
    """The token embedding and the logits, which share a weight: the first table and the last
    product."""
    logits = [row for row in plan.fabric.kernels if row.name.startswith("fc")][-1]
    table = next(row for row in plan.fabric.kernels if row.name == "embedding0")
    return logits.pes + logits.transport_pes + table.pes


_LP = "layer_pipelined"
_WS = "weight_streaming"
_FLOOR = "wse2_r16_floor"
_SWEEP = "DABench-LLM experiment_transformer.numbers"


def _translation(layers: int, width: int, key: int, ff: int) -> Network:
    net = _meta(EncoderDecoder, layers, width, 2, key, ff)
    return net, translation_batch(4, 256)


def _sweep(
    layers: int, rate: float, pes: float | None, *, width: int = 256, key: int = 128,
    ff: int = 1024, row: str = "", pes_row: str = "", slow: bool = False,
) -> PlanRow:  # fmt: skip
    what = f"Transformer {layers}+{layers} d{width} ff{ff}"
    readings = [(row, f"{what}: rate", rate, "samples/s [est]", _rate)]
    if pes is not None:
        readings.append((pes_row, f"{what}: active PEs", pes, "PEs [est]", _pes))
    return PlanRow(
        name=what, build=partial(_translation, layers, width, key, ff), machine=_FLOOR, mode=_LP,
        source=_SWEEP, readings=tuple(readings), slow=slow,
    )  # fmt: skip


def _gpt(layers: int, width: int, heads: int, length: int, samples: int) -> Network:
    net = _meta(DecoderLm, layers, width, heads, positions=length)
    return net, decoder_batch(samples, length)


def _gptj(samples: int) -> Network:
    net = _meta(DecoderLm, 28, 4096, 16, vocab=50400, tied=False)
    return net, decoder_batch(samples, 2048)


def _bert(layers: int, width: int, heads: int, samples: int) -> Network:
    return _meta(Classifier, layers, width, heads), encoder_batch(samples, 128)


def _pretraining(samples: int) -> Network:
    """The zoo's own: with next sentence, pooler and all dropouts."""
    with torch.device("meta"):
        model = zoo.build("bert/large_msl128").to(torch.bfloat16)
        return model, model.example_batch(samples)


def _mnist(samples: int) -> Network:
    with torch.device("meta"):
        return Mlp(784, 500, 300, 10).half(), mlp_batch(samples)


def _small_mnist(samples: int) -> Network:
    with torch.device("meta"):
        return Mlp(784, 128, 128, 128, 10).half(), mlp_batch(samples)


def _unet(samples: int) -> Network:
    with torch.device("meta"):
        return Unet((32, 64, 128, 256), (128, 64, 32), 1).half(), image_batch(samples)


_GPT2 = "DABench-LLM gpt2_compile_report.txt"
PLAN_ROWS: tuple[PlanRow, ...] = (
    PlanRow(
        name="GPT-2 small", build=partial(_gpt, 12, 768, 12, 1024, 4), machine=_FLOOR, mode=_LP,
        source=_GPT2,
        readings=(
            ("O01", "GPT-2 small MSL 1024: rate", 860.3, "samples/s [est]", _rate),
            ("O02", "GPT-2 small MSL 1024: active PEs", 282358, "PEs [est]", _pes),
            ("", "GPT-2 small: transmission rate", 861.1, "samples/s [est]", _transmission),
            ("", "GPT-2 small: 12 attention", 106966, "PEs [est]", _attention_pes),
            ("", "GPT-2 small: 24 fc", 85514, "PEs [est]", _feed_forward_pes),
            ("", "GPT-2 small: emb_fc", 65604, "PEs [est]", _head_pes),
            ("", "GPT-2 small: 12 nlin", 13028, "PEs [est]", partial(_group, ("nlin",))),
            ("", "GPT-2 small: mlm_loss", 6318, "PEs [est]", partial(_group, ("loss",))),
        ),
    ),
    _sweep(1, 5897, 0.05 * 307840, width=16, key=8, ff=64),
    _sweep(1, 5897, 0.05 * 307840, width=32, key=16, ff=64),
    _sweep(1, 5897, 54610),
    _sweep(6, 5887.1, 115259, pes_row="O03"),
    _sweep(18, 5897.5, 243009, slow=True),
    _sweep(24, 5237, 278135, row="O04"),
    _sweep(30, 4560, 280548, slow=True),
    _sweep(42, 2026, 276626, slow=True),
    _sweep(48, 1357, 277186, slow=True),
    _sweep(54, 930, 279290, slow=True),
    _sweep(60, 636, 273857, slow=True),
    _sweep(72, 287, 270924, slow=True),
    _sweep(1, 5897, 101875, width=512, key=256, ff=1024),
    _sweep(6, 5893, 225091, width=512, key=256, ff=1024),
    _sweep(1, 5897, 0.35 * 307840, width=512, key=256, ff=2048),
    _sweep(1, 5887, 238709, width=1024, key=512, ff=4096),
    PlanRow(
        name="fc_mnist", build=partial(_mnist, 256), machine="wse2", mode=_LP,
        source="PSC compilation-key-metrics.md",
        readings=(("O05", "fc_mnist: delta-t", 464, "cycles/sample [est]", _delta_t),),
    ),
    PlanRow(
        name="U-Net Severstal", build=partial(_unet, 4), machine="wse2", mode=_LP,
        source="ALCF Performance-Tools.md",
        readings=(
            ("", "U-Net: rate", 14724.2, "samples/s [est]", _rate),
            ("", "U-Net: compute rate", 17287.7, "samples/s [est]", _compute),
            ("", "U-Net: active PEs", 62, "% [est]", _percent),
        ),
    ),
    PlanRow(
        name="BERT-large pipelined", build=partial(_pretraining, 1024), machine="wse2", mode=_LP,
        source="ALCF caef19e8 (R1.7.1)",
        readings=(
            ("", "BERT-large MSL 128 batch 1024, pipelined", 7022.97, "samples/s", _batch_rate),
            ("", "the same, R1.8.0 (ba547969)", 6493.27, "samples/s", _batch_rate),
        ),
    ),
)  # fmt: skip

_USC = "arXiv 2409.00287"
STREAMING_ROWS: tuple[
    tuple[str, Callable[[int], Network], str, tuple[tuple[str, str, int, int, float, str], ...]],
    ...,
] = (
    ("BERT-base MSL 128", partial(_bert, 12, 768, 12), "wse2", (
        ("", "batch 128", 128, 1, 2267.7, _USC),
        ("O06", "batch 512", 512, 1, 7804.2, _USC),
        ("", "batch 1024", 1024, 1, 12335.2, _USC),
    )),
    ("BERT-large MSL 128", partial(_bert, 24, 1024, 16), "wse2", (
        ("", "batch 128", 128, 1, 1040.5, _USC),
        ("O07", "batch 512", 512, 1, 3263.1, _USC),
        ("", "batch 1024", 1024, 1, 5311.5, _USC),
        ("", "batch 512, 6 lanes", 512, 1, 2937.77, "GH#25320092558"),
        ("", "batch 1024, R2.0.3", 1024, 1, 4047.95, "ALCF 2ab3325d"),
    )),
    ("GPT-3 256M MSL 2048", partial(_gpt, 14, 1088, 17, 2048), "wse2", (
        ("O08", "batch 128", 128, 1, 373.4, _USC), ("O08", "batch 256", 256, 1, 373.4, _USC),
    )),
    ("GPT-3 590M MSL 2048", partial(_gpt, 18, 1536, 12, 2048), "wse2", (
        ("", "batch 128", 128, 1, 199.4, _USC), ("", "batch 256", 256, 1, 202.1, _USC),
    )),
    ("GPT-3 2.7B MSL 2048", partial(_gpt, 32, 2560, 32, 2048), "wse2", (
        ("", "batch 128", 128, 1, 46.6, _USC), ("O09", "batch 256", 256, 1, 46.8, _USC),
    )),
    ("GPT-3 13B MSL 2048", partial(_gpt, 40, 5120, 40, 2048), "wse2", (
        ("", "batch 128", 128, 1, 11.86, _USC), ("O10", "batch 256", 256, 1, 11.87, _USC),
    )),
    ("GPT-J 6B MSL 2048", _gptj, "wse2", (
        ("O11", "batch 120, 2 systems, R2.0.3", 120, 2, 43.67, "ALCF a8a674de"),
        ("", "batch 64, 2 systems, R2.3.0", 64, 2, 46.24, "DABench-LLM new_llm"),
    )),
    ("GPT-J 6B MSL 2048", _gptj, "wse2_r1", (
        ("", "batch 66, R1.9.2", 66, 1, 19.80, "GH#116135000"),
        ("", "batch 130, 2 systems, R1.8.0", 130, 2, 34.0, "ALCF ba547969"),
        ("", "batch 130, 2 systems, R1.7.1", 130, 2, 27.53, "ALCF fc13f4ce"),
    )),
    ("GPT-2 small MSL 2048", partial(_gpt, 12, 768, 12, 2048), "wse2", (
        ("O12", "batch 112 bf16, R2.3.0", 112, 1, 516.44, "DABench-LLM gpt2_train_bf16.log"),
        ("", "batch 112 fp16, R2.3.0", 112, 1, 518.92, "DABench-LLM gpt2_train_f16.log"),
        ("", "batch 112, earlier R2.x", 112, 1, 494.5, "GH#211705211"),
    )),
    ("fc_mnist", _small_mnist, "wse2", (
        ("", "batch 64, median of six runs (266 to 3,956)", 64, 1, 3838.0,
         "DABench-LLM mytest*.log, res_withmixed.csv"),
    )),
)  # fmt: skip

_LLAMA = {
    "LLaMA3-8B": LlamaSize(32, 4096, 14336, 1024),
    "LLaMA2-13B": LlamaSize(40, 5120, 13824, 5120),
    "CodeLLaMA-34B": LlamaSize(48, 8192, 22016, 1024),
    "QWen2-72B": LlamaSize(80, 8192, 29568, 1024),
}
_WLLM = "arXiv 2502.04563"
_STENCIL = "arXiv 2204.03775"


def _stencil(row: str, cells: int, blocks: int, steps: int, seconds: float) -> KernelResult:
    return KernelResult(
        row=row, what=f"25-point stencil fp32, {cells} cells in {blocks} blocks, {steps:,} steps",
        published=seconds, unit="s", source=_STENCIL,
        predict=partial(stencil_seconds, cells, blocks, steps),
    )  # fmt: skip


def _llama(row: str, name: str, phase: str, side: int, rate: float) -> KernelResult:
    size = _LLAMA[name]
    predict = (
        partial(prefill_tokens_per_second, size, 4096, side)
        if phase == "prefill"
        else partial(decode_tokens_per_second, size, side)
    )
    return KernelResult(
        row=row, what=f"{name} {phase} on {side} x {side}", published=rate, unit="tokens/s",
        source=_WLLM, predict=predict,
    )  # fmt: skip


def _gemv_ms(machine: Machine) -> float:
    return gemv_cycles(16384, 16384, machine.fabric_cols, machine) / machine.clock_hz * 1e3


KERNEL_ROWS: tuple[KernelResult, ...] = (
    _stencil("O13", 1000, 1, 1000, 0.0761),
    _stencil("O14", 100, 1, 100_000, 0.8637),
    _stencil("", 200, 1, 100_000, 1.6133),
    _stencil("", 300, 1, 100_000, 2.3716),
    _stencil("", 400, 1, 100_000, 3.1223),
    _stencil("", 700, 2, 100_000, 5.3143),
    _stencil("", 1000, 3, 100_000, 7.5524),
    KernelResult(row="O15", what="MeshGEMV fp16 16K x 16K", published=0.0012, unit="ms",
                 source=_WLLM, predict=_gemv_ms),
    _llama("O16", "LLaMA3-8B", "prefill", 480, 20320.6),
    _llama("", "LLaMA3-8B", "prefill", 600, 25037.2),
    _llama("", "LLaMA2-13B", "prefill", 480, 13685.1),
    _llama("", "LLaMA2-13B", "prefill", 600, 16854.2),
    _llama("", "LLaMA2-13B", "prefill", 720, 17498.3),
    _llama("O17", "LLaMA3-8B", "decode", 420, 2699.9),
    _llama("", "LLaMA3-8B", "decode", 540, 2501.5),
    _llama("", "LLaMA3-8B", "decode", 660, 2243.3),
    _llama("", "LLaMA2-13B", "decode", 420, 2039.2),
    _llama("", "LLaMA2-13B", "decode", 660, 1739.8),
    _llama("", "CodeLLaMA-34B", "prefill", 480, 5471.4),
    _llama("", "CodeLLaMA-34B", "prefill", 600, 7540.1),
    _llama("", "CodeLLaMA-34B", "prefill", 720, 8526.0),
    _llama("", "QWen2-72B", "prefill", 480, 2785.2),
    _llama("", "QWen2-72B", "prefill", 600, 3775.5),
    _llama("", "QWen2-72B", "prefill", 720, 4421.6),
    _llama("", "CodeLLaMA-34B", "decode", 420, 1450.8),
    _llama("", "CodeLLaMA-34B", "decode", 540, 1407.7),
    _llama("", "CodeLLaMA-34B", "decode", 660, 1359.2),
    _llama("", "QWen2-72B", "decode", 420, 839.7),
    _llama("", "QWen2-72B", "decode", 540, 824.3),
    _llama("", "QWen2-72B", "decode", 660, 787.1),
    KernelResult(
        row="O18", what="local GEMM fp32 on one PE, 64 x 48 x 64", published=476866,
        unit="cycles [ns]", source="SpMM_Cerebras GEMM_benchmark.csv",
        predict=partial(local_gemm_cycles, 64, 48, 64),
    ),
)  # fmt: skip

NOT_USABLE: tuple[tuple[str, str], ...] = (
    ("fc_mnist pipelined on hardware (120,163 to 588,906 samples/s)",
     "bound by the hosts that feed it: sites differ by 4.9 times for one model"),
    ("BERT-large batch 1024 at 1,112.94 samples/s", "starved by its input, says the source"),
    ("ESM-2 35M, DiT-2B", "sequence length or image size is not stated"),
    ("fc_mnist 3,040 PEs, delta-t 674, 43,264", "other compiles, whose layers are not stated"),
    ("collectives of SpMM_Cerebras", "simulator runs of code whose group steps are not labelled"),
    ("sparse formats COO, CSC, CSR, ELLPACK", "no kernel here is sparse"),
    ("3D FFT, BiCGStab, molecular dynamics, TLR-MVM", "programs that no torch model states"),
    ("WSE-3 and CS-3 rows", "another machine"),
    ("Graph network compile of R2.6", "another machine and mode"),
)  # fmt: skip
