"""Batches that each worker reads itself: its shard of the data."""

import functools
import itertools
from typing import Any

import numpy as np
import tensorflow as tf
from keras import tree

from distfit.cluster import workers
from distfit.partition.exchanges import Replicas
from distfit.training.batch import num_rows
from distfit.training.global_batches import GlobalBatches
from distfit.training.shares import Layout, checks_of_rows, replicas_of, tensors_of


class Shards(GlobalBatches):
    """Batches that each worker reads itself: its shard of data too large for one.

    A global batch then consists of the replicas' batches, in replica order. The epoch
    ends when no replica has rows left. Until then, a replica without rows uses stand-in
    rows that count as none, since no replica can skip an exchange.

    Args:
        dataset_fn: `dataset_fn(input_context)` returns the `tf.data.Dataset` of this
            worker, with per-replica batches.
        strategy: The strategy of the model.
        steps_per_epoch, class_weight: As in `Model.fit`.
    """

    others_may_have_rows = True

    def __init__(
        self, dataset_fn, strategy, *, steps_per_epoch=None, class_weight=None
    ):
        super().__init__(
            shard(dataset_fn, strategy),
            steps_per_epoch=steps_per_epoch,
            class_weight=class_weight,
        )
        self.strategy = strategy
        self.elements_of_batch = replicas_of(strategy).count
        leaves = zip(
            tf.nest.flatten(self.layout.spec),
            tf.nest.flatten(self.layout.cut),
            strict=True,
        )
        for leaf, is_cut in leaves:
            if not is_cut and leaf is not None:
                raise ValueError(
                    "The batches of a `dataset_fn` must consist of dense tensors with "
                    f"the same number of rows. Received: elements with {leaf}. Convert "
                    "them in a `map`, or pass `fit()` a dataset of global batches."
                )
        self.dataset = with_stand_ins(self.dataset)
        self.layout = Layout(self.dataset.element_spec[0])
        self.num_batches = None  # Those of other workers are not known.
        self._never_ends = False

    def facts(self, name: str) -> dict[str, Any]:
        """See `GlobalBatches.facts`. Who reads which rows depends on the replicas."""
        readers = (workers.of(self.strategy).count, self.strategy.num_replicas_in_sync)
        return super().facts(name) | {f"workers and replicas of {name}": readers}

    def has_next(self) -> bool:
        """Whether any replica has rows for the next step."""
        return bool(np.any(self.take_next()[1]))

    @property
    def _spec_of_next(self) -> Any:
        replicas = replicas_of(self.strategy)
        batch, _ = self._iterator.element_spec
        rows = tf.TensorSpec([replicas.num_replicas], tf.int32)
        return tf.OptionalSpec((batch,) * replicas.count), rows

    def _read_next(self) -> tuple:
        """`(batches of this worker's replicas, rows of all replicas)`, for a step."""
        return _first_shards(self._iterator, replicas_of(self.strategy))


def shard(dataset_fn, strategy) -> tf.data.Dataset:
    """The dataset of this worker.

    Raises:
        ValueError: if the function returns no dataset.
    """
    own = workers.of(strategy)
    context = tf.distribute.InputContext(
        num_input_pipelines=own.count,
        input_pipeline_id=own.index,
        num_replicas_in_sync=strategy.num_replicas_in_sync,
    )
    dataset = dataset_fn(context)
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "A function passed as x must return the `tf.data.Dataset` of a worker's "
            f"batches. Received: {type(dataset).__name__} from {dataset_fn}."
        )
    return dataset


def with_stand_ins(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Batches with their numbers of rows, then endlessly one row, counted as 0.

    That row is the first of the data, so that a step can process it like any other;
    zeros if there are no data.
    """
    several = isinstance(dataset.element_spec, tuple)

    def counted(*batch):
        batch = batch if several else batch[0]
        rows = num_rows(batch)
        each = [checks_of_rows(tensor, rows) for tensor in tensors_of(batch)]
        with tf.control_dependencies(itertools.chain(*each)):
            return batch, tf.identity(rows)

    def shown(kept, element):
        (row, is_kept), (batch, rows) = kept, element
        row = tf.cond(
            tf.logical_or(is_kept, rows == 0), lambda: row, lambda: _first_row(batch)
        )
        batch = tf.cond(rows > 0, lambda: batch, lambda: row)
        return (row, tf.logical_or(is_kept, rows > 0)), (batch, rows)

    blank = tree.map_structure(_blank_row, dataset.element_spec)
    own = dataset.map(counted).filter(lambda batch, rows: rows > 0)
    endless = own.concatenate(tf.data.Dataset.from_tensors((blank, 0)).repeat())
    # One pass through the source: each has another order, and may take long.
    return endless.scan((blank, False), shown)


def _first_row(batch: Any) -> Any:
    return tree.map_structure(lambda tensor: tensor[:1], batch)


def _blank_row(spec: tf.TensorSpec) -> tf.Tensor:
    """One row of zeros, or of empty strings."""
    return tf.zeros([1, *(size or 1 for size in spec.shape[1:])], spec.dtype)


def next_shards(iterator, replicas: Replicas) -> tuple:
    """Reads a step's batches of this worker's replicas and learns all row counts.

    Returns:
        An optional with a tuple of batches, and int32 of shape (num_replicas,).
    """
    batches, rows = zip(*(next(iterator) for _ in range(replicas.count)), strict=True)
    own = tf.stack(rows)
    if replicas.count < replicas.num_replicas:
        before = replicas.first
        after = replicas.num_replicas - before - replicas.count
        mine = tf.pad(own, [[before, after]])
        parts = [mine] + [tf.zeros_like(mine)] * (replicas.count - 1)
        own = replicas.sum([parts])[0][0]
    return tf.experimental.Optional.from_value(batches), own


@functools.partial(tf.function, autograph=False, reduce_retracing=True)
def _first_shards(iterator, replicas):
    return next_shards(iterator, replicas)
