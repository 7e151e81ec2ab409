"""A batch as JSON that describes it and buffers that hold its numbers.

Decides which batches can be streamed and how they are written down: tuples, lists, dicts with
text keys, tensors, NumPy arrays and scalars, int, float, bool, str and None. Reading builds only
these; nothing names a class or runs code. Does not touch sockets (`wire.py`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from openwafer.errors import DataError, StreamingError
from openwafer.streaming.shared_slots import aligned
from openwafer.streaming.source import Batch

__all__ = ["Reading", "describe_batch", "read_description", "read_from_slot"]

MAX_DEPTH = 32

_logger = logging.getLogger("openwafer.streaming")

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
    )
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ARRAY_KINDS = "biufc"

# Tags of the description, each the only key of a JSON object.
_LIST, _TUPLE, _DICT, _FLOAT, _TENSOR, _ARRAY, _SCALAR = "l", "t", "d", "f", "T", "A", "S"


def describe_batch(batch: Batch) -> tuple[Any, list[memoryview]]:
    """The JSON description of `batch` and its buffers, in the order of the description.

    Tensors on a device are copied to the host, and strided ones made contiguous; otherwise the
    buffers are the batch's own memory.

    Raises:
        DataError: something in it cannot be streamed; named with its place in the batch.
    """
    buffers: list[memoryview] = []
    return _describe(batch, "batch", 0, buffers), buffers


def _describe(value: Any, place: str, depth: int, buffers: list[memoryview]) -> Any:
    if depth > MAX_DEPTH:
        raise DataError(f"`{place}` is nested deeper than {MAX_DEPTH} levels")
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        if -(1 << 63) <= value < 1 << 64:
            return value
        raise DataError(f"`{place}` is an integer of more than 64 bits, which cannot be streamed")
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value, place, buffers)
    if isinstance(value, np.ndarray | np.generic):
        tag = _ARRAY if isinstance(value, np.ndarray) else _SCALAR
        return _describe_array(tag, np.asarray(value), place, buffers)
    if type(value) in (list, tuple):
        items = [_describe(v, f"{place}[{i}]", depth + 1, buffers) for i, v in enumerate(value)]
        return {_LIST if type(value) is list else _TUPLE: items}
    if isinstance(value, Mapping):
        return _describe_mapping(value, place, depth, buffers)
    raise _not_streamable(value, place)


def _describe_mapping(
    value: Mapping[Any, Any], place: str, depth: int, buffers: list[memoryview]
) -> Any:
    if type(value) is not dict:
        _say_once_that_it_becomes_a_dict(type(value).__name__, place)
    pairs: list[Any] = []
    for key, item in value.items():
        if type(key) is not str:
            raise DataError(
                f"`{place}` has the key {key!r}, which cannot be streamed",
                allowed="dicts with text keys",
            )
        pairs.append([key, _describe(item, f"{place}[{key!r}]", depth + 1, buffers)])
    return {_DICT: pairs}


_told: set[str] = set()


def _say_once_that_it_becomes_a_dict(name: str, place: str) -> None:
    if name not in _told:
        _told.add(name)
        _logger.warning("`%s` is a %s; workers stream it as a plain dict", place, name)


def _describe_tensor(tensor: torch.Tensor, place: str, buffers: list[memoryview]) -> Any:
    name = _DTYPE_NAMES.get(tensor.dtype)
    if name is None or tensor.layout != torch.strided or tensor.is_meta:
        kind = f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}"
        raise DataError(f"`{place}` is {kind}, which cannot be streamed")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.numel():
        buffers.append(_bytes_of_tensor(plain))
    return {_TENSOR: [name, list(plain.shape)]}


def _bytes_of_tensor(tensor: torch.Tensor) -> memoryview:
    return _bytes_of_array(tensor.reshape(-1).view(torch.uint8).numpy())


def _describe_array(
    tag: str, array: np.ndarray[Any, Any], place: str, buffers: list[memoryview]
) -> Any:
    if array.dtype.kind not in _ARRAY_KINDS:
        raise DataError(
            f"`{place}` is a NumPy array of {array.dtype}, which cannot be streamed",
            allowed="arrays of numbers or bool",
        )
    if array.nbytes:
        buffers.append(_bytes_of_array(np.ascontiguousarray(array)))
    return {tag: [array.dtype.str, list(array.shape)]}


def _bytes_of_array(array: np.ndarray[Any, Any]) -> memoryview:
    # The annotation of arrays lacks the buffer protocol below Python 3.12.
    return memoryview(cast(Any, array.reshape(-1).view(np.uint8)))


def _not_streamable(value: object, place: str) -> DataError:
    kind = type(value)
    return DataError(
        f"`{place}` is a {kind.__module__}.{kind.__qualname__}, which cannot be streamed",
        allowed="tensors, NumPy arrays, numbers, text, None; in tuples, lists and dicts",
        hint="let collate_fn give a dict or a tuple",
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """A description read back: `buffers` are to be filled, then `finish()` gives the batch."""

    buffers: list[memoryview]
    finish: Callable[[], Batch]


def read_description(description: object, num_bytes: int) -> Reading:
    """Allocate what `description` describes, if that is exactly `num_bytes` bytes.

    Raises:
        StreamingError: not a description, or of another size. Nothing is allocated before the
            sizes agree.
    """
    buffers: list[memoryview] = []

    def fresh(size: int) -> torch.Tensor:
        memory = torch.empty(size, dtype=torch.uint8)
        buffers.append(_bytes_of_tensor(memory))
        return memory

    with _malformed_if_it_fails():
        declared = sum(_declared_sizes(description, 0))
        if declared != num_bytes:
            raise _malformed(f"it describes {declared} bytes and carries {num_bytes}")
        return Reading(buffers, _allocate(description, fresh))


def read_from_slot(description: object, lease: Callable[[int], memoryview]) -> Batch:
    """The batch that `description` describes, its tensors in memory that holds them already, each
    at the next aligned place. All that is given by `lease` stays in use as long as one of them is.

    Args:
        lease: gives the memory, once it is known how much it must be.

    Raises:
        StreamingError: not a description, or `lease` refuses.
    """
    with _malformed_if_it_fails():
        memory = lease(sum(map(aligned, _declared_sizes(description, 0))))
        place = 0

        def held(size: int) -> torch.Tensor:
            nonlocal place
            found = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=place)
            place += aligned(size)
            return found

        return _allocate(description, held)()


@contextlib.contextmanager
def _malformed_if_it_fails() -> Generator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise _malformed(str(error)) from error


def _malformed(why: str) -> StreamingError:
    return StreamingError(f"received a batch that cannot be read: {why}")


def _single(description: Any) -> tuple[str, Any]:
    """The tag and content of a tagged value."""
    if not isinstance(description, dict) or len(cast("dict[str, Any]", description)) != 1:
        raise _malformed("a part has no tag")
    return next(iter(cast("dict[str, Any]", description).items()))


def _children(tag: str, content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise _malformed(f"`{tag}` without a list")
    items = cast("list[Any]", content)
    if tag != _DICT:
        return items
    for pair in items:
        if not isinstance(pair, list) or len(cast("list[Any]", pair)) != 2:
            raise _malformed("a dict entry that is not a pair")
        if not isinstance(pair[0], str):
            raise _malformed("a dict key that is not text")
    return [pair[1] for pair in items]


def _declared_sizes(description: Any, depth: int) -> Iterator[int]:
    """Bytes of each tensor and array in turn; checks every part of the description on the way."""
    if depth > MAX_DEPTH:
        raise _malformed("nested too deep")
    if description is None or isinstance(description, bool | int | float | str):
        return
    tag, content = _single(description)
    if tag == _FLOAT:
        if content not in ("nan", "inf", "-inf"):
            raise _malformed("a float that is none")
    elif tag in (_LIST, _TUPLE, _DICT):
        for child in _children(tag, content):
            yield from _declared_sizes(child, depth + 1)
    elif tag in (_TENSOR, _ARRAY, _SCALAR):
        dtype, shape = _dtype_and_shape(tag, content)
        yield math.prod(shape) * dtype.itemsize
    else:
        raise _malformed("an unknown tag")


def _dtype_and_shape(tag: str, content: Any) -> tuple[Any, list[int]]:
    if not isinstance(content, list) or len(cast("list[Any]", content)) != 2:
        raise _malformed("a tensor without dtype and shape")
    name, shape = cast("list[Any]", content)
    if not isinstance(name, str) or not isinstance(shape, list):
        raise _malformed("a tensor without dtype and shape")
    sizes = cast("list[Any]", shape)
    if len(sizes) > 64 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in sizes):
        raise _malformed("a shape that is none")
    if tag == _SCALAR and sizes:
        raise _malformed("a scalar with a shape")
    if tag == _TENSOR:
        if name not in _DTYPES:
            raise _malformed(f"unknown dtype {name[:20]!r}")
        return _DTYPES[name], sizes
    # A short plain name: no structured dtypes, whose text NumPy would evaluate.
    if not (len(name) <= 12 and name[:1] in "<>|=" and name[1:2] in _ARRAY_KINDS):
        raise _malformed(f"unknown dtype {name[:20]!r}")
    if not name[2:].isdigit():
        raise _malformed(f"unknown dtype {name[:20]!r}")
    return np.dtype(name), sizes


_Place = Callable[[int], torch.Tensor]
"""Gives memory of so many bytes, not none, as a tensor of uint8."""


def _allocate(description: Any, place: _Place) -> Callable[[], Any]:
    """Find room for a checked description; the result builds the value once that is filled."""
    if not isinstance(description, dict):
        return lambda: description
    tag, content = _single(description)
    if tag == _FLOAT:
        return lambda: float(content)
    if tag in (_TENSOR, _ARRAY, _SCALAR):
        return _allocate_leaf(tag, content, place)
    parts = [_allocate(child, place) for child in _children(tag, content)]
    if tag == _DICT:
        keys = [pair[0] for pair in content]
        return lambda: dict(zip(keys, (part() for part in parts), strict=True))
    if tag == _LIST:
        return lambda: [part() for part in parts]
    return lambda: tuple(part() for part in parts)


def _allocate_leaf(tag: str, content: Any, place: _Place) -> Callable[[], Any]:
    dtype, shape = _dtype_and_shape(tag, content)
    size = math.prod(shape) * dtype.itemsize
    memory = place(size) if size else torch.empty(0, dtype=torch.uint8)
    if tag == _TENSOR:
        tensor = memory.view(dtype).reshape(shape)
        return lambda: tensor
    array = cast("np.ndarray[Any, Any]", memory.numpy()).view(dtype).reshape(shape)
    return (lambda: array) if tag == _ARRAY else (lambda: array[()])
