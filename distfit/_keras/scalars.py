"""Replicated scalars as Python numbers.

Callbacks call `float(optimizer.learning_rate)` and `int(optimizer.iterations)`. Keras
delegates both to TensorFlow, whose distributed variables do not support them.
"""

from collections.abc import Iterable

import keras
import tensorflow as tf

from distfit import _keras


class ReplicatedScalar(keras.Variable):
    """A scalar variable with a copy on each replica."""

    def __float__(self):
        return float(self.numpy())

    def __int__(self):
        return int(self.numpy())


def make_convertible(variables: Iterable[keras.Variable]) -> None:
    """Lets `float(variable)` and `int(variable)` work for replicated scalars.

    Only these objects change their class; Keras's own class stays as it is.
    """
    for variable in variables:
        value = _keras.underlying(variable)
        replicated = isinstance(value, tf.distribute.DistributedValues)
        if type(variable) is keras.Variable and variable.ndim == 0 and replicated:
            variable.__class__ = ReplicatedScalar
