"""Private names of `tf.random.Generator`.

| names | why |
|---|---|
| `skip`, `_preprocess_key` | methods that act on the copies of all replicas, or draw \
different numbers on each; replaced while a step is traced |
| `_skip_single_var` | advances the state of one copy |
| `_distribution_strategy` | the strategy in whose scope a generator was made |
"""

from collections.abc import Callable
from typing import Any


def is_of_strategy(generator: Any) -> bool:
    """Whether a generator was made in the scope of a strategy."""
    return vars(generator).get("_distribution_strategy") is not None


def methods_of_one_device(generator: Any) -> dict[str, Callable]:
    """Methods with which a generator of a strategy draws as on one device.

    It has a state on each replica, and its own methods would advance all of them. In a
    step traced for one device only the first advances; the emitted step advances all.
    """

    def skip(delta):
        return generator._skip_single_var(generator.state, delta)

    return {"skip": skip, "_preprocess_key": lambda key: key}
