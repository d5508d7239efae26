"""Any input -> batches, of the whole or of a shard for each worker."""

import tensorflow as tf

from distfit.cluster import workers
from distfit.training.global_batches import GlobalBatches
from distfit.training.shards import Shards, shard


def make_batches(strategy, x, y=None, sample_weight=None, **arguments) -> GlobalBatches:
    """The batches of what `fit()` takes, which may be a `dataset_fn`."""
    is_function = callable(x) and not isinstance(x, tf.data.Dataset)
    if not is_function:
        batches = GlobalBatches(x, y, sample_weight, **arguments)
        if workers.of(strategy).count > 1:
            batches.note_first_batch()
        return batches
    if y is not None or sample_weight is not None:
        raise ValueError(
            "The dataset of a `dataset_fn(input_context)` gives targets and weights "
            f"itself. Received: x={x}, with y or sample_weight. Give x alone."
        )
    kept = {k: arguments.get(k) for k in ("steps_per_epoch", "class_weight")}
    if strategy.num_replicas_in_sync == 1:
        return GlobalBatches(shard(x, strategy), **kept)
    return Shards(x, strategy, **kept)
