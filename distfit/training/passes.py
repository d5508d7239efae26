"""What a pass through a `tf.data.Dataset` depends on, as its graph tells."""

import dataclasses
import functools

import tensorflow as tf

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
    "ShuffleDatasetV3",
    "SkipDataset",
    "TakeDataset",
    "ZipDataset",
    "_Retval",
}


@dataclasses.dataclass(frozen=True)
class Passes:
    """How the passes through a dataset are related.

    Attributes:
        alike: Whether all are known to be the same.
        independent: Whether a pass is known not to depend on how far the passes before
            it were read, but at most on how many there were.
    """

    alike: bool
    independent: bool


def passes_of(dataset: tf.data.Dataset) -> Passes:
    """How the passes through a dataset are related, as far as its graph tells."""
    try:
        text = tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset),
            external_state_policy=_FAIL_AT_EXTERNAL_STATE,
        )
    except tf.errors.OpError:  # It has variables, draws numbers or calls Python.
        return Passes(alike=False, independent=False)
    graph = tf.compat.v1.GraphDef.FromString(text.numpy())
    nodes = {node.name: node for node in graph.node}

    @functools.cache
    def is_shuffled(name: str) -> bool:
        node = nodes[name]
        inputs = (each.lstrip("^").partition(":")[0] for each in node.input)
        return _draws(node.op) or any(is_shuffled(each) for each in inputs)

    # In functions, such as those of `interleave`, it would be external state.
    shuffled = [node for node in graph.node if is_shuffled(node.name)]
    return Passes(
        alike=not shuffled,
        independent=all(node.op in _MADE_AT_ONCE for node in shuffled),
    )


def _draws(operation: str) -> bool:
    return "Shuffle" in operation or "Random" in operation
