"""Private names of `tf.random.Generator`.

| names | why |
|---|---|
| `skip`, `_preprocess_key` | methods that act on the copies of all replicas, or draw \
other numbers on each; others stand in for them while a step is traced |
| `_skip_single_var` | moves the state of one copy |
| `_distribution_strategy` | the strategy in whose scope a generator was made |
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from distfit._keras.alive import instances_of
from distfit._keras.shadows import shadowed


@contextlib.contextmanager
def of_one_device() -> Iterator[None]:
    """Lets all generators draw as on one device, in this thread.

    One that was made in the scope of a strategy has a state on each replica. Its own
    methods would move all of them; in a step that is traced as for one device, the
    first is moved, and moving it is then done to all alike.
    """
    with shadowed(_distributed, _methods):
        yield


def _distributed() -> list[Any]:
    found = instances_of(tf.random.Generator)
    return [g for g in found if vars(g).get("_distribution_strategy") is not None]


def _methods(generator: Any) -> dict[str, Callable]:
    def skip(delta):
        return generator._skip_single_var(generator.state, delta)

    return {"skip": skip, "_preprocess_key": lambda key: key}
