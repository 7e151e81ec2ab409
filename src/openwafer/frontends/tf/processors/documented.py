"""The documented processors: what each gives to a model.

Decides names, types and signs of the features. `input_mask` is 1 on padding, int32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.data.bert_csv import vocabulary_of
from openwafer.data.masked import KEYS
from openwafer.data.masked_dataset import read_options
from openwafer.data.masking import mask_batch
from openwafer.data.params import InputParams
from openwafer.data.tfrecord_layouts import words_of
from openwafer.data.tfrecord_messages import decode_record
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.processors.base import TfRecordsProcessor

__all__ = [
    "BertMlmOnlyTfRecordsDynamicMaskProcessor",
    "BertMlmOnlyTfRecordsStaticMaskProcessor",
    "BertSumTfRecordsProcessor",
    "BertTfRecordsProcessor",
    "GptTfRecordsProcessor",
    "NerDataProcessor",
    "QuestionAnsweringDataProcessor",
    "UNetTfRecordsProcessor",
]


def _integers(example: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: tf.cast(example[name], tf.int32) for name in names}


def _padding(mask: Any) -> Any:
    """1 on padding, whether the file has 1 there or 0: a sequence begins with a token."""
    return tf.cast(tf.not_equal(mask, mask[:, :1]), tf.int32)


class GptTfRecordsProcessor(TfRecordsProcessor):
    """input_ids, input_mask [batch, seq]; labels [batch, seq], the next tokens."""

    LAYOUT = "GptTfRecordsProcessor"

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        features = _integers(example, "input_ids")
        features["input_mask"] = _padding(example["input_mask"])
        return features, tf.cast(example["labels"], tf.int32)


class BertMlmOnlyTfRecordsStaticMaskProcessor(TfRecordsProcessor):
    """input_ids, input_mask [batch, seq]; masked_lm_ids, masked_lm_positions, masked_lm_weights
    [batch, predictions]; labels [batch], zeros: there are no next sentences.

    `scale_mlm_weights` (True) multiplies the weights so that their sum is the number of samples.
    """

    LAYOUT = "BertMlmOnlyTfRecordsStaticMaskProcessor"

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        names = ("input_ids", "masked_lm_ids", "masked_lm_positions")
        features = _integers(example, *names)
        features["input_mask"] = _padding(example["input_mask"])
        features["masked_lm_weights"] = self._scaled(example["masked_lm_weights"])
        return features, tf.zeros([self.batch_size], tf.int32)

    def _scaled(self, weights: Any) -> Any:
        if self.params.get("scale_mlm_weights", True):
            weights *= self.batch_size / tf.maximum(tf.reduce_sum(weights), 1.0)
        return tf.cast(weights, self.float_type)


class BertTfRecordsProcessor(BertMlmOnlyTfRecordsStaticMaskProcessor):
    """The same with segment_ids [batch, seq], and labels [batch]: 1 where the second text does not
    follow the first."""

    LAYOUT = "BertTfRecordsProcessor"

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        features, _ = super().features_and_labels(example)
        features.update(_integers(example, "segment_ids"))
        return features, tf.cast(example["next_sentence_labels"][:, 0], tf.int32)


class BertMlmOnlyTfRecordsDynamicMaskProcessor(BertMlmOnlyTfRecordsStaticMaskProcessor):
    """The same from sequences of words, masked anew in each epoch.

    `vocab_file` (or vocab.txt beside the files), `do_lower`, `masked_lm_prob`, `mask_whole_word`.
    The draws depend on (`shuffle_seed`, number of the sample in the run).
    """

    LAYOUT = "BertMlmOnlyTfRecordsDynamicMaskProcessor"

    def parsed(self, dataset: Any) -> Any:
        section = {key: value for key, value in self.params.items() if key in KEYS}
        params = InputParams(section, KEYS, self.split)
        self._vocabulary = vocabulary_of(params, self._files())
        self._options = read_options(params, self._vocabulary)
        batches = dataset.enumerate().batch(self.batch_size, drop_remainder=True)
        return batches.map(self._masked, num_parallel_calls=tf.data.AUTOTUNE)

    def _masked(self, numbers: Any, records: Any) -> Any:
        rule, length = self._options.rule, self._options.max_sequence_length
        shapes = {
            "input_ids": (tf.int64, length),
            "input_mask": (tf.int64, length),
            "masked_lm_positions": (tf.int64, rule.max_predictions),
            "masked_lm_ids": (tf.int64, rule.max_predictions),
            "masked_lm_weights": (tf.float32, rule.max_predictions),
        }
        types = [dtype for dtype, _ in shapes.values()]
        found = tf.numpy_function(self._mask, [numbers, records], types, stateful=False)
        example = dict(zip(shapes, found, strict=True))
        for name, (_, size) in shapes.items():
            example[name].set_shape([self.batch_size, size])
        return self.features_and_labels(example)

    def _mask(
        self, numbers: npt.NDArray[np.int64], records: npt.NDArray[np.object_]
    ) -> list[npt.NDArray[Any]]:
        length = self._options.max_sequence_length
        ids = np.zeros((len(records), length), dtype=np.int64)
        lengths = np.zeros(len(records), dtype=np.int64)
        for row, record in enumerate(records):
            words = words_of(decode_record(record, ""), length, f"sample {numbers[row]}")
            ids[row, : len(words)] = self._vocabulary.numbers(words)
            lengths[row] = len(words)
        seed = int(self.params.get("shuffle_seed") or 0)
        masked = mask_batch(ids, lengths, self._options.rule, numbers, seed)
        mask = (np.arange(length)[None, :] < lengths[:, None]).astype(np.int64)
        weights = masked.mask.astype(np.float32)
        return [masked.input_ids, mask, masked.positions, masked.labels, weights]


class NerDataProcessor(TfRecordsProcessor):
    """input_ids, input_mask, segment_ids, labels [batch, seq]; labels are the labels too."""

    LAYOUT = "NerDataProcessor"

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        features = _integers(example, "input_ids", "segment_ids")
        features["input_mask"] = _padding(example["input_mask"])
        features["labels"] = tf.cast(example["label_ids"], tf.int32)
        return features, features["labels"]


class QuestionAnsweringDataProcessor(TfRecordsProcessor):
    """input_ids, input_mask, segment_ids [batch, seq]; labels [batch, 2]: where the answer begins
    and ends. To predict: `unique_ids` [batch, 1] in place of labels."""

    LAYOUT = "QuestionAnsweringDataProcessor"
    PATH_KEYS = ("data_file", "data_dir")

    def parse(self, records: Any) -> Any:
        if self.split != "predict":
            return super().parse(records)
        sequence = tf.io.FixedLenFeature([self.sizes["input_ids"]], tf.int64)
        names = ("input_ids", "input_mask", "segment_ids")
        wanted: dict[str, Any] = dict.fromkeys(names, sequence)
        wanted["unique_ids"] = tf.io.FixedLenFeature([1], tf.int64)
        example = tf.io.parse_example(records, wanted)
        return {**self._sequences(example), **_integers(example, "unique_ids")}

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        ends = [example["start_positions"], example["end_positions"]]
        return self._sequences(example), tf.cast(tf.concat(ends, 1), tf.int32)

    def _sequences(self, example: dict[str, Any]) -> dict[str, Any]:
        mask = _padding(example["input_mask"])
        return {**_integers(example, "input_ids", "segment_ids"), "input_mask": mask}


class BertSumTfRecordsProcessor(TfRecordsProcessor):
    """input_ids, input_mask, segment_ids [batch, seq]; cls_indices, labels, cls_weights [batch,
    sentences]; labels are the labels too."""

    LAYOUT = "BertSumTfRecordsProcessor"

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        features = _integers(example, "input_ids", "segment_ids", "cls_indices", "labels")
        features["input_mask"] = _padding(example["input_mask"])
        features["cls_weights"] = tf.cast(example["cls_weights"], self.float_type)
        return features, features["labels"]


class UNetTfRecordsProcessor(TfRecordsProcessor):
    """images [batch, channels, height, width] (or, with `data_format: channels_last`, channels
    last), normalized already; labels [batch, height × width], classes as numbers with a fraction.
    `augment_data` mirrors and turns images and masks alike, in training."""

    LAYOUT = "UNetTfRecordsProcessor"
    PATH_KEYS = ("dataset_path", "data_dir")

    def features_and_labels(self, example: dict[str, Any]) -> Any:
        height, width, channels = self._size("image_shape")
        image = tf.reshape(example["image"], [-1, height, width, channels])
        mask = tf.reshape(example["mask"], [-1, height, width, 1])
        if self.split == "train" and self.params.get("augment_data", False):
            both = tf.map_fn(self._augmented, tf.concat([image, mask], -1))
            image, mask = both[..., :channels], both[..., channels:]
        if self.params.get("data_format", "channels_first") == "channels_first":
            image = tf.transpose(image, [0, 3, 1, 2])
        labels = tf.reshape(mask, [-1, height * width])
        return tf.cast(image, self.float_type), tf.cast(labels, self.float_type)

    def _augmented(self, image: Any) -> Any:
        seed = self.params.get("shuffle_seed")
        image = tf.image.random_flip_left_right(image, seed=seed)
        image = tf.image.random_flip_up_down(image, seed=seed)
        if image.shape[0] != image.shape[1]:
            return image
        turns = tf.random.uniform([], 0, 2, tf.int32, seed=seed)
        turned = tf.image.rot90(image, turns)
        turned.set_shape(image.shape)
        return turned
