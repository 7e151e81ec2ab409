"""The documented layouts, written from tokens that were prepared: CSV, HDF5 and TFRecords.

Decides the files and columns of the first two, and which sequences TFRecords hold. The CSV rows are
of the kind that is masked when it is read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from openwafer.data.causal import CausalWindows
from openwafer.data.hdf5_files import h5py_library
from openwafer.data.masked import MaskedWindows
from openwafer.data.masked_dataset import MaskedOptions
from openwafer.data.masking import MaskingRule
from openwafer.data.sentence_pairs import SentencePairs
from openwafer.data.subwords import vocabulary_words
from openwafer.data.tfrecord_writing import write_records
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizer_files import load_tokenizer
from openwafer.errors import ConfigError, DataError
from openwafer.files import replacing, write_bytes

__all__ = ["Layout", "write_layout"]

_ROWS_PER_FILE = 10_000
_EXAMPLES_AT_A_TIME = 256
_OF_TEXT = (
    "GptTfRecordsProcessor",
    "BertTfRecordsProcessor",
    "BertMlmOnlyTfRecordsStaticMaskProcessor",
    "BertMlmOnlyTfRecordsDynamicMaskProcessor",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which layout, and of what examples.

    data_processor: what will read `tfrecord` files; None: BERT's for tokens that are kept in
        sentences, GPT's for others.
    max_predictions_per_seq: of examples that are masked when they are written.
    seed: of what is drawn when they are written.
    """

    output: Literal["csv", "hdf5", "tfrecord"]
    data_processor: str | None
    max_sequence_length: int
    max_predictions_per_seq: int
    seed: int


def write_layout(folder: Path, layout: Layout) -> list[Path]:
    """Write the examples beside the shards of `folder`.

    Raises:
        ConfigError: the layout is for other tokens, or a library is missing.
        DataError: the text is not one example.
    """
    length, seed = layout.max_sequence_length, layout.seed
    try:
        if layout.output == "csv":
            return write_bert_csv(folder, max_sequence_length=length, seed=seed)
        if layout.output == "hdf5":
            return write_gpt2_hdf5(folder, max_sequence_length=length)
        return write_tfrecords(folder, layout)
    except DataError as error:
        error.hint = error.hint or "a smaller max_sequence_length"
        raise


def write_gpt2_hdf5(folder: Path, *, max_sequence_length: int) -> list[Path]:
    """`examples-0000.h5` and so on beside the shards of `folder`."""
    library = h5py_library()
    windows = CausalWindows(
        TokenShards(folder),
        load_tokenizer(folder),
        max_sequence_length=max_sequence_length,
        source=str(folder),
    )
    written: list[Path] = []
    for number, start in enumerate(range(0, len(windows), _ROWS_PER_FILE)):
        path = folder / f"examples-{number:04d}.h5"
        count = min(_ROWS_PER_FILE, len(windows) - start)
        with replacing(path) as temporary, library.File(temporary, "w") as file:
            file.attrs["n_examples"] = count
            for index in range(count):
                item = windows.item(start + index, 0)
                rows = [item["input_ids"], item["attention_mask"], item["labels"]]
                file.create_dataset(f"example_{index}", data=np.stack(rows).astype(np.int32))
        written.append(path)
    return written


def write_bert_csv(folder: Path, *, max_sequence_length: int, seed: int) -> list[Path]:
    """`pairs-0000.csv` and so on beside the shards of `folder`, `meta.dat`, and `vocab.txt`.

    Raises:
        ConfigError: the tokenizer's tokens are not words that a vocabulary can list.
    """
    tokenizer = load_tokenizer(folder)
    vocab = vocabulary_words(tokenizer)
    options = MaskedOptions(
        max_sequence_length=max_sequence_length, rule=MaskingRule(tokenizer), gather=True
    )
    pairs = SentencePairs(TokenShards(folder), tokenizer, str(folder), options)
    written: list[Path] = []
    meta: list[str] = []
    for number, start in enumerate(range(0, len(pairs), _ROWS_PER_FILE)):
        path = folder / f"pairs-{number:04d}.csv"
        end = min(start + _ROWS_PER_FILE, len(pairs))
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["tokens", "segment_ids", "is_random_next"])
            writer.writerows(_rows(pairs, vocab, range(start, end), seed))
        written.append(path)
        meta.append(f"{path.name} {end - start}\n")
    write_bytes(folder / "vocab.txt", "".join(f"{word}\n" for word in vocab).encode())
    write_bytes(folder / "meta.dat", "".join(meta).encode())
    return written


def _rows(
    pairs: SentencePairs, vocab: list[str], numbers: range, seed: int
) -> Iterator[tuple[str, str, int]]:
    for start in range(numbers.start, numbers.stop, _EXAMPLES_AT_A_TIME):
        indices = np.arange(start, min(start + _EXAMPLES_AT_A_TIME, numbers.stop))
        found = pairs.sequences(indices, seed)
        assert found.segments is not None
        assert found.is_random_next is not None
        for row, length in enumerate(found.lengths.tolist()):
            tokens = [vocab[number] for number in found.ids[row, :length].tolist()]
            segments = found.segments[row, :length].tolist()
            yield repr(tokens), repr(segments), int(found.is_random_next[row])


def write_tfrecords(folder: Path, layout: Layout) -> list[Path]:
    """`examples-00000.tfrecord` and so on beside the shards of `folder`.

    Raises:
        ConfigError: the processor reads no such files, or other tokens.
    """
    shards, tokenizer = TokenShards(folder), load_tokenizer(folder)
    sentences = tokenizer.kind == "wordpiece"
    name = layout.data_processor or (
        "BertTfRecordsProcessor" if sentences else "GptTfRecordsProcessor"
    )
    source = str(folder)
    if name == "GptTfRecordsProcessor":
        windows = CausalWindows(
            shards, tokenizer, max_sequence_length=layout.max_sequence_length, source=source
        )
        return write_records(windows, name, folder)
    if name not in _OF_TEXT:
        raise ConfigError(
            f"text is not made into the records of {name}",
            where="data_processor",
            allowed=", ".join(_OF_TEXT),
            hint="`openwafer prepare records MODEL` writes those of other tasks",
        )
    vocabulary_words(tokenizer)
    rule = MaskingRule(tokenizer, max_predictions=layout.max_predictions_per_seq)
    options = MaskedOptions(max_sequence_length=layout.max_sequence_length, rule=rule)
    kind = SentencePairs if name == "BertTfRecordsProcessor" else MaskedWindows
    dataset = kind(shards, tokenizer, source, options)
    return write_records(dataset, name, folder, seed=layout.seed)
