"""Measures how long steps wait for their data."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


class DataClock:
    """Adds up, inside the compiled steps too, the seconds that wait for data."""

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            self._seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64)

    @property
    def seconds(self) -> float:
        return float(self._seconds.numpy())

    def timed(self, read: Callable[[], Any], after: Sequence[tf.Tensor] = ()) -> Any:
        """Reads a batch.

        Args:
            read: Reads it: returns a structure of tensors or an optional.
            after: What the step computes beside which it is read: only what the reading
                takes longer counts.
        """
        with tf.control_dependencies(after):
            began = tf.timestamp()
        with tf.control_dependencies([] if after else [began]):
            batch = read()
        with tf.control_dependencies(tf.nest.flatten(batch, expand_composites=True)):
            ended = tf.timestamp()
        self._seconds.assign_add(tf.maximum(ended - began, 0))
        return batch
