"""Metrics of the global batch.

The state of a metric is local to a replica and summed when it is read, so an update
with local rows needs no exchange. Two kinds of update need care: one with a loss, which
is global already, and one on a replica that is idle.
"""

import contextlib
import functools
import types
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras
from distfit.collectives import Share, distributed_share


class RowMean(keras.metrics.Metric):
    """The mean of a log over rows and steps: what an untracked log is reported as.

    Args:
        shape: Shape of the value.
        name: The key of the log.
    """

    def __init__(self, shape=(), name="row_mean"):
        super().__init__(name=name)
        self.total = self.add_variable(shape=shape, initializer="zeros", name="total")
        self.rows = self.add_variable(shape=(), initializer="zeros", name="rows")

    def update_state(self, value, rows, value_rows=None):
        """Adds a value.

        Args:
            value: The value.
            rows: The rows that it stands for.
            value_rows: What `value` is to be multiplied by, `rows` by default.
        """
        rows = tf.cast(rows, self.dtype)
        value_rows = rows if value_rows is None else tf.cast(value_rows, self.dtype)
        self.total.assign(self.total + tf.cast(value, self.dtype) * value_rows)
        self.rows.assign(self.rows + rows)

    def keep(self, value, share: Share) -> None:
        """Adds what a step returned on one replica.

        Of a global value the replica's own part is enough: the parts are summed when
        the mean is read. The value itself then has no reader, and its exchange drops
        out of the step.
        """
        local = share.local_part(value)
        if local is None:
            self.update_state(share.counted(value), share.rows_counted)
        else:
            self.update_state(
                share.counted(local), share.rows_counted, share.global_rows
            )

    def result(self):
        return tf.math.divide_no_nan(tf.convert_to_tensor(self.total), self.rows)


class LastValue(RowMean):
    """The latest value of a log that is computed from the results of metrics."""

    def keep(self, value, share: Share) -> None:
        rows = tf.cast(share.rows_counted, self.dtype)
        self.total.assign(tf.cast(share.counted(value), self.dtype) * rows)
        self.rows.assign(rows)


def adapt(metric: keras.metrics.Metric) -> None:
    """Makes a metric's `update_state` fit for a step of several replicas, in place."""
    if "update_state" not in metric.__dict__:
        metric.update_state = types.MethodType(_update_state, metric)


def adapt_result(metric: keras.metrics.Metric) -> None:
    """Makes `result` that of all replicas where a step computes with it, in place."""
    metric.result = types.MethodType(_result, metric)


def _result(self):
    share = distributed_share()
    if share is None:
        return type(self).result(self)
    with read([self], share):
        return type(self).result(self)


def read(
    metrics: Iterable[keras.metrics.Metric], share: Share
) -> contextlib.AbstractContextManager:
    """Sums the state of metrics over the replicas, all in one exchange.

    Returns:
        A context manager; in its block the metrics have the state of all replicas.
    """
    variables = [v for metric in metrics for v in metric.variables]
    state = share.all_reduce([_part_of_state(v, share) for v in variables])
    mapping = list(zip(variables, state, strict=True))
    return keras.StatelessScope(state_mapping=mapping)


def _part_of_state(variable: keras.Variable, share: Share) -> tf.Tensor:
    """What a replica adds to the value that a variable has when it is read."""
    value = tf.convert_to_tensor(variable.value)
    if variable.aggregation == "sum":
        return value
    if variable.aggregation == "mean":
        return value / share.num_replicas
    return value if share.replica == 0 else tf.zeros_like(value)


def _update_state(self, *args, **kwargs):
    update = functools.partial(type(self).update_state, self)
    share = distributed_share()
    if share is None:
        return update(*args, **kwargs)
    if counts_steps(args, kwargs):
        return _update_with_scalar(self, update, args, kwargs, share)
    if type(self) is keras.metrics.Mean and _is_loss_by_rows(self, args, kwargs, share):
        return _update_with_rows(update, share, *args, **kwargs)
    if share.idle is False:
        return update(*args, **kwargs)
    return _update_once(self, share, functools.partial(update, *args, **kwargs))


def counts_steps(args, kwargs) -> bool:
    """Whether an update has only scalars, as with a loss: it counts 1 per step."""
    values = tree.flatten((args, kwargs))
    return all(
        v is None or tf.convert_to_tensor(v).shape.rank == 0 for v in values
    ) and (sum(v is not None for v in values) == 1)


def _update_with_scalar(metric, update, args, kwargs, share: Share):
    """Updates a metric with a scalar, in the way that counts a global value once.

    A mean is fed with the local parts of a loss, as many times as there are parts:
    their mean is the loss, which then has no reader, and its exchange drops out of the
    step. Any other scalar has the weight of the rows that it was computed from.
    """
    value = args[0] if args else None
    local = share.local_part(value)
    if type(metric) is keras.metrics.Mean and args:
        if local is None:
            return update(share.counted(value), sample_weight=share.fraction)
        if isinstance(share.num_counted, int):
            return update(local * share.num_counted)
        # As much weight in all as in other steps, however many replicas are idle.
        parts = tf.cast(share.num_counted, local.dtype)
        weight = share.counted(share.num_replicas / parts)
        return update(share.counted(local) * parts, sample_weight=weight)
    if local is not None:
        return update(value) if share.replica == 0 else None
    if share.idle is False:
        return update(*args, **kwargs)
    return _update_once(metric, share, functools.partial(update, *args, **kwargs))


def _is_loss_by_rows(metric, args, kwargs, share: Share) -> bool:
    """Whether a mean is fed with a loss that is weighted by the rows of this replica.

    Keras's own `train_step` does so.
    """
    weight = args[1] if len(args) > 1 else kwargs.get("sample_weight")
    if not args or weight is None or share.local_part(args[0]) is None:
        return False
    return share.plan is not None and share.plan.weighs_rows(metric, weight)


def _update_with_rows(update, share: Share, loss, sample_weight):
    """Feeds the local part of a loss, which then has no reader.

    The rows of all replicas are the weight of all local parts together.
    """
    local: Any = share.local_part(loss)
    parts = tf.cast(share.global_rows, local.dtype)
    parts /= tf.cast(share.local_rows, local.dtype)
    weight = share.counted(sample_weight)
    return update(share.counted(local) * parts, sample_weight=weight)


def _update_once(metric, share: Share, update):
    """Updates a metric unless the replica is idle."""
    before = [tf.identity(v.value) for v in metric.variables]
    update()
    for variable, value in zip(metric.variables, before, strict=True):
        variable.assign(tf.where(share.idle, value, variable.value))


def all_of(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics of a model, whether or not its `metrics` property lists them."""
    return list(dict.fromkeys([*model.metrics, *_keras.tracked_metrics(model)]))


def flat_logs(logs: dict | None) -> dict[str, Any]:
    """The logs that a step returned, without nesting, as Keras reports them."""
    flat: dict[str, Any] = {}
    for name, value in (logs or {}).items():
        flat |= flat_logs(value) if isinstance(value, dict) else {name: value}
    return flat
