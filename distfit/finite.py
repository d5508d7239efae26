"""Where a loss first stopped being finite: the step and the replica."""

import keras
import tensorflow as tf

from distfit import workers
from distfit.collectives import Share


class FiniteWatch:
    """Notes, inside the compiled step, the first step with a NaN or an infinity.

    Its two variables are local to each replica, so the watch needs no exchange. Create
    it in the scope of the strategy.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        self._step = _counter("step")
        self._first_bad_step = _counter("first_bad_step")

    def look(self, share: Share, logs: dict) -> None:
        """Checks what this replica added to the losses of a step, else its logs."""
        values = share.local_parts or list(logs.values())
        floats = [v for v in map(tf.convert_to_tensor, values) if v.dtype.is_floating]
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(v)) for v in floats])
        finite = tf.logical_or(finite, share.idle)
        step = self._step.value + 1
        known = self._first_bad_step.value
        is_first = tf.logical_and(tf.equal(known, 0), tf.logical_not(finite))
        self._step.assign(step)
        self._first_bad_step.assign(tf.where(is_first, step, known))

    def reset(self) -> None:
        """Starts counting steps anew."""
        self._step.assign(0)
        self._first_bad_step.assign(0)

    def first(self) -> tuple[int, int] | None:
        """The first bad step, counted from 1, and its replica; None if all was well.

        Of several workers, each looks at its own replicas.
        """
        copies = self._strategy.experimental_local_results(self._first_bad_step.value)
        first = workers.of(self._strategy).first_replica
        found = [(int(c), r) for r, c in enumerate(copies, first) if int(c) > 0]
        return min(found, default=None)


def _counter(name: str) -> keras.Variable:
    return keras.Variable(0, dtype="int64", trainable=False, name=name)
