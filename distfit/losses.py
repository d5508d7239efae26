"""Losses of the global batch.

For values `l` (one per row, or per row and position), weights `w` and a mask, Keras
defines a loss as `sum(w * l) / divisor`, where the divisor follows from the reduction:

    sum                           1
    sum_over_batch_size, mean     number of values, or of unmasked ones
    mean_with_sample_weight       sum of the weights

Both sums run over the global batch here. The divisor has no gradient, so the gradient
of a replica's share is that of its own rows.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import ops, tree

from distfit import _keras, collectives, metrics
from distfit.collectives import distributed_share

_UNREDUCED = (None, "none")


class GlobalBatchLoss(keras.losses.Loss):
    """A `keras.losses.Loss` whose value is that of the global batch.

    This is what a loss becomes when it is assigned to an attribute of a
    `distfit.Model` or compiled into one, and what stands in for any other that a step
    calls. Outside of a step it is the loss it was made from; it presents itself as that
    loss to `isinstance` and to saving, so that saved files do not mention it.

    Args:
        loss: The `keras.losses.Loss` to stand for.
    """

    def __init__(self, loss: keras.losses.Loss):
        self.loss = loss

    def __call__(self, y_true, y_pred, sample_weight=None):
        """Returns the loss of the global batch, a scalar.

        Args:
            y_true, y_pred: What the wrapped loss takes, with this replica's rows.
            sample_weight: Optional weights, as in Keras.
        """
        share = distributed_share()
        if share is None or self.loss.reduction in _UNREDUCED:
            return self.loss(y_true, y_pred, sample_weight)
        if type(self.loss).__call__ is not keras.losses.Loss.__call__:
            return _reduce_custom_call(self.loss(y_true, y_pred, sample_weight))
        with tf.name_scope(self.loss.name):
            values, mask = _values_and_mask(self.loss, y_true, y_pred)
            return _reduce(values, sample_weight, mask, self.loss.reduction, share)

    def call(self, y_true, y_pred):
        return self.loss.call(y_true, y_pred)

    def get_config(self):
        return self.loss.get_config()

    @property
    def dtype(self):
        return self.loss.dtype

    @property  # type: ignore[misc]  # What `isinstance` and saving look at.
    def __class__(self):
        return type(self.loss)

    def __getattr__(self, name):
        if name == "loss":  # Not set yet, as while copying.
            raise AttributeError(name)
        return getattr(self.loss, name)


class GlobalBatchCompileLoss(_keras.CompileLoss):
    """The loss of `compile()`: each output's own loss is that of the global batch."""

    def build(self, y_true, y_pred):
        super().build(y_true, y_pred)
        _keras.wrap_losses(self, adapt)
        for tracker in self.metrics:
            metrics.adapt(tracker)


def adapt(value: Any) -> Any:
    """Returns the global-batch form of a loss, and of losses in lists and dicts."""
    if isinstance(value, _keras.CompileLoss):
        value.__class__ = GlobalBatchCompileLoss
        return value
    if isinstance(value, keras.losses.Loss) and type(value) is not GlobalBatchLoss:
        return GlobalBatchLoss(value)
    return value


def _values_and_mask(loss, y_true, y_pred):
    """What `keras.losses.Loss.__call__` computes before it reduces."""
    mask = _keras.mask_of(y_pred)
    convert = _to_dtype(loss.dtype)
    y_pred = tree.map_structure(convert, y_pred)
    y_true = tree.map_structure(convert, y_true)
    values = loss.call(y_true, y_pred)
    out_mask = _keras.mask_of(values)
    if out_mask is not None:
        mask = out_mask if mask is None else mask & out_mask
    return ops.convert_to_tensor(values, dtype=loss.dtype), mask


def _to_dtype(dtype):
    return lambda tensor: ops.convert_to_tensor(tensor, dtype=dtype)


def _reduce(values, sample_weight, mask, reduction, share):
    if sample_weight is not None:
        sample_weight = ops.convert_to_tensor(sample_weight, dtype=values.dtype)
    weights = _keras.apply_mask(sample_weight, mask, values.dtype, reduction="sum")
    if values.shape.rank == 0:
        return _reduce_scalar(values, weights, reduction)
    if weights is not None:
        values, weights = _keras.squeeze_or_expand_to_same_rank(values, weights)
        values = values * weights
    total = tf.reduce_sum(values)
    if reduction == "sum":
        return collectives.global_sum(total)
    if reduction == "mean_with_sample_weight" and weights is not None:
        return collectives.global_ratio(total, tf.reduce_sum(weights))
    if mask is not None:
        per_position = collectives.size_of(values) / tf.cast(
            tf.size(mask), values.dtype
        )
        valid = tf.reduce_sum(tf.cast(mask, values.dtype))
        return collectives.global_ratio(total, valid * per_position)
    return _mean(total, values, share)


def _mean(total, values, share):
    """The mean over all values; without asking how many, if rows tell it."""
    size = collectives.size_of(values)
    share.loss_calls += 1
    if share.plan is None or not share.plan.follows_rows(share.loss_calls - 1, values):
        return collectives.global_ratio(total, size)
    rows = tf.cast(share.global_rows, size.dtype)
    size = size / tf.cast(share.local_rows, size.dtype) * rows
    return collectives.global_ratio(total, size, divisor_is_global=True)


def _reduce_scalar(value, weights, reduction):
    """A loss function that returns a scalar gives the mean of its local rows."""
    if weights is None:
        return _reduce_custom_call(value, is_sum=reduction == "sum")
    value = collectives.mean_of_local_means(value)
    total = tf.reduce_sum(weights)
    if reduction == "mean_with_sample_weight":
        return value
    if reduction == "sum":
        return value * tf.stop_gradient(collectives.global_sum(total))
    size = collectives.size_of(weights)
    return value * tf.stop_gradient(collectives.global_ratio(total, size))


def _reduce_custom_call(value, is_sum: bool = False):
    """What a loss that does its own reduction returned for the local rows."""
    if value.shape.rank != 0:
        return value
    if is_sum:
        return collectives.global_sum(value)
    return collectives.mean_of_local_means(value)


def _collect(layer: keras.layers.Layer) -> list:
    """The losses of a layer and its parts, of the global batch.

    One that a layer added counts as the mean of its rows, which Keras's activity
    penalties are too; a penalty on weights is the same on every replica.
    """
    added = [
        collectives.mean_of_local_means(loss)
        for part in _keras.layers_of(layer)
        for loss in _keras.own_losses(part)
    ]
    penalties = _keras.regularization_losses(layer)
    return added + [collectives.replicated(penalty) for penalty in penalties]


def _in_distributed_step() -> bool:
    return distributed_share() is not None


_keras.set_aside_loss_scaling(_in_distributed_step)
_keras.intercept_losses(_in_distributed_step, GlobalBatchLoss)
_keras.replace_losses(_in_distributed_step, _collect)
