"""Private names of Keras's optimizers.

| names | why |
|---|---|
| `_PLAIN`, `_tf_apply`, `_distributed_tf_update_step` | methods that Keras overrides \
for tf.distribute; replaced by the originals while a step is traced |
| `_distribution_strategy` | the strategy in whose scope an optimizer was created |
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer

from distfit._keras import graphs
from distfit._keras.alive import instances_of
from distfit._keras.shadows import shadowed

_PLAIN = (
    "_backend_update_step",
    "_apply_weight_decay",
    "_overwrite_model_variables_with_average_value",
    "_backend_increment_gradient_accumulators",
)


@contextlib.contextmanager
def of_one_device(
    scope: Callable, accumulate_parts: bool = True
) -> Iterator[Callable[[], bool]]:
    """Makes all optimizers update variables as on one device, in this thread.

    Yields a function that returns whether optimizers were created in the meantime.

    Keras's own methods would update the copies of all replicas. They are replaced on
    each object, for the duration of the block, and in this thread only: in others, the
    optimizers behave as usual.

    Args:
        scope: Returns the context in which variables are created.
        accumulate_parts: Whether each replica accumulates gradients of its own rows, in
            optimizers that are built in the block.
    """

    def methods_of(optimizer: Any) -> dict[str, Callable]:
        return _methods(optimizer, scope, accumulate_parts)

    with shadowed(_alive, methods_of) as known:
        ids = set(map(id, known))
        yield lambda: not ids.issuperset(map(id, _alive()))


def _alive() -> list[Any]:
    return instances_of(keras.optimizers.Optimizer)


def _methods(optimizer: Any, scope: Callable, parts: bool) -> dict[str, Callable]:
    methods: dict[str, Callable] = {}
    for name in _PLAIN:
        if getattr(type(optimizer), name) is getattr(TFOptimizer, name):
            plain = getattr(BaseOptimizer, name)
            methods[name] = types.MethodType(plain, optimizer)
    # For classes with their own `_backend_update_step`, such as Nadam.
    methods["_distributed_tf_update_step"] = types.MethodType(_update_each, optimizer)
    if hasattr(optimizer, "_common_apply"):
        methods["_tf_apply"] = optimizer._common_apply
    methods["build"] = _built_in(scope, optimizer, parts)
    return methods


def _update_each(optimizer, strategy, gradients_and_variables, learning_rate) -> None:
    for gradient, variable in gradients_and_variables:
        optimizer.update_step(gradient, variable, learning_rate)


def _built_in(scope: Callable, optimizer: Any, parts: bool) -> Callable:
    stock = optimizer.build
    creator = _summed_accumulators if parts else _as_asked

    def build(variables):
        # All replicas get the values that `build` itself assigns.
        with tf.init_scope(), scope(), graphs.as_all_replicas(), _at_home(optimizer):
            with tf.variable_creator_scope(creator):
                return stock(variables)

    return build


@contextlib.contextmanager
def _at_home(optimizer: Any) -> Iterator[None]:
    """Lets an optimizer create variables in the scope, wherever it was created."""
    name, own = "_distribution_strategy", optimizer._distribution_strategy
    object.__setattr__(optimizer, name, tf.distribute.get_strategy())
    try:
        yield
    finally:
        object.__setattr__(optimizer, name, own)


def _as_asked(next_creator, **kwargs):
    return next_creator(**kwargs)


def _summed_accumulators(next_creator, **kwargs):
    """Accumulates gradients per replica; they are summed when they are used."""
    if "gradient_accumulator" in (kwargs.get("name") or ""):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        kwargs["aggregation"] = tf.VariableAggregation.SUM
    return next_creator(**kwargs)
