"""The documented processors of T5 and the Transformer: text, made into batches when it is read.

Decides names, types and signs of the features, and how the batches of the data room become a
tf.data pipeline. Does not decide what a batch holds (data/spans.py, data/pairs.py): it is that of
the PyTorch processors of the same names.

Source of names and signs: the data processors of Model Zoo 1.6 (facts alone).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch

from openwafer.data.dataloader import EpochSampler, make_dataloader
from openwafer.data.dataset import KeyedDataset
from openwafer.data.params import Split
from openwafer.data.registry import build_dataset
from openwafer.errors import ConfigError
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.processors.base import shard_dataset

__all__ = ["T5DynamicDataProcessor", "TextToTextProcessor", "TransformerDynamicDataProcessor"]

_SPLITS: Mapping[str, Split] = {"train": "train", "eval": "eval", "infer": "predict"}
_UNUSED = ("seed", "num_buckets", "num_documents_to_concatenate", "use_vsl")
"""Keys of the documented parameter files that its code does not read, or that are about rows of
other lengths. `use_vsl: True` is refused."""
_OWN = ("repeat", "use_multiple_workers", "skip_steps", "mixed_precision")
"""Keys that mean something here, and nothing to the data room."""
_TENSORS = {
    "input_ids": "src",
    "attention_mask": "src",
    "decoder_input_ids": "tgt",
    "decoder_attention_mask": "tgt",
    "labels": "tgt",
}
"""Entries of a batch, and which of the two lengths they have."""


class TextToTextProcessor:
    """Batches of encoder_input_ids, encoder_mask [batch, src]; decoder_input_ids, decoder_mask
    [batch, tgt]; encoder_input_length, decoder_input_length [batch]; loss_scale [batch, tgt]; and
    labels [batch, tgt].

    Masks are 1 on padding; `loss_scale` is everywhere samples for each target token of the batch.
    All are int32, `loss_scale` float32, or float16 with `mixed_precision`.

    Args:
        params: an input section: that of the task's other data, and `repeat` (True; evaluation
            reads everything once), `use_multiple_workers` (False), `skip_steps` (0),
            `do_lower_case`. Vocabularies are files with a word in each line, of texts that are
            words between spaces; or tokenizer.json, of any text.
        split: names the section in messages, and what is read where no mode is given.
    """

    TASK: ClassVar[str]

    def __init__(self, params: Mapping[str, Any], split: Split = "train") -> None:
        self.params = params
        self.split: Split = split

    def create_tf_dataset(self, mode: str | None = None, input_context: Any = None) -> Any:
        """Batches of (features, labels).

        Args:
            mode: tf.estimator.ModeKeys; None: that of the split. Training is in a new order in
                each epoch (`shuffle`) and, with `repeat`, without an end.
            input_context: tf.distribute.InputContext, where TensorFlow deals out the input.

        Raises:
            ConfigError: a key is wrong.
            DataError: the data are missing or broken, or not one batch.
        """
        split = self.split if mode is None else _SPLITS[mode]
        section = self.section(split)
        dataset = build_dataset(self.TASK, section, split)
        sampler = cast(EpochSampler, make_dataloader(dataset, section, split).batch_sampler)
        batch_size = len(next(sampler.keys(0, torch.default_generator)))
        repeats = split == "train" and bool(self.params.get("repeat", True))

        def keys() -> Iterator[tuple[npt.NDArray[np.int64], int]]:
            for epoch in count() if repeats else range(1):
                for key in sampler.keys(epoch, torch.default_generator):
                    yield key.indices, key.seed

        signature = (tf.TensorSpec([batch_size], tf.int64), tf.TensorSpec([], tf.uint64))
        numbers = tf.data.Dataset.from_generator(keys, output_signature=signature)
        # Numbers are dealt out and skipped, before anything is made of them.
        shared = bool(self.params.get("use_multiple_workers", False))
        numbers = shard_dataset(numbers, shared, input_context)
        numbers = numbers.skip(self._skip_steps(split))
        make = self._maker(dataset, batch_size)
        return numbers.map(make, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def section(self, split: Split) -> dict[str, Any]:
        """As the data room knows the keys."""
        given = {key: value for key, value in self.params.items() if value is not None}
        if given.get("use_vsl"):
            raise ConfigError(
                "`use_vsl` is True: rows of other lengths",
                where=f"{split}_input.use_vsl",
                allowed="False: every row has the same length, with a mask",
            )
        section = {key: value for key, value in given.items() if key not in (*_UNUSED, *_OWN)}
        if "do_lower_case" in section:
            section["do_lower"] = section.pop("do_lower_case")
        shuffle = split == "train" and section.get("shuffle", True)
        # Tasks that deal out batches need one order, so there is always a seed.
        seed = section.get("shuffle_seed", 0)
        whole = {"drop_last": True, "pad_last_batch": False, "num_workers": 0}
        return {**section, **whole, "shuffle": shuffle, "shuffle_seed": seed}

    def _skip_steps(self, split: Split) -> int:
        value = self.params.get("skip_steps", 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(
                f"`skip_steps` is {value!r}",
                where=f"{split}_input.skip_steps",
                allowed="a whole number, at least 0",
            )
        return value

    def _maker(self, dataset: KeyedDataset, batch_size: int) -> Any:
        """The map from numbers of items, and their epoch's seed, to (features, labels)."""
        info = dataset.info
        lengths = {"src": info.max_sequence_length, "tgt": info.tgt_max_sequence_length}
        float_type = tf.float16 if self.params.get("mixed_precision") else tf.float32

        def rows(indices: npt.NDArray[np.int64], seed: np.int64) -> list[npt.NDArray[np.int32]]:
            batch = dataset.batch(indices, int(seed))
            return [batch[name].numpy().astype(np.int32) for name in _TENSORS]

        def make(indices: Any, seed: Any) -> Any:
            types = [tf.int32] * len(_TENSORS)
            found = tf.numpy_function(rows, [indices, seed], types, stateful=False)
            for tensor, side in zip(found, _TENSORS.values(), strict=True):
                tensor.set_shape([batch_size, lengths[side]])
            source, source_mask, given, target_mask, labels = found
            num_targets = tf.reduce_sum(target_mask, 1)
            scale = tf.cast(batch_size / tf.reduce_sum(num_targets), float_type)
            features = {
                "encoder_input_ids": source,
                "encoder_mask": 1 - source_mask,
                "encoder_input_length": tf.reduce_sum(source_mask, 1),
                "decoder_input_ids": given,
                "decoder_mask": 1 - target_mask,
                "decoder_input_length": num_targets,
                "loss_scale": tf.fill([batch_size, lengths["tgt"]], scale),
            }
            return features, labels

        return make


class T5DynamicDataProcessor(TextToTextProcessor):
    """Spans of text to be filled in. `data_dir` with files of text, `vocab_file`, `extra_ids`,
    `src_max_sequence_length`, `tgt_max_sequence_length`."""

    TASK = "span_corruption"

    def section(self, split: Split) -> dict[str, Any]:
        section = super().section(split)
        vocabulary = section.get("vocab_file")
        if vocabulary and not str(vocabulary).endswith(".json"):
            section["vocab_file"] = f"words:{vocabulary}"
        return section


class TransformerDynamicDataProcessor(TextToTextProcessor):
    """Lines to be translated. `src_data_dir` and `tgt_data_dir`, `src_vocab_file` and
    `tgt_vocab_file`, `src_max_sequence_length`, `tgt_max_sequence_length`."""

    TASK = "translation"
