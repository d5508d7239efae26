"""Turns any input into global batches, or into a shard for each worker."""

import tensorflow as tf

from distfit.cluster import workers
from distfit.training.global_batches import GlobalBatches
from distfit.training.shards import Shards, shard


def make_batches(strategy, x, y=None, sample_weight=None, **arguments) -> GlobalBatches:
    """The batches of any input of `fit()`, including a `dataset_fn`."""
    is_function = callable(x) and not isinstance(x, tf.data.Dataset)
    if not is_function:
        batches = GlobalBatches(x, y, sample_weight, **arguments)
        if workers.of(strategy).count > 1:
            batches.note_first_batch()
        return batches
    if y is not None or sample_weight is not None:
        raise ValueError(
            "The dataset of a `dataset_fn(input_context)` must contain targets and "
            f"weights itself. Received: x={x}, with y or sample_weight. Pass only x."
        )
    kept = {k: arguments.get(k) for k in ("steps_per_epoch", "class_weight")}
    if strategy.num_replicas_in_sync == 1:
        return GlobalBatches(shard(x, strategy), **kept)
    return Shards(x, strategy, **kept)
