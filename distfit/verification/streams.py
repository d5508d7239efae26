"""One device that draws the random numbers of N replicas.

On N replicas each draws for its own rows, from a stream of its own. To hold a model
with Dropout to the numbers of one device, that device has to draw the same: for the
same row ranges, from the same streams.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from distfit import _keras
from distfit.collectives import rows_of_replica
from distfit.random import STREAM_OFFSET, dimensions, draws_in_common


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Makes nested functions part of what is being traced.

    TensorFlow would take a trace that it has of them, with other draws in it.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


class ReplicaStreams:
    """Draws as N replicas would, put together in the order of the global batch.

    Args:
        num_replicas: Number of replicas, N.
        rows: Rows of the global batch, an int32 scalar.
        grouped: How a draw for `k * rows` rows, with k > 1, is laid out. True: k
            batches one after the other, as after a `concat` of k inputs. False: k
            consecutive rows for each row of the batch, as after a reshape.
    """

    def __init__(self, num_replicas: int, rows: Any, grouped: bool = True):
        self.num_replicas = num_replicas
        self.rows = rows
        self.grouped = grouped

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Everything that Keras draws in the block is drawn so."""
        with _keras.composed_draws(self._for_shape, self._for_inputs):
            yield

    def _for_shape(self, draw, shape, seed):
        shape = dimensions(shape)
        if draws_in_common() or len(shape) == 0 or not tf.is_tensor(shape[0]):
            return draw(shape, seed)
        per_row = shape[0] // self.rows

        def draw_rows(replica, start, stop):
            rows = per_row * (stop - start)
            return draw((rows, *shape[1:]), self._seed_of(replica, shared))

        shared = _keras.SharedSeed(seed)
        return self._join(draw_rows, per_row)

    def _for_inputs(self, draw, inputs, seed):
        if draws_in_common() or inputs.shape.rank == 0 or inputs.shape[0] is not None:
            return draw(inputs, seed)
        per_row = tf.shape(inputs)[0] // self.rows
        split = self._split(inputs, per_row)

        def draw_rows(replica, start, stop):
            part = split[:, start:stop] if self.grouped else split[start:stop]
            shape = tf.concat([[-1], tf.shape(inputs)[1:]], 0)
            part = tf.ensure_shape(tf.reshape(part, shape), inputs.shape)
            return draw(part, self._seed_of(replica, shared))

        shared = _keras.SharedSeed(seed)
        return self._join(draw_rows, per_row)

    def _seed_of(self, replica: int, shared: _keras.SharedSeed):
        return shared.shifted(replica * STREAM_OFFSET)

    def _bounds(self, replica: int):
        """The rows that a replica draws for; all, by the first, where there are few."""
        rows = rows_of_replica(self.rows, replica, self.num_replicas)
        return rows.start, tf.where(rows.idle, rows.start, rows.stop)

    def _split(self, tensor, per_row):
        first = [per_row, -1] if self.grouped else [-1, per_row]
        return tf.reshape(tensor, tf.concat([first, tf.shape(tensor)[1:]], 0))

    def _join(self, draw_rows, per_row):
        parts = [draw_rows(r, *self._bounds(r)) for r in range(self.num_replicas)]
        shape = parts[0].shape
        if self.grouped:
            joined = tf.concat([self._split(part, per_row) for part in parts], axis=1)
        else:
            joined = tf.concat(parts, axis=0)
        joined = tf.reshape(joined, tf.concat([[-1], tf.shape(parts[0])[1:]], 0))
        return tf.ensure_shape(joined, [None, *shape[1:]])
