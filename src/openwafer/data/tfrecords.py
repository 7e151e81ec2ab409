"""TFRecord files as the data of a task.

Decides when a section's data are TFRecords, which layout they have, and what is known of them
besides (vocabulary, classes). The layouts are in tfrecord_layouts.py, the files in
tfrecord_files.py, and what becomes of a record in tfrecord_datasets.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openwafer.data.bert_csv import vocabulary_of
from openwafer.data.conll import label_names, read_label_names
from openwafer.data.dataset import DataInfo, KeyedDataset
from openwafer.data.images import image_shape
from openwafer.data.masked_dataset import read_options
from openwafer.data.params import InputParams
from openwafer.data.tfrecord_datasets import (
    AnswerRecords,
    MaskedRecords,
    RecordImages,
    Records,
    TokenLabelRecords,
    WordRecords,
)
from openwafer.data.tfrecord_files import RecordFiles, record_files
from openwafer.data.tfrecord_layouts import LAYOUTS, TOKENS
from openwafer.data.tfrecord_messages import decode_record
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.data.tokenizers import Tokenizer
from openwafer.errors import ConfigError, DataError

__all__ = ["LABELS_FILE", "META_FILE", "meta_of", "record_dataset"]

LABELS_FILE = "labels.json"
"""Beside records of token classification: label and number."""
META_FILE = "meta.json"
"""Beside records: of the text that they are made of."""
_META_FORMAT, _META_VERSION = "openwafer-records", 1

_DYNAMIC = "BertMlmOnlyTfRecordsDynamicMaskProcessor"
_VOCAB_SIZES = {"causal_lm": 50257}
"""Where no vocabulary is known: GPT-2's; BERT's for all other tasks."""
_BERT_VOCAB_SIZE = 30522
_NUM_CLASSES = {"question_answering": 2, "summarization": 2}
_DATASETS = {
    "causal_lm": Records,
    "masked_lm": MaskedRecords,
    "token_classification": TokenLabelRecords,
    "question_answering": AnswerRecords,
    "summarization": Records,
}


def record_dataset(task: str, params: InputParams) -> KeyedDataset | None:
    """The dataset of a section whose files are TFRecords; None where they are of another kind.

    Raises:
        ConfigError: a key is wrong, or google-crc32c is missing.
        DataError: there are none although `data_processor` reads nothing else, or one is broken.
    """
    named = params.text("data_processor")
    if all(layout.task != task for layout in LAYOUTS.values()) or (named and named not in LAYOUTS):
        return None
    key = "dataset_path" if task == "segmentation" and params.get("dataset_path") else "data_dir"
    paths = params.paths(key)
    files = record_files(paths, params.split)
    if not files:
        if paths and "TfRecords" in str(named):
            raise DataError(
                "there are no TFRecord files",
                where=", ".join(map(str, paths)),
                allowed="files *.tfrecord*",
                hint="openwafer prepare text ... --output tfrecord writes them",
            )
        return None
    records = RecordFiles(files)
    if not len(records):
        raise DataError("there is no record", where=_names(files))
    name = named or _fitting(task, params, records)
    if task == "segmentation":
        return _images(params, records)
    if name.startswith("BertMlmOnly") and not params.flag("disable_nsp"):
        raise ConfigError(
            f"{name} reads records without next sentences",
            where=params.where("disable_nsp"),
            allowed="disable_nsp: True, in the inputs and in `model`",
        )
    if name == _DYNAMIC:
        return _masked_here(params, records)
    return _DATASETS[task](params, records, LAYOUTS[name], _info(task, params, records))


def meta_of(info: DataInfo) -> dict[str, Any]:
    """What `META_FILE` says of a dataset that is written as records."""
    return {
        "format": _META_FORMAT,
        "version": _META_VERSION,
        "bytes_per_token": info.bytes_per_token,
    }


def _fitting(task: str, params: InputParams, records: RecordFiles) -> str:
    """The name of the processor that reads these records."""
    if task != "masked_lm":
        return next(name for name, layout in LAYOUTS.items() if layout.task == task)
    if TOKENS in decode_record(records[0], records.where(0)):
        return _DYNAMIC
    static = "BertMlmOnlyTfRecordsStaticMaskProcessor"
    return static if params.flag("disable_nsp") else "BertTfRecordsProcessor"


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")


def _source(records: RecordFiles) -> str:
    return f"{len(records):,} records of {len(records.files)} TFRecord files"


def _images(params: InputParams, records: RecordFiles) -> KeyedDataset:
    height, width, channels = image_shape(params)
    info = DataInfo(
        source=_source(records),
        num_classes=params.integer("num_classes", minimum=2),
        image_shape=(channels, height, width),
    )
    return RecordImages(params, records, LAYOUTS["UNetTfRecordsProcessor"], info)


def _masked_here(params: InputParams, records: RecordFiles) -> KeyedDataset:
    vocabulary = vocabulary_of(params, records.files)
    info = DataInfo(
        source=_source(records),
        vocab_size=vocabulary.vocab_size,
        tokenizer=vocabulary,
        bytes_per_token=_bytes_per_token(records.files[0].parent),
    )
    return WordRecords(records, vocabulary, info, read_options(params, vocabulary))


def _info(task: str, params: InputParams, records: RecordFiles) -> DataInfo:
    folder = records.files[0].parent
    tokenizer = _tokenizer(params, folder)
    vocab_size = params.optional_integer("vocab_size", minimum=1)
    if vocab_size is None:
        unknown = _VOCAB_SIZES.get(task, _BERT_VOCAB_SIZE)
        vocab_size = tokenizer.vocab_size if tokenizer else unknown
    names = _label_names(params, folder) if task == "token_classification" else ()
    return DataInfo(
        source=_source(records),
        vocab_size=vocab_size,
        max_sequence_length=params.integer("max_sequence_length", minimum=1),
        num_classes=len(names) or _NUM_CLASSES.get(task, 0),
        label_names=names,
        pad_id=max(0, tokenizer.ids.pad) if tokenizer else 0,
        tokenizer=tokenizer,
        bytes_per_token=_bytes_per_token(folder),
    )


def _tokenizer(params: InputParams, folder: Path) -> Tokenizer | None:
    """That of `vocab_file`, or the one beside the files, if there is one."""
    beside = (folder / name for name in ("tokenizer.json", "vocab.txt"))
    path = params.text("vocab_file") or next((path for path in beside if path.is_file()), None)
    return None if path is None else load_tokenizer(path, do_lower=params.flag("do_lower"))


def _bytes_per_token(folder: Path) -> float:
    """As the folder's meta file says: of its records, or of the shards that they were made from.

    Raises:
        DataError: the file is not as it was written.
    """
    if TokenShards.is_one(folder):
        shards = TokenShards(folder)
        return shards.num_bytes / max(1, shards.num_tokens)
    path = folder / META_FILE
    if not path.is_file():
        return 0.0
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        # Records of others may have a file of that name too.
        return float(meta["bytes_per_token"]) if meta.get("format") == _META_FORMAT else 0.0
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the file is not as `openwafer prepare records` writes it: {error!r}",
            where=str(path),
            hint="write the records again, or remove it: bits per byte are then left out",
        ) from error


def _label_names(params: InputParams, folder: Path) -> tuple[str, ...]:
    if params.get("label_vocab_file"):
        return tuple(label_names(params, ()))
    if (folder / LABELS_FILE).is_file():
        return tuple(read_label_names(folder / LABELS_FILE))
    raise ConfigError(
        "the labels of records are numbers, whose names are not known",
        where=params.where("label_vocab_file"),
        allowed=f"JSON, label to number; or {LABELS_FILE} beside the records",
    )
