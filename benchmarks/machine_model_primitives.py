"""Microbenchmarks of WSE-2 from the machine's own numbers: vector loops, collectives, products.

Decides closed forms that use `Machine` alone (nothing is fitted here), for the published kernels
that are no torch models. Cycles are those of the slowest PE.
"""

from __future__ import annotations

from math import ceil, log2, sqrt

from openwafer.machine.spec import Machine

__all__ = [
    "LlamaSize",
    "decode_tokens_per_second",
    "gemv_cycles",
    "local_gemm_cycles",
    "mesh_gemm_cycles",
    "prefill_tokens_per_second",
    "reduce_cycles",
    "stencil_seconds",
]

BANK_CONFLICT = 2
"""Cycles per fp32 element of a fused multiply-add whose operands share a bank (SpMM_Cerebras,
src/fmacs_test: 2.00 before and 1.00 after the fix). Its published GEMM is from before the fix."""


def reduce_cycles(pes: int, words: float, machine: Machine) -> float:
    """A reduction over a row, by the fastest of three patterns (cycle model of arXiv 2404.15888):
    a chain, groups of sqrt(P) in two phases, a tree."""
    hop, step = machine.hop_latency_cycles, 2 * machine.ramp_latency_cycles + 1
    levels = log2(max(2, pes))
    chain = words + (step + hop) * (pes - 1)
    two_phase = max(2 * words, words + pes * hop) + step * (2 * sqrt(pes) - 2)
    spread = words * pes * levels / (2 * max(1, pes - 1)) + (pes - 1) * hop
    tree = max(words * levels, spread) + step * levels
    return min(chain, two_phase, tree)


def broadcast_cycles(pes: int, words: float, machine: Machine) -> float:
    return words + pes * machine.hop_latency_cycles + 2 * machine.ramp_latency_cycles


def vector_cycles(length: float, rate: float, machine: Machine) -> float:
    """One vector instruction on so many elements."""
    return machine.vector_setup_cycles + length / rate


def stencil_seconds(cells: int, blocks: int, steps: int, machine: Machine) -> float:
    """The 25-point stencil of arXiv 2204.03775, a column of cells per PE: 43 vector instructions
    and 17 loads from the fabric per cell, for each block of the column."""
    arithmetic, loads = 43, 17
    rate = machine.vector_ops_per_cycle.float32
    length = cells / blocks
    per_block = arithmetic * vector_cycles(length, rate, machine) + loads * vector_cycles(
        length, machine.link_bytes_per_cycle / 4, machine
    )
    return steps * blocks * per_block / machine.clock_hz


def local_gemm_cycles(rows: int, inner: int, columns: int, machine: Machine) -> float:
    """fp32 on one PE, one strided multiply-add of `rows` elements for each (k, j)."""
    rate = machine.vector_ops_per_cycle.float32 / BANK_CONFLICT
    return inner * columns * vector_cycles(rows, rate, machine)


def gemv_cycles(rows: int, columns: int, side: int, machine: Machine) -> float:
    """[1 x rows] x [rows x columns] in fp16 on side x side PEs: a tile on each, then a reduction
    along the other side (two values a word)."""
    tile_in, tile_out = ceil(rows / side), ceil(columns / side)
    rate = machine.vector_ops_per_cycle.float16
    local = tile_in * vector_cycles(tile_out, rate, machine)
    other = tile_out * vector_cycles(tile_in, rate, machine)
    return min(local, other) + reduce_cycles(side, tile_out / 2, machine)


def mesh_gemm_cycles(m: int, k: int, n: int, side: int, machine: Machine) -> float:
    """[m x k] x [k x n] in fp16 on side x side PEs: `side` steps, each a product of tiles while
    the next ones come in from two hops away (arXiv 2502.04563)."""
    tm, tk, tn = m / side, k / side, n / side
    rate = machine.vector_ops_per_cycle.float16
    # The longest of the tile's extents is the vector.
    short, middle, long = sorted((tm, tk, tn))
    work = short * middle * vector_cycles(long, rate, machine)
    moved = (tm * tk + tk * tn) * 2 / machine.link_bytes_per_cycle
    hops = 2 * machine.hop_latency_cycles + 2 * machine.ramp_latency_cycles
    return side * (max(work, moved) + hops)


class LlamaSize:
    """The products of one transformer layer with grouped keys and values."""

    def __init__(self, layers: int, width: int, ff: int, keys: int) -> None:
        self.layers, self.width, self.ff, self.keys = layers, width, ff, keys

    @property
    def products(self) -> list[tuple[int, int]]:
        w = self.width
        return [(w, w), (w, self.keys), (w, self.keys), (w, w), (w, self.ff), (w, self.ff),
                (self.ff, w)]  # fmt: skip


def prefill_tokens_per_second(size: LlamaSize, tokens: int, side: int, machine: Machine) -> float:
    """All products of all layers, scores and their product with the values too."""
    layer = sum(mesh_gemm_cycles(tokens, k, n, side, machine) for k, n in size.products)
    layer += mesh_gemm_cycles(tokens, size.width, tokens, side, machine)
    layer += mesh_gemm_cycles(tokens, tokens, size.width, side, machine)
    return tokens / (size.layers * layer / machine.clock_hz)


def decode_tokens_per_second(size: LlamaSize, side: int, machine: Machine) -> float:
    """One token: products with a vector, each reduced and sent on along a side; two more for the
    scores and the values of a context of 4,096."""
    layer = 0.0
    for k, n in [*size.products, (size.width, 4096), (4096, size.width)]:
        layer += gemv_cycles(k, n, side, machine)
        layer += broadcast_cycles(side, ceil(n / side) / 2, machine)
    return machine.clock_hz / (size.layers * layer)
