"""What a pass through a `tf.data.Dataset` depends on, as its graph tells."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from distfit import _keras

_LARGEST_GRAPH = 1 << 30  # Bytes: ten seconds. Above 2 GiB it cannot be written at all.
_SHUFFLE = "ShuffleDatasetV3"
_FAIL_AT_EXTERNAL_STATE = 2  # tensorflow/core/framework/dataset_options.proto
# These make the iterators of their inputs when they are made themselves, not when they
# are read: a shuffle below them has one order for each of their own iterators.
_MADE_AT_ONCE = {
    "AssertCardinalityDataset",
    "BatchDatasetV2",
    "FilterDataset",
    "MapAndBatchDataset",
    "MapDataset",
    "MaxIntraOpParallelismDataset",
    "ModelDataset",
    "OptionsDataset",
    "PaddedBatchDatasetV2",
    "ParallelBatchDataset",
    "ParallelMapDatasetV2",
    "PrefetchDataset",
    "PrivateThreadPoolDataset",
    "SkipDataset",
    "TakeDataset",
    "ZipDataset",
    "_Retval",
}
# Iterators of these go on exactly from a place that they have told; one of a cache that
# is not yet full leaves rows out (2.21).
_TELLABLE = _MADE_AT_ONCE | {
    _SHUFFLE,
    "ConcatenateDataset",
    "FixedLengthRecordDatasetV2",
    "FlatMapDataset",
    "InterleaveDataset",
    "ParallelInterleaveDatasetV4",
    "RangeDataset",
    "RepeatDataset",
    "ShardDataset",
    "TFRecordDatasetV2",
    "TensorDataset",
    "TensorSliceDataset",
    "TextLineDataset",
    "UnbatchDataset",
    "WindowDataset",
}


@dataclasses.dataclass(frozen=True)
class Passes:
    """How the passes through a dataset are related.

    Attributes:
        alike: Whether all are known to be the same.
        independent: Whether a pass is known not to depend on how far the passes before
            it were read, but at most on how many there were.
        tellable: Whether an iterator is known to go on exactly from a place that
            another one has told, and passes after it as well.
    """

    alike: bool
    independent: bool
    tellable: bool


def passes_of(dataset: tf.data.Dataset) -> Passes:
    """How the passes through a dataset are related, as far as its graph tells."""
    unknown = Passes(alike=False, independent=False, tellable=False)
    if _keras.held_bytes(dataset) > _LARGEST_GRAPH:
        return unknown
    try:
        text = tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset),
            external_state_policy=_FAIL_AT_EXTERNAL_STATE,
        ).numpy()
    except tf.errors.OpError:  # It has variables, draws numbers or calls Python.
        return unknown
    if not text:  # Functions with large tensors.
        return unknown
    graph = tf.compat.v1.GraphDef.FromString(text)
    nodes = {node.name: node for node in graph.node}

    def inputs_of(node: Any) -> list[Any]:
        return [nodes[each.lstrip("^").partition(":")[0]] for each in node.input]

    @functools.cache
    def is_shuffled(name: str) -> bool:
        node = nodes[name]
        return _draws(node.op) or any(is_shuffled(n.name) for n in inputs_of(node))

    # In functions, such as those of `interleave`, it would be external state.
    drawing = [node for node in graph.node if _draws(node.op)]
    above = [n for n in graph.node if any(is_shuffled(i.name) for i in inputs_of(n))]
    independent = all(node.op == _SHUFFLE for node in drawing) and all(
        node.op in _MADE_AT_ONCE for node in above
    )
    reading = {node.op for node in _all_nodes(graph) if _reads(node.op)}
    return Passes(not drawing, independent, independent and reading <= _TELLABLE)


def _all_nodes(graph: tf.compat.v1.GraphDef) -> Iterator[tf.compat.v1.NodeDef]:
    """The nodes of a graph and of its functions."""
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def _reads(operation: str) -> bool:
    return "Dataset" in operation


def _draws(operation: str) -> bool:
    return "Shuffle" in operation or "Random" in operation
