"""The documented CSV and HDF5 layouts, written from tokens that were prepared.

Decides files and columns. Masks are not drawn here: the CSV rows are of the kind that is masked
when it is read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openwafer.data.causal import CausalWindows
from openwafer.data.hdf5_files import h5py_library
from openwafer.data.masked import MaskedOptions
from openwafer.data.masking import MaskingRule
from openwafer.data.sentence_pairs import SentencePairs
from openwafer.data.subwords import SubwordTokenizer
from openwafer.data.token_shards import TokenShards
from openwafer.data.tokenizers import Tokenizer, WordTokenizer, load_tokenizer
from openwafer.errors import ConfigError
from openwafer.files import replacing, write_bytes

__all__ = ["write_bert_csv", "write_gpt2_hdf5"]

_ROWS_PER_FILE = 10_000
_EXAMPLES_AT_A_TIME = 256


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
    vocab = _tokens(tokenizer)
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


def _tokens(tokenizer: Tokenizer) -> list[str]:
    if isinstance(tokenizer, WordTokenizer):
        return tokenizer.words()
    if isinstance(tokenizer, SubwordTokenizer) and tokenizer.kind == "wordpiece":
        return tokenizer.tokens()
    raise ConfigError(
        f"the CSV layout of BERT holds words, not {tokenizer.kind} tokens",
        where="tokenizer",
        allowed="wordpiece, or a vocabulary file",
    )
