"""The documented TFRecord layouts of release 1.6: features, sizes, and the batch entries they are.

Decides the table that the torch datasets (tfrecords.py), the writer (tfrecord_writing.py) and the
TensorFlow processors read. Does not read files. Source of names, sizes and types: the data
processors and writers of Model Zoo 1.6 (facts alone).

`input_mask` is 1 on tokens in most of the documented files, and 1 on padding in those of
extractive summarization. A sequence begins with a token, so its first value tells which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from openwafer.data.tfrecord_messages import Feature
from openwafer.errors import ConfigError, DataError

__all__ = [
    "LAYOUTS",
    "TOKENS",
    "RecordField",
    "RecordLayout",
    "entries_of",
    "features_of",
    "words_of",
]

TOKENS = "tokens"
"""The feature list of records that are masked when they are read: a word of the vocabulary each."""

Size = Literal[
    "max_sequence_length", "max_predictions_per_seq", "max_cls_tokens", "image", "mask", "one"
]


@dataclass(frozen=True, slots=True)
class RecordField:
    """One feature of a record.

    name: in the record.
    entry: of the batch; fields of one entry follow each other in it.
    size: how many values: an input key, or the pixels of `image_shape` with or without channels.
    dtype: in the record.
    entry_dtype: in the batch.
    """

    name: str
    entry: str
    size: Size
    dtype: Literal["int64", "float32"] = "int64"
    entry_dtype: Literal["int64", "float32"] = "int64"


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """fields: of an Example; none where records are SequenceExamples with the list `TOKENS`."""

    task: str
    fields: tuple[RecordField, ...]

    def sizes(self, value_of: Callable[[str], Any]) -> dict[str, int]:
        """How many values each feature has.

        value_of: the value of an input key, checked.
        """
        found: dict[str, int] = {}
        for field in self.fields:
            if field.size == "one":
                found[field.name] = 1
            elif field.size in ("image", "mask"):
                height, width, channels = value_of("image_shape")
                deep = channels if field.size == "image" else 1
                found[field.name] = math.prod((height, width, deep))
            else:
                found[field.name] = int(value_of(field.size))
        return found


_IDS = RecordField("input_ids", "input_ids", "max_sequence_length")
_MASK = RecordField("input_mask", "attention_mask", "max_sequence_length")
_SEGMENTS = RecordField("segment_ids", "token_type_ids", "max_sequence_length")
_MASKED = (
    RecordField("masked_lm_positions", "masked_lm_positions", "max_predictions_per_seq"),
    RecordField("masked_lm_ids", "labels", "max_predictions_per_seq"),
    RecordField("masked_lm_weights", "masked_lm_mask", "max_predictions_per_seq", "float32"),
)

LAYOUTS: Mapping[str, RecordLayout] = {
    "GptTfRecordsProcessor": RecordLayout(
        "causal_lm", (_IDS, _MASK, RecordField("labels", "labels", "max_sequence_length"))
    ),
    "BertTfRecordsProcessor": RecordLayout(
        "masked_lm",
        (
            _IDS,
            _MASK,
            _SEGMENTS,
            *_MASKED,
            RecordField("next_sentence_labels", "next_sentence_label", "one"),
        ),
    ),
    "BertMlmOnlyTfRecordsStaticMaskProcessor": RecordLayout("masked_lm", (_IDS, _MASK, *_MASKED)),
    "BertMlmOnlyTfRecordsDynamicMaskProcessor": RecordLayout("masked_lm", ()),
    "NerDataProcessor": RecordLayout(
        "token_classification",
        (_IDS, _MASK, _SEGMENTS, RecordField("label_ids", "labels", "max_sequence_length")),
    ),
    "QuestionAnsweringDataProcessor": RecordLayout(
        "question_answering",
        (
            _IDS,
            _MASK,
            _SEGMENTS,
            RecordField("start_positions", "labels", "one"),
            RecordField("end_positions", "labels", "one"),
        ),
    ),
    "BertSumTfRecordsProcessor": RecordLayout(
        "summarization",
        (
            _IDS,
            _MASK,
            _SEGMENTS,
            RecordField("cls_indices", "cls_indices", "max_cls_tokens"),
            RecordField("labels", "labels", "max_cls_tokens"),
            RecordField("cls_weights", "cls_weights", "max_cls_tokens", "float32", "float32"),
        ),
    ),
    "UNetTfRecordsProcessor": RecordLayout(
        "segmentation",
        (
            RecordField("image", "images", "image", "float32", "float32"),
            RecordField("mask", "labels", "mask", "float32"),
        ),
    ),
}
"""Name of a data processor and what it reads. That of U-Net is ours: release 1.6 chose its reader
by the name of the data set."""


def entries_of(
    layout: RecordLayout, features: Mapping[str, Feature], sizes: Mapping[str, int], where: str
) -> dict[str, npt.NDArray[Any]]:
    """A record's batch entries, each of one dimension; `attention_mask` is 1 on tokens.

    Raises:
        DataError: a feature is missing, of another type, or of another number of values.
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for field in layout.fields:
        values = features.get(field.name)
        if values is None:
            raise DataError(
                f"the record has no feature `{field.name}`",
                where=where,
                allowed=", ".join(each.name for each in layout.fields),
                hint=f"it has {', '.join(sorted(features)) or 'none'}",
            )
        size = sizes[field.name]
        if isinstance(values, list) or values.dtype != field.dtype or len(values) != size:
            kind = "bytes" if isinstance(values, list) else values.dtype.name
            raise DataError(
                f"`{field.name}` has {len(values):,} values ({kind})",
                where=where,
                allowed=f"{size:,} ({field.dtype})",
                hint=f"{_key(field)} is that of the file",
            )
        parts.setdefault(field.entry, []).append(values.astype(field.entry_dtype))
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if "attention_mask" in found:
        mask = found["attention_mask"]
        found["attention_mask"] = (mask == mask[0]).astype(np.int64)
    return found


def words_of(features: Mapping[str, Feature], max_words: int, where: str) -> list[str]:
    """The words of a record that is masked when it is read.

    Raises:
        DataError: there are none, or too many.
    """
    texts = features.get(TOKENS)
    if not isinstance(texts, list) or not texts:
        raise DataError(
            f"the record has no feature list `{TOKENS}`",
            where=where,
            allowed="a tf.train.SequenceExample with a word of the vocabulary in each feature",
            hint=f"it has {', '.join(sorted(features)) or 'none'}",
        )
    if len(texts) > max_words:
        raise DataError(
            f"the record has {len(texts):,} tokens",
            where=where,
            allowed=f"at most max_sequence_length, {max_words:,}",
        )
    return [text.decode("utf-8", "replace") for text in texts]


def features_of(
    layout: RecordLayout, item: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The features of a record, from an item of a dataset of the layout's task.

    Raises:
        ConfigError: the item lacks an entry that the layout has.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    used: dict[str, int] = {}
    together = [field.entry for field in layout.fields]
    for field in layout.fields:
        if field.entry not in item:
            raise ConfigError(
                f"these data have no `{field.entry}` for the feature `{field.name}`",
                allowed=", ".join(sorted(each.entry for each in layout.fields)),
                hint="another data_processor, or disable_nsp: False for next sentences",
            )
        values = item[field.entry].reshape(-1)
        if together.count(field.entry) > 1:
            begin = used.get(field.entry, 0)
            used[field.entry] = begin + 1
            values = values[begin : begin + 1]
        found[field.name] = values.astype(field.dtype)
    return found


def _key(field: RecordField) -> str:
    return "image_shape" if field.size in ("image", "mask") else field.size
