"""Records as the batches of a task: the entries that its other data have.

Decides what a record lacks of a task's batch, and that records of words are masked anew in each
epoch. Which dataset a section means is decided in tfrecords.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from openwafer.data.dataset import Batch, DataInfo, Item, KeyedDataset
from openwafer.data.images import Segmentation
from openwafer.data.masked_dataset import (
    MaskedDataset,
    MaskedOptions,
    Sequences,
    add_mlm_scale,
    spread,
)
from openwafer.data.params import InputParams
from openwafer.data.tfrecord_files import RecordFiles
from openwafer.data.tfrecord_layouts import RecordLayout, entries_of, words_of
from openwafer.data.tfrecord_messages import Feature, decode_record
from openwafer.data.tokenizers import WordTokenizer
from openwafer.errors import DataError

__all__ = [
    "AnswerRecords",
    "MaskedRecords",
    "RecordImages",
    "Records",
    "TokenLabelRecords",
    "WordRecords",
]


class Records(KeyedDataset):
    """The entries of a layout, as they are in the files.

    NUMBERED: batches have `unique_ids` in all splits, as the task's other data.
    """

    NUMBERED: ClassVar[bool] = False

    def __init__(
        self, params: InputParams, records: RecordFiles, layout: RecordLayout, info: DataInfo
    ) -> None:
        self._records, self._layout = records, layout
        self._sizes = layout.sizes(lambda key: params.integer(key, minimum=1))
        self._predicts = params.split == "predict"
        super().__init__(info, len(records), with_ids=self._predicts or self.NUMBERED)

    def item(self, index: int, seed: int) -> Item:
        return self.completed(self.entries(self.features(index), index))

    def features(self, index: int) -> dict[str, Feature]:
        """What a record holds."""
        return decode_record(self._records[index], self._records.where(index))

    def entries(self, features: Mapping[str, Feature], index: int) -> dict[str, npt.NDArray[Any]]:
        """The batch entries that the features of a record are."""
        return entries_of(self._layout, features, self._sizes, self._records.where(index))

    def completed(self, entries: dict[str, npt.NDArray[Any]]) -> Item:
        """The entries with those that the task's batches have besides."""
        return entries


class MaskedRecords(Records):
    """Sequences that were masked when they were written."""

    def __init__(
        self, params: InputParams, records: RecordFiles, layout: RecordLayout, info: DataInfo
    ) -> None:
        super().__init__(params, records, layout, info)
        self._gather = params.flag("gather_mlm_labels")
        self._scale = params.flag("dynamic_mlm_scale")

    def completed(self, entries: dict[str, npt.NDArray[Any]]) -> Item:
        if self._gather:
            return entries
        positions, mask = entries.pop("masked_lm_positions")[None], entries["masked_lm_mask"][None]
        length = len(entries["input_ids"])
        for name in ("masked_lm_mask", "labels"):
            entries[name] = spread(positions, mask, entries[name][None], length)[0]
        return entries

    def finish(self, batch: Batch) -> None:
        if self._scale:
            add_mlm_scale(batch)


class TokenLabelRecords(Records):
    """Sequences with a label for each token, all of which count."""

    def __init__(
        self, params: InputParams, records: RecordFiles, layout: RecordLayout, info: DataInfo
    ) -> None:
        super().__init__(params, records, layout, info)
        self._everything = params.flag("include_padding_in_loss")

    def completed(self, entries: dict[str, npt.NDArray[Any]]) -> Item:
        mask = entries["attention_mask"]
        return {**entries, "loss_mask": np.ones_like(mask) if self._everything else mask}


class AnswerRecords(Records):
    """Questions with texts. An answer that is cut off does not count, nor one that is not known:
    records to predict may be without."""

    NUMBERED = True

    def item(self, index: int, seed: int) -> Item:
        features = self.features(index)
        unknown = self._predicts and "start_positions" not in features
        if unknown:
            nowhere = np.zeros(1, dtype=np.int64)
            features = {**features, "start_positions": nowhere, "end_positions": nowhere}
        entries = self.entries(features, index)
        counts = (entries["labels"] < self.info.max_sequence_length) & (not unknown)
        return {**entries, "label_weights": counts.astype(np.float32)}


class WordRecords(MaskedDataset):
    """Sequences of words of a vocabulary, special tokens included, masked anew in each epoch."""

    def __init__(
        self,
        records: RecordFiles,
        vocabulary: WordTokenizer,
        info: DataInfo,
        options: MaskedOptions,
    ) -> None:
        self._records, self._vocabulary = records, vocabulary
        super().__init__(info, len(records), options)

    def sequences(self, indices: npt.NDArray[np.int64], seed: int) -> Sequences:
        length = self.options.max_sequence_length
        ids = np.zeros((len(indices), length), dtype=np.int64)
        lengths = np.zeros(len(indices), dtype=np.int64)
        for row, index in enumerate(indices.tolist()):
            where = self._records.where(index)
            words = words_of(decode_record(self._records[index], where), length, where)
            ids[row, : len(words)] = self._vocabulary.numbers(words)
            lengths[row] = len(words)
        return Sequences(ids, lengths)


class RecordImages(Segmentation):
    """Images and masks of one size, the images normalized already."""

    def __init__(
        self, params: InputParams, records: RecordFiles, layout: RecordLayout, info: DataInfo
    ) -> None:
        self._records, self._layout = records, layout
        self._sizes = layout.sizes(params.get)
        training = params.split == "train"
        super().__init__(
            info,
            len(records),
            augment=params.flag("augment_data", default=False) and training,
            normalize="zero_one",
            with_ids=params.split == "predict",
        )

    def _read(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        where = self._records.where(index)
        features = decode_record(self._records[index], where)
        entries = entries_of(self._layout, features, self._sizes, where)
        assert self.info.image_shape is not None
        channels, height, width = self.info.image_shape
        labels = entries["labels"].reshape(height, width)
        if labels.min() < 0 or labels.max() >= self.info.num_classes:
            raise DataError(
                f"the mask has the class {max(labels.max(), -labels.min())}",
                where=where,
                allowed=f"0 to {self.info.num_classes - 1}",
                hint="num_classes",
            )
        image = entries["images"].reshape(height, width, channels)
        return np.moveaxis(image, -1, 0), labels
