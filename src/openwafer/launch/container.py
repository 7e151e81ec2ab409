"""Command lines that run a command in a container.

Decides which program starts an image and how folders are bound. Does not run anything.

The documented line is `singularity exec --bind A,B IMAGE COMMAND` (spec, section 8.5); Apptainer is
the same program under its later name. An image that is a folder is run by Charliecloud's `ch-run`,
which needs no privileges at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from openwafer.errors import LaunchError, nearest

__all__ = ["LEAKS", "Container", "Runtime", "choose_container"]

Runtime = Literal["apptainer", "singularity", "charliecloud"]

LEAKS = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD")
"""Variables of a module environment outside that must not reach an image: they would have it load
another Python's packages and libraries. Unset by whoever starts the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """An image and how it is started.

    binds: `HOST` or `HOST:INSIDE`, folders that the command sees.
    working_dir: where it runs; Singularity and Apptainer stay where they are called, ch-run has to
        be told.
    gpu: make NVIDIA's driver visible (Apptainer and Singularity).
    """

    image: str
    runtime: Runtime
    binds: tuple[str, ...] = ()
    working_dir: str
    gpu: bool = False

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` inside."""
        if self.runtime == "charliecloud":
            # The home folder too, as the others have it: the run's secret is there.
            seen = dict.fromkeys(map(_both_sides, (*self.binds, self.working_dir)))
            binds = [f"--bind={bind}" for bind in seen]
            # What the image's recipe set with ENV.
            own = ["--set-env"] if (Path(self.image) / "ch/environment").is_file() else []
            where = f"--cd={self.working_dir}"
            return ["ch-run", "--home", *own, *binds, where, self.image, "--", *command]
        bind = ["--bind", ",".join(self.binds)] if self.binds else []
        gpu = ["--nv"] if self.gpu else []
        return [self.runtime, "exec", *gpu, *bind, self.image, *command]


def choose_container(
    image: str,
    binds: Sequence[str] = (),
    *,
    runtime: str | None = None,
    gpu: bool = False,
    working_dir: str | None = None,
    which: Callable[[str], str | None] = shutil.which,
) -> Container:
    """A container for `image`.

    Args:
        image: a `.sif` file, or a folder with a file system for Charliecloud.
        binds: `HOST[:INSIDE]`; each may hold several with commas between them.
        runtime: the program; None chooses by the image and by what is installed.
        working_dir: where the command runs; None is the present folder.

    Raises:
        LaunchError: no such image or runtime, or a bind without a folder.
    """
    if runtime is not None and runtime not in get_args(Runtime):
        raise LaunchError(
            f"unknown container runtime {runtime!r}",
            where="--container_runtime",
            allowed=", ".join(get_args(Runtime)),
            hint=nearest(runtime, get_args(Runtime)),
        )
    if not image or image.startswith("-"):
        raise LaunchError("the container image has no name", where="--container")
    split = tuple(part for bind in binds for part in bind.split(",") if part)
    for part in split:
        if not part.split(":")[0]:
            raise LaunchError(f"`{part}` binds no folder", where="--bind", allowed="HOST[:INSIDE]")
    chosen = cast("Runtime", runtime) if runtime else _runtime_for(image, which)
    return Container(
        image=image,
        runtime=chosen,
        binds=split,
        working_dir=working_dir or os.getcwd(),
        gpu=gpu,
    )


def _runtime_for(image: str, which: Callable[[str], str | None]) -> Runtime:
    if Path(image).is_dir():
        return "charliecloud"
    return "apptainer" if which("apptainer") and not which("singularity") else "singularity"


def _both_sides(bind: str) -> str:
    return bind if ":" in bind else f"{bind}:{bind}"
