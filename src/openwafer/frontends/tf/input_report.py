"""What slows a tf.data pipeline down.

Decides which of its habits are worth a line, as the original's input analysis printed them: no
prefetch at the end, an element-wise map before batching, maps that run one call at a time, files
read one after the other. Does not measure anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.places import user_line

__all__ = ["slow_spots"]

_BATCHES = ("BatchDataset", "BatchDatasetV2", "ParallelBatchDataset", "PaddedBatchDatasetV2")
_FILES = ("TFRecordDataset", "TFRecordDatasetV2", "TextLineDataset", "FixedLengthRecordDatasetV2")
_MAPS = ("MapDataset", "ParallelMapDataset", "ParallelMapDatasetV2")
_PASSES_ON = ("OptionsDataset", "ModelDataset", "FiniteRepeatDataset", "RepeatDataset")


def slow_spots(graph: Any) -> list[str]:
    """One line for each, with the user's own line, for the datasets in a graph."""
    datasets = [operation for operation in graph.get_operations() if _is_dataset(operation)]
    inside = {tensor.op for operation in datasets for tensor in operation.inputs}
    spots: list[str] = []
    for last in (operation for operation in datasets if operation not in inside):
        spots += _of_pipeline(last)
    return list(dict.fromkeys(spots))


def _of_pipeline(last: Any) -> Iterator[str]:
    chain = list(_upstream(last))
    final = next((o for o in chain if o.type not in _PASSES_ON), None)
    if final is not None and final.type != "PrefetchDataset":
        yield (
            f"it does not end with a prefetch ({_at(final)}): "
            "dataset.prefetch(tf.data.AUTOTUNE) prepares a batch while another one is used"
        )
    batch = next((i for i, o in enumerate(chain) if o.type in _BATCHES), None)
    for position, operation in enumerate(chain):
        if operation.type == "MapDataset":
            yield (
                f"a map runs one call at a time ({_at(operation)}): "
                "num_parallel_calls=tf.data.AUTOTUNE"
            )
        if operation.type in _MAPS and batch is not None and position > batch:
            yield (
                f"a map comes before the batching ({_at(operation)}): "
                "after it, one call does a whole batch"
            )
        if operation.type == "FlatMapDataset" and _reads_several_files(operation):
            yield (
                f"files are read one after the other ({_at(operation)}): "
                "interleave them, or num_parallel_reads"
            )


def _upstream(operation: Any) -> Iterator[Any]:
    """The datasets from the last one back to the source; the first input of each is taken."""
    current: Any = operation
    while current is not None:
        yield current
        current = next((t.op for t in current.inputs if _is_dataset(t.op)), None)


def _is_dataset(operation: Any) -> bool:
    """Of any version: ParallelInterleaveDatasetV4."""
    return re.search(r"Dataset(V\d+)?$", operation.type) is not None


def _reads_several_files(operation: Any) -> bool:
    """TensorFlow's readers of a list of files are a flat map over their names."""
    name = operation.get_attr("f").name
    function = next(
        f for f in operation.graph.as_graph_def().library.function if f.signature.name == name
    )
    if not any(node.op in _FILES for node in function.node_def):
        return False
    source = operation.inputs[0].op
    names = tf.get_static_value(source.inputs[0]) if source.type == "TensorSliceDataset" else None
    return names is None or int(getattr(names, "size", 2)) > 1


def _at(operation: Any) -> str:
    file, line = user_line(operation)
    return f"{file}:{line}" if file else operation.name
