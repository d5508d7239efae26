"""Compiled functions that are called again and again for one iterator.

| names | why |
|---|---|
| `ConcreteFunction._call_flat` | runs a function on tensors: a `tf.function` finds \
out at each call, in Python, what it is given and what it captures, which takes longer \
than a small step |
"""

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf


class IteratorCalls:
    """A `tf.function` of an iterator, which is looked at once and not at each call.

    Args:
        function: A `tf.function`. It captures no more than variables and constants.
    """

    def __init__(self, function: Any):
        self._function = function
        # It is left to its owner when an iterator ends: that may take time.
        self._iterator: Callable[[], Any] = lambda: None
        self._calls: dict[tuple, Callable] = {}

    def __call__(self, iterator: tf.data.Iterator, *tensors: Any, **options: Any):
        """Calls the function.

        Args:
            iterator: The first argument.
            tensors: Structures of tensors; for one iterator always the same structures,
                of the same dtypes.
            options: Python values.
        """
        if self._iterator() is not iterator:
            self._iterator = weakref.ref(iterator)
            self._calls = {}
        key = tuple(options.items())
        if key not in self._calls:
            concrete = self.get_concrete_function(iterator, *tensors, **options)
            self._calls[key] = _call_of(concrete, iterator)
        return self._calls[key](tensors)

    def get_concrete_function(self, *args: Any, **options: Any) -> Any:
        """What the `tf.function` runs for such arguments."""
        return self._function.get_concrete_function(*args, **options)


def _call_of(concrete: Any, iterator: tf.data.Iterator) -> Callable:
    captured = concrete.captured_inputs
    resource = tf.nest.flatten(iterator, expand_composites=True)

    def call(tensors: tuple) -> Any:
        given = tf.nest.flatten(tensors, expand_composites=True)
        return concrete._call_flat([*resource, *given], captured)

    return call
