"""An input function's dataset as a sequence of batches for the runtime.

Decides how `input_fn` is called, that its dataset is read in a graph and session of its own (as the
Estimator does, so that code for TensorFlow 1 works), and how arrays become torch tensors. Which
batches a task passes on is decided in streaming/.

An input function with numbers (`NumberedInput`) goes on where its run stopped. Any other one begins
with its first batch again, as in TensorFlow, which keeps no place in the data.

A dataset that `shard` was called on, as the documented input functions do with several workers, is
this task's part already; of any other one, each of n workers reads all and passes on every n-th.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from openwafer.errors import DataError, OpenWaferError
from openwafer.frontends.tf.input_report import slow_spots
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.model_graph import as_batch
from openwafer.frontends.tf.ops.table import DTYPES
from openwafer.frontends.torch.blame import user_line_of
from openwafer.streaming.loader import BatchSequence
from openwafer.streaming.randomness import result_of
from openwafer.streaming.shard import Shard
from openwafer.train.evaluation import open_epoch

__all__ = ["InputFn", "InputFunction", "NumberedInput", "example_batch", "going_on", "place_of"]

_log = logging.getLogger("openwafer")

InputFn = Callable[..., Any]


@runtime_checkable
class NumberedInput(Protocol):
    """An input_fn of batches that have numbers, so that a run can begin with any of them.

    loader, seed: what the batches are made from, epoch by epoch; compiled runs read it themselves.
    """

    @property
    def loader(self) -> DataLoader[Any]: ...
    @property
    def seed(self) -> int: ...

    def __call__(self) -> Any:
        """The tf.data.Dataset."""
        ...

    def from_step(self, step: int) -> NumberedInput:
        """The same batches, from those of global step `step` on."""
        ...


def going_on(input_fn: InputFn, step: int) -> InputFn:
    """The input_fn of a run of TensorFlow itself that has made `step` steps."""
    return input_fn.from_step(step) if isinstance(input_fn, NumberedInput) else input_fn


def place_of(step: int, *, num_batches: int, batches_per_step: int) -> tuple[int, int]:
    """Epoch and batch where global step `step` begins; epochs have whole steps."""
    # An epoch without a whole step is refused where training begins.
    epoch, step_in_epoch = divmod(step, max(1, num_batches // batches_per_step))
    return epoch, step_in_epoch * batches_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFunction:
    """A user's input_fn with what it is called with. mode: tf.estimator.ModeKeys."""

    function: InputFn
    params: Any
    mode: str

    def _call(self) -> Any:
        given = {"params": self.params, "mode": self.mode, "input_context": None}
        names = inspect.signature(self.function).parameters
        arguments = {name: value for name, value in given.items() if name in names}
        try:
            dataset = self.function(**arguments)
        except OpenWaferError:
            raise
        except Exception as error:
            raise DataError(
                f"input_fn failed: {type(error).__name__}: {error}",
                where=user_line_of(error.__traceback__),
                hint="check the input section of the parameter file",
            ) from error
        if not isinstance(dataset, tf.data.Dataset):
            raise DataError(
                f"input_fn gave {type(dataset).__name__}",
                where=f"{self.function.__code__.co_filename}:"
                f"{self.function.__code__.co_firstlineno}",
                allowed="a tf.data.Dataset of (features, labels), batched",
            )
        return dataset

    def element_spec(self) -> Any:
        """Types and shapes of a batch; no data are read."""
        with tf.Graph().as_default():
            return self._call().element_spec

    def sequence(self, *, seed: int, shard: Shard) -> BatchSequence:
        """The batches of this task's shard, as torch tensors."""
        if isinstance(self.function, NumberedInput):
            return _Features(self.function.loader, seed=self.function.seed, shard=shard)
        graph = tf.Graph()
        with graph.as_default():
            tf.compat.v1.set_random_seed(seed)
            dataset = self._call()
        kinds = {operation.type for operation in graph.get_operations()}
        for spot in slow_spots(graph):
            _log.warning("the input pipeline may be slow: %s", spot)
        return BatchSequence(
            _Dataset(graph, dataset),
            seed=seed,
            shard=shard,
            already_sharded=shard.count > 1 and "ShardDataset" in kinds,
        )


class _Features(BatchSequence):
    """A loader's batches in the form of an input_fn's."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        with open_epoch(super(), epoch=epoch, start=start) as batches:
            yield from map(as_batch, batches)


class _Dataset:
    """A dataset that can be read from the front again and again."""

    def __init__(self, graph: Any, dataset: Any) -> None:
        self._graph = graph
        with graph.as_default():
            iterator = tf.compat.v1.data.make_initializable_iterator(dataset)
            self._start, self._next = iterator.initializer, as_batch(iterator.get_next())
            self._tables = tf.compat.v1.tables_initializer()
            self._size = int(_on_cpu(graph, tf.data.experimental.cardinality(dataset)))

    def __len__(self) -> int:
        if self._size < 0:  # endless, or not known
            raise TypeError("this dataset has no length")
        return self._size

    def __iter__(self) -> Iterator[Any]:
        # Python functions of a dataset run in threads of TensorFlow, and may be sequences with
        # random numbers of their own.
        with _session(self._graph) as session, ThreadPoolExecutor(1, "tf.data") as reader:
            session.run([self._tables, self._start])
            while True:
                try:
                    element = result_of(reader.submit(session.run, self._next))
                except tf.errors.OutOfRangeError:
                    return
                yield pytree.tree_map(_tensor, element)


def _session(graph: Any) -> Any:
    return tf.compat.v1.Session(
        graph=graph, config=tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    )


def _on_cpu(graph: Any, tensor: Any) -> Any:
    with _session(graph) as session:
        return session.run(tensor)


def _tensor(array: Any) -> torch.Tensor:
    value = np.asarray(array)
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def example_batch(element_spec: Any) -> dict[str, Any]:
    """A batch of zeros in the shapes and types of a dataset.

    Raises:
        DataError: a tensor is of a type that has no numbers, or of no fixed shape.
    """

    def zeros(path: Any, spec: Any) -> torch.Tensor:
        name = spec.dtype.name
        if name not in DTYPES or not spec.shape.is_fully_defined():
            raise DataError(
                f"the batch entry {pytree.keystr(path)} is {name} of shape {spec.shape}",
                allowed="numbers, in batches of one shape",
                hint="leave texts out of the features, and use "
                "dataset.batch(batch_size, drop_remainder=True)",
            )
        return torch.zeros(spec.shape.as_list(), dtype=DTYPES[name])

    return pytree.tree_map_with_path(zeros, as_batch(element_spec))
