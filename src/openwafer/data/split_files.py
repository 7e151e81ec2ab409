"""Labelled examples in files of a customary name: which files of a folder are a split.

Decides how names tell splits apart, and what a task learns of its training files (labels and
vocabulary come from them, whatever split is read). Does not decide what a file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from openwafer.data.params import Split
from openwafer.errors import DataError

__all__ = ["Examples", "SplitFiles", "read_examples"]

E = TypeVar("E")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFiles:
    """The names of files.

    stems: of each split, in the order of reading; `dev*` stands for every name that begins so.
    endings: each stem may have each of them.
    """

    stems: Mapping[Split, tuple[str, ...]]
    endings: tuple[str, ...]

    def find(self, paths: Sequence[Path], split: Split) -> list[Path]:
        """The files of a split in these folders; a path that is a file belongs to every split.

        Raises:
            DataError: there is none.
        """
        found: list[Path] = []
        for path in paths:
            if not path.is_dir():
                found.append(path)
                continue
            for stem in self.stems[split]:
                for ending in self.endings:
                    found += sorted(f for f in path.glob(stem + ending) if f.is_file())
        if not found:
            raise DataError(
                f"there is no file of the {split} split",
                where=", ".join(map(str, paths)),
                allowed=self._allowed(split),
            )
        return found

    def _allowed(self, split: Split) -> str:
        stems = self.stems[split]
        if len(self.endings) == 1:
            return " or ".join(stem + self.endings[0] for stem in stems)
        return f"{' or '.join(stems)} with {' or '.join(self.endings)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples(Generic[E]):
    """What a section reads.

    examples: of the section's split.
    training: of the training split.
    origin: where they are from, for people.
    key: changes whenever the training examples do.
    """

    examples: Sequence[E]
    training: Sequence[E]
    origin: str
    key: object


def read_examples(
    paths: Sequence[Path], split: Split, files: SplitFiles, read: Callable[[Path], Sequence[E]]
) -> Examples[E]:
    """Read a split, and the training split, from files and folders.

    Raises:
        DataError: there are no files of one of the two, or `read` refuses one.
    """

    def of(split: Split) -> list[E]:
        return [example for path in files.find(paths, split) for example in read(path)]

    examples = of(split)
    return Examples(
        examples=examples,
        training=examples if split == "train" else of("train"),
        origin=", ".join(map(str, paths)),
        key=[(str(path), path.stat().st_mtime_ns) for path in files.find(paths, "train")],
    )
