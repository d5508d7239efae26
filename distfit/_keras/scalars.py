"""Replicated scalars as Python numbers.

Callbacks ask `float(optimizer.learning_rate)` and `int(optimizer.iterations)`. Keras
hands the question on to TensorFlow, whose distributed variables cannot answer it.
"""

from collections.abc import Iterable

import keras
import tensorflow as tf

from distfit import _keras


class ReplicatedScalar(keras.Variable):
    """A variable of one number, of which each replica has a copy."""

    def __float__(self):
        return float(self.numpy())

    def __int__(self):
        return int(self.numpy())


def make_convertible(variables: Iterable[keras.Variable]) -> None:
    """Lets `float(variable)` and `int(variable)` work for replicated scalars.

    These objects get another class; Keras's own stays what it is.
    """
    for variable in variables:
        value = _keras.underlying(variable)
        replicated = isinstance(value, tf.distribute.DistributedValues)
        if type(variable) is keras.Variable and variable.ndim == 0 and replicated:
            variable.__class__ = ReplicatedScalar
