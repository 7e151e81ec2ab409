"""From plain text to what training reads: `openwafer prepare text`.

Decides which examples are written beside the shards of tokens. How text becomes shards is in
tokenized_text.py, the documented layouts are in layouts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from openwafer.data.layouts import Layout, write_layout
from openwafer.data.text_files import Cut
from openwafer.data.tokenized_text import PrepareResult, tokenize_text
from openwafer.errors import ConfigError

__all__ = ["Output", "prepare"]

Output = Literal["shards", "csv", "hdf5", "tfrecord"]


def prepare(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 8192,
    vocab_file: str | Path | None = None,
    do_lower: bool = False,
    documents: Cut = "files",
    eval_fraction: float = 0.0,
    output: Output = "shards",
    data_processor: str | None = None,
    max_sequence_length: int = 128,
    max_predictions_per_seq: int = 20,
    shard_bytes: int = 64 << 20,
    num_workers: int = 1,
    seed: int = 1,
) -> PrepareResult:
    """Tokenize text files. What an earlier, equal call has finished is kept.

    Args:
        inputs: files, or folders of text files (.txt, .md, .py, .jsonl with "text", ...).
        out_dir: where to; with `eval_fraction` its folders `train` and `eval`.
        tokenizer: `bpe` or `wordpiece` (trained on this text), `byte`, or a tokenizer's path.
        vocab_size: of a trained tokenizer.
        vocab_file: a WordPiece or BPE vocabulary to use in place of training.
        documents: what a document is: a file, a block between empty lines, or a line.
        eval_fraction: share of the documents that is held out.
        output: `shards`, or also the documented layouts: BERT's `csv`, GPT-2's `hdf5`, `tfrecord`.
        data_processor: what will read `tfrecord` files; None: BERT's with WordPiece, else GPT's.
        max_sequence_length: of the examples in `csv`, `hdf5` and `tfrecord`.
        max_predictions_per_seq: of those in `tfrecord` that are masked when they are written.
        shard_bytes: text in a shard; a longer file is cut at a line's end.
        num_workers: processes.

    Raises:
        ConfigError: an argument is wrong, or a library is missing.
        DataError: there is no text, or it cannot be read; with file and line.
    """
    if output not in get_args(Output):
        raise ConfigError(f"`output` is {output!r}", allowed=", ".join(get_args(Output)))
    if data_processor and output != "tfrecord":
        raise ConfigError(
            f"`output` is {output!r}, and `data_processor` names a layout of TFRecords",
            allowed="output: tfrecord",
        )
    result = tokenize_text(
        inputs,
        out_dir,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        vocab_file=vocab_file,
        do_lower=do_lower,
        documents=documents,
        eval_fraction=eval_fraction,
        shard_bytes=shard_bytes,
        num_workers=num_workers,
        seed=seed,
    )
    if output != "shards":
        layout = Layout(
            output=output,
            data_processor=data_processor,
            max_sequence_length=max_sequence_length,
            max_predictions_per_seq=max_predictions_per_seq,
            seed=seed,
        )
        for folder in result.folders:
            write_layout(folder, layout)
    return result
