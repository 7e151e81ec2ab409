"""What a TFRecord holds: `tf.train.Example` and `tf.train.SequenceExample`, without TensorFlow.

Decides how named features become bytes and back. Does not decide which features a task has
(tfrecord_layouts.py) nor how records lie in a file (tfrecord_files.py). Source of the field
numbers: TensorFlow's feature.proto and example.proto. The features of an Example and the context
of a SequenceExample are field 1 of their messages, so that one message reads and writes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from openwafer.errors import DataError

__all__ = ["Feature", "decode_record", "encode_record"]

Feature = npt.NDArray[Any] | list[bytes]
"""The values of one feature, int64, float32 or texts; a list of features (of a SequenceExample) is
their values in a row."""

_PACKAGE = "openwafer.records"
_INT64, _FLOAT, _BYTES, _MESSAGE = 3, 2, 12, 11
"""Types of fields, by their numbers in protobuf's descriptor.proto."""


def decode_record(record: bytes, where: str) -> dict[str, Feature]:
    """The features of an Example, or context and feature lists of a SequenceExample, by name.

    Args:
        where: file and number of the record, for errors.

    Raises:
        DataError: these bytes are no such message.
    """
    message = _message_class()()
    try:
        message.ParseFromString(record)
    except DecodeError as error:
        raise DataError(
            "the record is not a tf.train.Example", where=where, hint=f"protobuf: {error}"
        ) from error
    found = {name: _values([each]) for name, each in message.context.feature.items()}
    for name, each in message.feature_lists.feature_list.items():
        found[name] = _values(each.feature)
    return found


def encode_record(
    features: Mapping[str, npt.NDArray[Any]], lists: Mapping[str, Sequence[bytes]] | None = None
) -> bytes:
    """The bytes of an Example with these features, flattened; the same for the same values.

    Args:
        features: floating point arrays become floats (32 bits), others integers (64 bits).
        lists: with any, the bytes are a SequenceExample, whose feature lists have one text each.
    """
    message = _message_class()()
    for name, array in features.items():
        feature = message.context.feature[name]
        if array.dtype.kind == "f":
            feature.float_list.value.extend(array.ravel().tolist())
        else:
            feature.int64_list.value.extend(array.ravel().tolist())
    for name, texts in (lists or {}).items():
        for text in texts:
            message.feature_lists.feature_list[name].feature.add().bytes_list.value.append(text)
    return message.SerializeToString(deterministic=True)


def _values(features: Sequence[Any]) -> Feature:
    """Of one kind; an empty feature has none, and counts as integers."""
    kinds = {feature.WhichOneof("kind") for feature in features} - {None}
    kind = kinds.pop() if len(kinds) == 1 else "int64_list"
    parts = [getattr(feature, kind).value for feature in features]
    if kind == "bytes_list":
        return [value for part in parts for value in part]
    dtype = np.float32 if kind == "float_list" else np.int64
    return np.concatenate([np.zeros(0, dtype), *(np.fromiter(p, dtype, len(p)) for p in parts)])


@cache
def _message_class() -> Any:
    """The class of SequenceExample, in a pool of its own: TensorFlow registers its own messages in
    the common one."""
    file = descriptor_pb2.FileDescriptorProto(
        name="openwafer_records.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, type_number in (("BytesList", _BYTES), ("FloatList", _FLOAT), ("Int64List", _INT64)):
        _add_message(file, name, ("value", type_number, True))
    feature = _add_message(
        file,
        "Feature",
        ("bytes_list", "BytesList", False),
        ("float_list", "FloatList", False),
        ("int64_list", "Int64List", False),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    _add_map(file, "Features", "feature", "Feature")
    _add_message(file, "FeatureList", ("feature", "Feature", True))
    _add_map(file, "FeatureLists", "feature_list", "FeatureList")
    _add_message(
        file,
        "SequenceExample",
        ("context", "Features", False),
        ("feature_lists", "FeatureLists", False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"{_PACKAGE}.SequenceExample")
    )


def _add_message(file: Any, name: str, *fields: tuple[str, int | str, bool]) -> Any:
    """A message with these fields, numbered from 1: name, type, whether it is repeated."""
    message = file.message_type.add(name=name)
    for number, field in enumerate(fields, start=1):
        _add_field(message, number, *field)
    return message


def _add_field(message: Any, number: int, name: str, kind: int | str, repeated: bool) -> None:
    field = message.field.add(name=name, number=number, label=3 if repeated else 1)
    if isinstance(kind, str):
        field.type, field.type_name = _MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = kind


def _add_map(file: Any, name: str, field_name: str, value: str) -> None:
    """A message whose one field is a map from texts, as protobuf writes it: repeated entries."""
    entry_name = "".join(word.capitalize() for word in field_name.split("_")) + "Entry"
    message = _add_message(file, name, (field_name, f"{name}.{entry_name}", True))
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    _add_field(entry, 1, "key", 9, repeated=False)
    _add_field(entry, 2, "value", value, repeated=False)
