"""Repeated calls of a compiled function with one iterator, with little overhead.

| names | why |
|---|---|
| `ConcreteFunction._call_flat` | runs a function on tensors: a `tf.function` inspects \
its arguments and captures in Python at each call, which takes longer than a small \
step |
| `deferred_external_captures` | captures that change with each call: on several \
workers, the keys of its exchanges |
"""

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf


class IteratorCalls:
    """A `tf.function` of an iterator, inspected once instead of at each call.

    Args:
        function: A `tf.function`.
    """

    def __init__(self, function: Any):
        self._function = function
        # A weak reference: if a cycle held the iterator, the garbage collector would
        # block the program for seconds, until TensorFlow has released it.
        self._iterator: Callable[[], Any] = lambda: None
        self._calls: dict[tuple, Callable] = {}

    def __call__(self, iterator: tf.data.Iterator, *tensors: Any, **options: Any):
        """Calls the function.

        Args:
            iterator: The first argument.
            tensors: Structures of tensors; for one iterator always the same structures
                and dtypes.
            options: Python values.
        """
        if self._iterator() is not iterator:
            self._iterator = weakref.ref(iterator)
            self._calls = {}
        key = tuple(options.items())
        if key not in self._calls:
            concrete = self.get_concrete_function(iterator, *tensors, **options)
            self._calls[key] = _call_of(concrete)
        return self._calls[key](iterator, *tensors)

    def get_concrete_function(self, *args: Any, **options: Any) -> Any:
        """The concrete function that the `tf.function` runs for these arguments."""
        return self._function.get_concrete_function(*args, **options)


def _call_of(concrete: Any) -> Callable:
    captured = concrete.captured_inputs
    changing = bool(concrete.graph.deferred_external_captures)

    def call(*args: Any) -> Any:
        given = tf.nest.flatten(args, expand_composites=True)
        now = concrete.captured_inputs if changing else captured
        return concrete._call_flat(given, now)

    return call
