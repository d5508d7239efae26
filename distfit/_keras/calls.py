"""Compiled functions that are called again and again for one iterator.

| names | why |
|---|---|
| `ConcreteFunction._call_flat` | runs a function on tensors: a `tf.function` finds \
out at each call, in Python, what it is given and what it captures, which takes longer \
than a small step |
| `deferred_external_captures` | what each call captures anew: on several workers, the \
keys of its exchanges |
"""

import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf


class IteratorCalls:
    """A `tf.function` of an iterator, which is looked at once and not at each call.

    Args:
        function: A `tf.function`.
    """

    def __init__(self, function: Any):
        self._function = function
        # Nothing of an iterator is kept: where a cycle holds it, the garbage collector
        # stops the program until TensorFlow has released it, which takes seconds.
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
            self._calls[key] = _call_of(concrete)
        return self._calls[key](iterator, *tensors)

    def get_concrete_function(self, *args: Any, **options: Any) -> Any:
        """What the `tf.function` runs for such arguments."""
        return self._function.get_concrete_function(*args, **options)


def _call_of(concrete: Any) -> Callable:
    captured = concrete.captured_inputs
    changing = bool(concrete.graph.deferred_external_captures)

    def call(*args: Any) -> Any:
        given = tf.nest.flatten(args, expand_composites=True)
        now = concrete.captured_inputs if changing else captured
        return concrete._call_flat(given, now)

    return call
