"""Finds the first step of an epoch with a non-finite loss, and the replica."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit.cluster import workers
from distfit.training import checks


class FiniteWatch:
    """Records, inside the compiled step, the first step with a NaN or an infinity.

    It is traced as part of the step, so it sees the logs of the global batch and tells
    fused steps apart. It checks the logs with "loss" in their name, or all logs if
    there are none.
    """

    def __init__(self) -> None:
        with tf.init_scope():
            self._step = tf.Variable(0, trainable=False, dtype=tf.int64)
            self._first_bad_step = tf.Variable(0, trainable=False, dtype=tf.int64)

    def around(self, step: Callable) -> Callable:
        """The same step, with a check of the logs that it returns."""

        @functools.wraps(step)
        def watched(batch):
            logs = step(batch)
            self._look(logs)
            return logs

        return watched

    def _look(self, logs: Any) -> None:
        step = self._step.read_value() + 1
        self._step.assign(step)
        bad = [tf.reduce_any(~tf.math.is_finite(log)) for log in _floats(logs)]
        if bad:
            known = self._first_bad_step.read_value()
            is_first = tf.logical_and(tf.equal(known, 0), tf.reduce_any(tf.stack(bad)))
            self._first_bad_step.assign(tf.where(is_first, step, known))

    def reset(self) -> None:
        """Restarts the count of steps."""
        self._step.assign(0)
        self._first_bad_step.assign(0)

    def first(self) -> int | None:
        """The first bad step since the reset, counted from 1; None if there is none."""
        return int(self._first_bad_step.numpy()) or None


def _floats(logs: Any) -> list[tf.Tensor]:
    """The floats among the losses, or among all logs if there are no losses."""
    if isinstance(logs, dict):
        losses = {name: log for name, log in logs.items() if "loss" in name}
        logs = losses or logs
    values = [v for v in keras.tree.flatten(logs) if isinstance(v, float | tf.Tensor)]
    tensors = map(tf.convert_to_tensor, values)
    return [tensor for tensor in tensors if tensor.dtype.is_floating]


def bad_replica(model: keras.Model) -> int | None:
    """The replica whose metrics are not finite; None unless it is exactly one.

    Each replica keeps its own part of a metric's sum, so this is the one whose rows
    gave the value; or the first, which alone adds values that all replicas compute.
    """
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync == 1:
        return 0
    if checks.runs_eagerly(model):  # The first replica has all rows.
        return None
    team = workers.of(strategy)
    bad: set[int] = set()
    for metric in checks.metrics_of(model):
        for variable in filter(_keras.is_summed_on_read, metric.variables):
            parts = _keras.local_copies(variable)
            for replica, part in enumerate(parts, team.first_replica):
                if part.dtype.is_floating and not _is_finite(part):
                    bad.add(replica)
    told = team.tell("the replica of a loss that is not finite", sorted(bad))
    found = [replica for of_worker in told for replica in of_worker]
    return found[0] if len(found) == 1 else None


def _is_finite(part: tf.Variable) -> bool:
    return bool(tf.reduce_all(tf.math.is_finite(part.read_value())))
