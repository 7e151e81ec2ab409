"""What all TFRecord processors do: files, workers, order, batches.

Decides the tf.data pipeline: the files in a new order for each epoch, dealt out to the workers,
read several at a time, records shuffled, batched, parsed a batch at a time, prefetched. Does not
decide what is in a record (data/tfrecord_layouts.py) nor what a model is given (documented.py).

Source of names and defaults: sections 2.1 and 8.3 of the fact sheet.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from openwafer.data.params import Split
from openwafer.data.tfrecord_files import record_files
from openwafer.data.tfrecord_layouts import LAYOUTS, RecordLayout
from openwafer.errors import ConfigError, DataError
from openwafer.frontends.tf.library import tf

__all__ = ["TfRecordsProcessor", "shard_dataset"]


class TfRecordsProcessor(ABC):
    """Args:
    params: an input section. `data_dir` (a path or a list of them), `batch_size` (or
        `train_batch_size`, `eval_batch_size`), `shuffle` (True), `shuffle_seed`,
        `shuffle_buffer` (10 batches), `repeat` (True; evaluation reads everything once),
        `use_multiple_workers` (False), `n_parallel_reads` (4), `skip_steps` (0), `mixed_precision`
        (False: masks and weights are float16 with it), and what the records need:
        `max_sequence_length`, `max_predictions_per_seq`, `max_cls_tokens`, `image_shape`.
    split: names the section in messages.

    Raises:
        ConfigError: a key is missing or wrong.
    """

    LAYOUT: ClassVar[str]
    """The name in `LAYOUTS`; a class of the same name reads it."""
    PATH_KEYS: ClassVar[tuple[str, ...]] = ("data_dir",)

    def __init__(self, params: Mapping[str, Any], split: Split = "train") -> None:
        self.params = params
        self.split: Split = split
        of_split = "train_batch_size" if split == "train" else "eval_batch_size"
        name = of_split if params.get(of_split) is not None else "batch_size"
        self.batch_size = self.integer(name)
        self.sizes = self.layout.sizes(self._size)
        self.float_type = tf.float16 if params.get("mixed_precision") else tf.float32

    @property
    def layout(self) -> RecordLayout:
        return LAYOUTS[self.LAYOUT]

    def create_tf_dataset(self, is_training: bool | None = None, input_context: Any = None) -> Any:
        """Batches of (features, labels).

        Args:
            is_training: in a new order each epoch and, with `repeat`, without an end; None: where
                the split is that of training.
            input_context: tf.distribute.InputContext, where TensorFlow deals out the input.

        Raises:
            ConfigError: there are fewer files than workers to share them.
            DataError: there are no files, or they do not hold one batch.
        """
        if is_training is None:
            is_training = self.split == "train"
        shuffle = bool(self.params.get("shuffle", True)) and is_training
        repeat = bool(self.params.get("repeat", True)) and is_training
        seed = self.params.get("shuffle_seed")
        names = [str(path) for path in self._files()]
        dataset = tf.data.Dataset.from_tensor_slices(names)
        shared = bool(self.params.get("use_multiple_workers", False))
        dataset = shard_dataset(dataset, shared, input_context, num_files=len(names))
        if shuffle:
            dataset = dataset.shuffle(len(names), seed=seed)
        dataset = dataset.interleave(
            tf.data.TFRecordDataset,
            cycle_length=self.integer("n_parallel_reads", 4),
            num_parallel_calls=tf.data.AUTOTUNE,
            # Without a seed nobody can expect one order.
            deterministic=not shuffle or seed is not None,
        )
        if shuffle:
            buffer = self.integer("shuffle_buffer", 10 * self.batch_size)
            dataset = dataset.shuffle(buffer, seed=seed)
        if repeat:
            dataset = dataset.repeat()
        dataset = self.parsed(dataset)
        skip_steps = self.integer("skip_steps", 0, minimum=0)
        if skip_steps:
            dataset = dataset.skip(skip_steps)
        return dataset.prefetch(tf.data.AUTOTUNE)

    def parsed(self, dataset: Any) -> Any:
        """Batches of (features, labels), from a dataset of records."""
        batches = dataset.batch(self.batch_size, drop_remainder=True)
        return batches.map(self.parse, num_parallel_calls=tf.data.AUTOTUNE)

    def parse(self, records: Any) -> Any:
        """(features, labels), from the records of a batch, [batch] texts."""
        wanted = {
            field.name: tf.io.FixedLenFeature([self.sizes[field.name]], tf.as_dtype(field.dtype))
            for field in self.layout.fields
        }
        return self.features_and_labels(tf.io.parse_example(records, wanted))

    @abstractmethod
    def features_and_labels(self, example: dict[str, Any]) -> Any:
        """What the model is given, from a batch of the layout's features."""

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A number of the section.

        Raises:
            ConfigError: it is missing, or not a number that can be meant.
        """
        value = self.params.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(
                f"`{key}` is {value!r}" if value is not None else f"`{key}` is missing",
                where=f"{self.split}_input.{key}",
                allowed=f"a whole number, at least {minimum}",
            )
        return value

    def _size(self, key: str) -> Any:
        if key != "image_shape":
            return self.integer(key)
        shape = self.params.get(key)
        values = cast("Sequence[object]", shape) if isinstance(shape, (list, tuple)) else ()
        if len(values) != 3 or not all(isinstance(v, int) and v > 0 for v in values):
            raise ConfigError(
                f"`{key}` is {shape!r}",
                where=f"{self.split}_input.{key}",
                allowed="[height, width, channels]",
            )
        return values

    def _files(self) -> list[Path]:
        key = next((key for key in self.PATH_KEYS if self.params.get(key)), self.PATH_KEYS[0])
        given = self.params.get(key)
        names = cast("list[object]", given) if isinstance(given, (list, tuple)) else [given]
        paths = [Path(str(name)).expanduser() for name in names if name]
        missing = next((path for path in paths if not path.exists()), None)
        if not paths or missing is not None:
            raise ConfigError(
                f"there is no {missing}" if paths else f"`{key}` is missing",
                where=f"{self.split}_input.{key}",
                allowed="folders with files *.tfrecord*, or such files",
            )
        files = record_files(paths, self.split)
        if not files:
            raise DataError(
                "there are no TFRecord files",
                where=", ".join(map(str, paths)),
                allowed="files *.tfrecord*",
                hint="openwafer prepare text ... --output tfrecord writes them",
            )
        return files


def shard_dataset(
    dataset: Any, use_multiple_workers: bool, input_context: Any = None, *, num_files: int = 0
) -> Any:
    """The part of a dataset of files that this task reads: of TF_CONFIG's worker, or of an input
    context; all of it without either.

    Args:
        num_files: how many there are, to see that each task has one; 0: not known.

    Raises:
        ConfigError: there are more tasks than files.
    """
    count, index = 1, 0
    if use_multiple_workers and os.environ.get("TF_CONFIG"):
        config = json.loads(os.environ["TF_CONFIG"])
        task = config.get("task", {})
        # The chief reads no batches to train with, and all of them where it evaluates.
        if task.get("type") == "worker":
            count, index = len(config["cluster"]["worker"]), int(task["index"])
    elif input_context is not None:
        count, index = input_context.num_input_pipelines, input_context.input_pipeline_id
    if num_files and count > num_files:
        raise ConfigError(
            f"{count} tasks cannot share {num_files} files",
            where="use_multiple_workers",
            allowed="a file for each task, or more",
            hint="use_multiple_workers: False lets each of them read every file",
        )
    return dataset.shard(count, index) if count > 1 else dataset
