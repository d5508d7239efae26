"""Cuts a global batch: each replica gets its rows of every tensor that has rows."""

import collections
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras import tree

from distfit.cluster import workers
from distfit.partition.exchanges import Replicas
from distfit.partition.step import Share


class Layout:
    """Which tensors of a batch have rows.

    A tensor has rows if its first dimension is that of the batch. If the specs give all
    sizes, that is the most common of them. A tensor whose spec leaves the size open has
    rows if its sizes in `batches` are the most common ones; without `batches` it is
    assumed to have rows, which is checked when a batch is cut.

    Args:
        spec: The structure of specs of a global batch.
        batches: Global batches, if some could be read.

    Attributes:
        spec: The structure of specs, with None for absent parts.
        cut: The same structure of booleans: whether it is a tensor with rows.
        has_rows: The same for each tensor of the batch, composite ones taken apart.
        rows: The number of rows of every batch; None if it may change.
    """

    def __init__(self, spec: Any, *batches: Any):
        self.spec = tree.map_structure(_none_if_optional, spec)
        leaves = tf.nest.flatten(self.spec)
        dense = [leaf for leaf in leaves if _has_first_dimension(leaf)]
        sizes = [leaf.shape[0] for leaf in dense]
        self.rows: int | None = None
        if sizes and None not in sizes:
            self.rows = _most_common(sizes)
        others = _of_other_sizes(leaves, batches)
        cut = [
            _has_first_dimension(leaf)
            and leaf.shape[0] == self.rows
            and index not in others
            for index, leaf in enumerate(leaves)
        ]
        self.cut = tf.nest.pack_sequence_as(self.spec, cut)
        self.has_rows: list[bool] = []
        for leaf, is_cut in zip(leaves, cut, strict=True):
            if leaf is not None:
                parts = tf.nest.flatten(leaf, expand_composites=True)
                self.has_rows += [is_cut] * len(parts)


def _of_other_sizes(leaves: list, batches: Sequence[Any]) -> set[int]:
    """Indices of the tensors of open size whose sizes are not the most common."""
    sizes: dict[int, tuple] = {}
    for batch in batches:
        # A batch may lack weights that are computed from its classes.
        pairs = enumerate(zip(leaves, tf.nest.flatten(batch), strict=False))
        for index, (leaf, value) in pairs:
            is_open = _has_first_dimension(leaf) and leaf.shape[0] is None
            if is_open and _is_array(value):
                sizes[index] = (*sizes.get(index, ()), value.shape[0])
    rows = _most_common(list(sizes.values())) if sizes else None
    return {index for index, size in sizes.items() if size != rows}


def _is_array(value: Any) -> bool:
    return bool(getattr(value, "shape", ()))


def _most_common(sizes: list) -> Any:
    """The most common of some sizes; the first of them if several are."""
    return collections.Counter(sizes).most_common(1)[0][0]


def _none_if_optional(spec: Any) -> Any:
    absent = isinstance(spec, tf.OptionalSpec | tf.NoneTensorSpec)
    return None if absent else spec


def _has_first_dimension(spec: Any) -> bool:
    return isinstance(spec, tf.TensorSpec) and bool(spec.shape.rank)


def tensors_of(batch: Any) -> list[tf.Tensor]:
    """The tensors of a batch, composite ones taken apart; None is left out."""
    # Keras's adapters use an empty optional for None.
    given = [
        leaf
        for leaf in tf.nest.flatten(batch)
        if not isinstance(leaf, tf.experimental.Optional)
    ]
    flat = tf.nest.flatten(given, expand_composites=True)
    return [t for t in flat if tf.is_tensor(t)]


def rows_of(batch: Any, has_rows: Sequence[bool]) -> tf.Tensor:
    """The number of rows of a batch, an int32 scalar; 0 if nothing has rows."""
    pairs = zip(tensors_of(batch), has_rows, strict=True)
    return next((tf.shape(t)[0] for t, rows in pairs if rows), tf.constant(0))


