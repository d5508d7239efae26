"""BatchNormalization with the statistics of the global batch.

Each replica computes the moments of its own rows, all replicas exchange them once, and
everyone combines them as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances" (1979):

    mean = sum(n_r * mean_r) / n
    variance = sum(n_r * (variance_r + (mean_r - mean)^2)) / n

which, unlike the mean of squares minus the square of the mean, loses no digits.
"""

import keras
import tensorflow as tf

from distfit import _keras, collectives
from distfit.collectives import distributed_share


def adapt(model: keras.Model) -> None:
    """Gives the BatchNormalization layers of a model global-batch statistics."""
    for layer in _keras.layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            _keras.set_moments(layer, _moments)


def _moments(layer, inputs, mask):
    share = distributed_share()
    if share is None or share.model.batch_statistics == "local":
        return _keras.own_moments(layer, inputs, mask)
    axes = _keras.reduction_axes(layer)
    count, mean, variance = _local_moments(inputs, mask, axes)
    counts, means, variances = tf.unstack(
        collectives.stack_replicas(tf.stack([count, mean, variance])), axis=1
    )
    return _combine(tf.stop_gradient(counts), means, variances, axes)


def _local_moments(inputs, mask, axes):
    """Count, mean and variance of this replica's rows, all of the mean's shape."""
    if mask is None:
        mean, variance = tf.nn.moments(inputs, axes, keepdims=True)
        count = collectives.size_of(inputs) / collectives.size_of(mean)
        return count * tf.ones_like(mean), mean, variance
    weights = tf.cast(mask, inputs.dtype)[..., tf.newaxis] * tf.ones_like(inputs)
    count = tf.reduce_sum(weights, axes, keepdims=True)
    total = tf.reduce_sum(weights * inputs, axes, keepdims=True)
    mean = tf.math.divide_no_nan(total, count)
    squares = weights * tf.math.squared_difference(inputs, mean)
    total = tf.reduce_sum(squares, axes, keepdims=True)
    return count, mean, tf.math.divide_no_nan(total, count)


def _combine(counts, means, variances, axes):
    total = tf.reduce_sum(counts, axis=0)
    mean = tf.math.divide_no_nan(tf.reduce_sum(counts * means, axis=0), total)
    spread = variances + tf.math.squared_difference(means, mean)
    variance = tf.math.divide_no_nan(tf.reduce_sum(counts * spread, axis=0), total)
    return tf.squeeze(mean, axes), tf.squeeze(variance, axes)
