"""Where a training run stands, and where it ends.

Decides how `max_steps`, `num_steps`, `num_epochs` and `steps_per_epoch` become one end point, and
how far into the data a run is. Does not decide what happens at a step (loop.py).

Rules:
    * The global step counts optimizer steps. One step takes `grad_accum_steps` batches.
    * `max_steps` is absolute. `num_steps` and `num_epochs` count from the origin: step 0, or the
      checkpoint named by `--checkpoint_path`. The origin is kept in every checkpoint, so that the
      same command after a crash ends where the undisturbed run would have.
    * Every step takes the same number of batches. What is left over at the end of an epoch is not
      used, as with `drop_last` of a DataLoader: a smaller last group would weigh its samples more
      than the others, and a compiled plan is for one number of microbatches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from openwafer.config.runconfig import RunConfig
from openwafer.errors import ConfigError, DataError

__all__ = ["Budget", "Progress", "training_budget"]

_log = logging.getLogger("openwafer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A place between two optimizer steps.

    global_step: optimizer steps done. epoch, batch: the batch to be read next; `batch` may be the
    length of the epoch, which is then over. origin_step, origin_epoch: see the module header.
    """

    global_step: int = 0
    epoch: int = 0
    batch: int = 0
    origin_step: int = 0
    origin_epoch: int = 0

    def after_step(self, num_batches: int) -> Progress:
        return replace(self, global_step=self.global_step + 1, batch=self.batch + num_batches)

    def next_epoch(self) -> Progress:
        return replace(self, epoch=self.epoch + 1, batch=0)

    def as_origin(self) -> Progress:
        """The same place, from which `num_steps` and `num_epochs` count anew."""
        return replace(self, origin_step=self.global_step, origin_epoch=self.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The end of a run. `batches_per_epoch` is None where an epoch ends only with its data."""

    last_step: int | None
    last_epoch: int | None
    batches_per_epoch: int | None
    batches_per_step: int

    def epoch_over(self, progress: Progress) -> bool:
        """True where the epoch has no room for one more whole step."""
        limit = self.batches_per_epoch
        return limit is not None and progress.batch + self.batches_per_step > limit

    def over(self, progress: Progress) -> bool:
        """True where no further step is to be done."""
        if self.last_step is not None and progress.global_step >= self.last_step:
            return True
        if self.last_epoch is None:
            return False
        epoch = progress.epoch + (1 if self.epoch_over(progress) else 0)
        return epoch >= self.last_epoch

    def final_step(self, progress: Progress) -> int | None:
        """The global step at which a run that stands at `progress` will end."""
        ends = [] if self.last_step is None else [self.last_step]
        if self.last_epoch is not None and self.batches_per_epoch is not None:
            per_epoch = self.batches_per_epoch // self.batches_per_step
            left = max(0, self.batches_per_epoch - progress.batch) // self.batches_per_step
            whole_epochs = self.last_epoch - progress.epoch - 1
            if whole_epochs >= 0:
                ends.append(progress.global_step + left + whole_epochs * per_epoch)
        return min(ends, default=None)


def training_budget(
    run: RunConfig,
    *,
    num_batches: int | None,
    grad_accum_steps: int,
    start: Progress,
    quiet: bool = False,
) -> Budget:
    """The end of training for `run`, on a source of `num_batches` per epoch (None: not known).

    `quiet` leaves out the note on batches that are not used.

    Raises:
        ConfigError: no end is given, two that exclude each other, or epochs of unknown length.
        DataError: an epoch holds too few batches for one step.
    """
    if run.num_steps is not None and run.num_epochs is not None:
        raise ConfigError(
            "`num_steps` and `num_epochs` exclude each other", where="runconfig", hint="drop one"
        )
    if run.max_steps is None and run.num_steps is None and run.num_epochs is None:
        raise ConfigError(
            "nothing says when training ends",
            where="runconfig",
            allowed="`max_steps`, `num_steps` or `num_epochs`",
            hint="add `max_steps: 1000` to `runconfig`",
        )
    if run.num_epochs is not None and num_batches is None and run.steps_per_epoch is None:
        raise ConfigError(
            "`num_epochs` is given, and the data loader has no length",
            where="runconfig.num_epochs",
            allowed="a loader with `__len__`, or `steps_per_epoch`",
            hint="set `steps_per_epoch`, or use `max_steps`",
        )
    ends = [run.max_steps, None if run.num_steps is None else start.origin_step + run.num_steps]
    return Budget(
        last_step=min((end for end in ends if end is not None), default=None),
        last_epoch=None if run.num_epochs is None else start.origin_epoch + run.num_epochs,
        batches_per_epoch=_batches_per_epoch(run, num_batches, grad_accum_steps, quiet=quiet),
        batches_per_step=grad_accum_steps,
    )


def _batches_per_epoch(
    run: RunConfig, num_batches: int | None, grad_accum_steps: int, *, quiet: bool
) -> int | None:
    cap = None if run.steps_per_epoch is None else run.steps_per_epoch * grad_accum_steps
    if num_batches is None:
        return cap
    usable = num_batches - num_batches % grad_accum_steps
    if usable == 0:
        raise DataError(
            f"an epoch has {num_batches} batches, one step needs {grad_accum_steps}",
            where="train_input",
            allowed="at least `grad_accum_steps` batches per epoch",
            hint="lower `optimizer.grad_accum_steps` or the batch size",
        )
    if not quiet and usable < num_batches and (cap is None or cap > usable):
        _log.info(
            "the last %d of the %d batches of each epoch are not used: a step takes %d",
            num_batches - usable,
            num_batches,
            grad_accum_steps,
        )
    return usable if cap is None else min(cap, usable)
