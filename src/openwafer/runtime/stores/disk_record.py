"""What is where in the weight store's file, and in which pieces an update walks through it.

Decides the layout: for each shard, regions one after another (the weights, their 16-bit copies, one
for each part of the optimizer's state, gradients that wait), and in each region a place for each
weight that direct I/O can reach by itself. Decides how an update is cut into chunks, so that memory
holds a chunk and not a layer. Does not read or write anything (disk_store.py).

Numbers that are one per weight (a step count) are no part of the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from openwafer.config.hyperparameters import OptimizerType
from openwafer.config.optimizer import OptimizerConfig
from openwafer.graph.program import TensorSpec
from openwafer.optim.build import build_optimizer
from openwafer.runtime.stores.direct_file import aligned
from openwafer.runtime.stores.store import Copies, Shard

__all__ = [
    "GRADIENT",
    "WEIGHT",
    "Chunk",
    "Entry",
    "Piece",
    "Record",
    "copy_region",
    "is_copy",
    "lay_out",
    "splits",
]

WEIGHT, GRADIENT = "", "gradient"
"""Names of regions; state has the optimizer's own keys, copies have `copy_region`'s."""

_COPY = "copy in "

_WHOLE_ONLY: Collection[OptimizerType] = ("adafactor", "lamb")
"""Optimizers that take a norm or a mean over a whole weight; all others go element by element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor in the file: where it begins, and what it is."""

    offset: int
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of the weight at `position` in its shard."""

    position: int
    start: int
    stop: int


Chunk = tuple[Piece, ...]
"""Pieces that are read, updated and written together; neighbours in every region."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One shard in the file.

    regions: name → entry by position; empty tensors and single numbers have none.
    state_keys: what the optimizer keeps for a weight, in tensors (by position).
    chunks: of the trained weights. rest: one chunk for each of the others.
    """

    shard: Shard
    regions: Mapping[str, Mapping[int, Entry]]
    state_keys: Mapping[int, tuple[str, ...]]
    chunks: tuple[Chunk, ...]
    rest: tuple[Chunk, ...]

    def span(self, region: str, chunk: Chunk) -> tuple[int, int]:
        """(offset, bytes) of a chunk in a region, as direct I/O takes them; (0, 0) for nothing."""
        ranges = [r for piece in chunk if (r := self.place(region, piece)) is not None]
        if not ranges:
            return 0, 0
        start = ranges[0][0]
        return start, aligned(ranges[-1][1] - start)

    def place(self, region: str, piece: Piece) -> tuple[int, int] | None:
        """Where a piece begins and ends in the file; None where the region has no part of it."""
        entry = self.regions[region].get(piece.position)
        if entry is None:
            return None
        weight = self.regions[WEIGHT][piece.position].spec
        if entry.spec.numel != weight.numel:  # of a weight that is never cut
            return entry.offset, entry.offset + entry.spec.num_bytes
        size = entry.spec.torch_dtype.itemsize
        return entry.offset + piece.start * size, entry.offset + piece.stop * size

    def shape(self, region: str, piece: Piece) -> tuple[int, ...]:
        """A whole weight keeps its shape; a part of one is flat."""
        entry = self.regions[region][piece.position]
        weight = self.regions[WEIGHT][piece.position].spec
        whole = piece.stop - piece.start == weight.numel
        return entry.spec.shape if whole else (piece.stop - piece.start,)


def copy_region(dtype: torch.dtype) -> str:
    return f"{_COPY}{str(dtype).removeprefix('torch.')}"


def is_copy(region: str) -> bool:
    """Whether a region has copies of weights in another dtype."""
    return region.startswith(_COPY)


def splits(config: OptimizerConfig | None) -> bool:
    """Whether a weight may be updated in parts with the same result."""
    return config is not None and config.optimizer_type not in _WHOLE_ONLY


def lay_out(
    shard: Shard,
    weights: Mapping[str, torch.Tensor],
    copies: Copies,
    config: OptimizerConfig | None,
    *,
    first_byte: int,
    chunk_elements: int,
) -> tuple[Record, int]:
    """A shard's record from `first_byte` on, and where it ends. Trained weights come first."""
    trained = shard.trained if config is not None else ()
    order = [*trained, *(name for name in shard.names if name not in set(trained))]
    specs = {shard.names.index(name): TensorSpec.of(weights[name]) for name in order}
    state = _state_specs(shard, trained, weights, config)
    wanted: dict[str, dict[int, TensorSpec]] = {WEIGHT: specs}
    for position, own in specs.items():
        for dtype in copies.get(shard.names[position], ()):
            spec = TensorSpec(own.shape, str(dtype).removeprefix("torch."))
            wanted.setdefault(copy_region(dtype), {})[position] = spec
    for position, entries in state.items():
        for key, spec in entries.items():
            wanted.setdefault(key, {})[position] = spec
    if trained:
        wanted[GRADIENT] = {position: specs[position] for position in state}
    regions: dict[str, dict[int, Entry]] = {}
    end = first_byte
    for region, tensors in wanted.items():
        regions[region] = {}
        for position, spec in tensors.items():
            regions[region][position] = Entry(offset=end, spec=spec)
            end += aligned(spec.num_bytes)
    at_most = chunk_elements if splits(config) else 0
    record = Record(
        shard=shard,
        regions=regions,
        state_keys={position: tuple(entries) for position, entries in state.items()},
        chunks=tuple(_chunks([(p, specs[p].numel) for p in state], at_most, chunk_elements)),
        rest=tuple((Piece(p, 0, spec.numel),) for p, spec in specs.items() if p not in state),
    )
    return record, end


def _state_specs(
    shard: Shard,
    trained: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    config: OptimizerConfig | None,
) -> dict[int, dict[str, TensorSpec]]:
    """The tensors that the optimizer keeps for each trained weight, found without any memory."""
    if config is None or not trained:
        return {}
    outlines = {name: torch.empty_like(weights[name], device="meta") for name in trained}
    optimizer = build_optimizer(config, outlines)
    return {
        shard.names.index(name): {
            key: TensorSpec.of(value)
            for key, value in optimizer.state[outline].items()
            if isinstance(value, torch.Tensor) and value.dim()
        }
        for name, outline in outlines.items()
    }


def _chunks(
    sizes: Sequence[tuple[int, int]], piece_elements: int, chunk_elements: int
) -> Iterator[Chunk]:
    """Weights (position, elements), cut and gathered into chunks of about `chunk_elements`.

    `piece_elements`: the longest piece; 0 cuts no weight.
    """
    chunk: list[Piece] = []
    held = 0
    longest = aligned(piece_elements)  # as many elements as bytes: whole blocks in every dtype
    for position, numel in sizes:
        step = longest or max(numel, 1)
        for start in range(0, max(numel, 1), step):
            stop = min(start + step, numel)
            if chunk and held + stop - start > chunk_elements:
                yield tuple(chunk)
                chunk, held = [], 0
            chunk.append(Piece(position, start, stop))
            held += stop - start
    if chunk:
        yield tuple(chunk)
