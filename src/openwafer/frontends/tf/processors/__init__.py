"""The documented data processors of release 1.6, on tf.data: of TFRecords, and of pairs of texts.

Decides the names. `Processor(params["train_input"]).create_tf_dataset(is_training, input_context)`
(of pairs of texts: `mode` in the place of `is_training`) gives batches of (features, labels);
`train_input_fn` and its siblings choose the processor by the section's `data_processor`.
"""

from openwafer.frontends.tf.processors.base import TfRecordsProcessor, shard_dataset
from openwafer.frontends.tf.processors.documented import (
    BertMlmOnlyTfRecordsDynamicMaskProcessor,
    BertMlmOnlyTfRecordsStaticMaskProcessor,
    BertSumTfRecordsProcessor,
    BertTfRecordsProcessor,
    GptTfRecordsProcessor,
    NerDataProcessor,
    QuestionAnsweringDataProcessor,
    UNetTfRecordsProcessor,
)
from openwafer.frontends.tf.processors.input_functions import (
    eval_input_fn,
    predict_input_fn,
    train_input_fn,
)
from openwafer.frontends.tf.processors.text_to_text import (
    T5DynamicDataProcessor,
    TransformerDynamicDataProcessor,
)

__all__ = [
    "BertMlmOnlyTfRecordsDynamicMaskProcessor",
    "BertMlmOnlyTfRecordsStaticMaskProcessor",
    "BertSumTfRecordsProcessor",
    "BertTfRecordsProcessor",
    "GptTfRecordsProcessor",
    "NerDataProcessor",
    "QuestionAnsweringDataProcessor",
    "T5DynamicDataProcessor",
    "TfRecordsProcessor",
    "TransformerDynamicDataProcessor",
    "UNetTfRecordsProcessor",
    "eval_input_fn",
    "predict_input_fn",
    "shard_dataset",
    "train_input_fn",
]