def shares(batch: Any, has_rows: Sequence[bool], replicas: Replicas) -> Share:
    """Cuts a global batch for the replicas of this process.

    Replica r of N has rows `[total * r // N, total * (r + 1) // N)`; where there are
    fewer rows than replicas, some have none.
    """
    tensors = tensors_of(batch)
    local, every = replicas.count, replicas.num_replicas
    if every == 1:
        return Share([[t] for t in tensors], [None] * len(tensors), [], [], [], [])
    with tf.device("CPU:0"):
        total = rows_of(batch, has_rows)
        # Hide constants from TensorFlow: its graph optimizer crashes the process when
        # it divides by the size of a tensor that it knows to be empty.
        total = tf.compat.v1.placeholder_with_default(total, ())
        bounds = total * tf.range(every + 1) // every
        counts = bounds[1:] - bounds[:-1]
        own = slice(replicas.first, replicas.first + local)
        parts: list[list] = []
        for i, (tensor, rows) in enumerate(zip(tensors, has_rows, strict=True)):
            if rows:
                # All others must have as many rows as the first.
                is_first = i == has_rows.index(True)
                checks = [] if is_first else checks_of_rows(tensor, total)
                with tf.control_dependencies(checks):
                    parts.append(tf.split(tensor, counts, num=every)[own])
            else:
                parts.append([tensor] * local)
        starts = tf.unstack(bounds[:-1], num=every)
        return Share(
            parts,
            list(tensors),
            [total] * local,
            starts[own],
            tf.unstack(counts, num=every)[own],
            [tf.constant(replicas.first + r) for r in range(local)],
        )


_OTHER_ROWS = (
    "The tensors of a batch must have the same number of rows where their specs leave "
    "it open. Give a tensor with another first dimension a spec of known size: by "
    "drop_remainder=True, tf.ensure_shape in a map, or as in tf.TensorSpec((10, 3))."
)


def checks_of_rows(tensor: tf.Tensor, rows: tf.Tensor) -> list:
    """Asserts the number of rows of a tensor whose spec leaves it open."""
    if tensor.shape[0] is not None:
        return []
    return [tf.debugging.assert_equal(tf.shape(tensor)[0], rows, _OTHER_ROWS)]


def shares_of_shards(
    batches: Sequence[Any],
    counts: tf.Tensor,
    has_rows: Sequence[bool],
    replicas: Replicas,
) -> Share:
    """The share of each replica, where each brings its own rows.

    Args:
        batches: The batch of each replica of this process.
        counts: int32 of shape (num_replicas,): the rows of all replicas.
        has_rows: For each tensor, whether it has rows.
        replicas: The replicas of this process.
    """
    every = replicas.num_replicas
    with tf.device("CPU:0"):
        each = tf.unstack(counts, num=every)
        starts = tf.unstack(tf.cumsum(counts, exclusive=True), num=every)
        own = slice(replicas.first, replicas.first + replicas.count)
        parts = [
            [
                tensor[:rows] if rowed else tensor
                for tensor, rows in zip(of_replicas, each[own], strict=True)
            ]
            for of_replicas, rowed in zip(
                zip(*map(tensors_of, batches), strict=True), has_rows, strict=True
            )
        ]
        total = [tf.reduce_sum(counts)] * replicas.count
    index = [tf.constant(replicas.first + r) for r in range(replicas.count)]
    return Share(parts, [None] * len(parts), total, starts[own], each[own], index)


def replicas_of(strategy: tf.distribute.Strategy) -> Replicas:
    """The replicas of this process."""
    every = strategy.num_replicas_in_sync
    try:
        devices = list(strategy.extended.worker_devices)
    except (AttributeError, RuntimeError):  # No strategy at all.
        devices = [""]
    team = workers.of(strategy)
    return Replicas(strategy, devices[: every // team.count], every, team.first_replica)
