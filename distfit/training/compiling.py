"""Steps of a model, made for N replicas and compiled."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from distfit._keras import calls, optimizers, rewriting
from distfit.partition.exchanges import Replicas
from distfit.partition.step import Step
from distfit.training import checks
from distfit.training.shares import Layout, rows_of


def partitioned(
    model: keras.Model,
    step: Callable,
    layout: Layout,
    replicas: Replicas,
    sharded: bool = False,
    jit: bool = False,
    keep_rows: bool = False,
) -> Step:
    """A step of a model, made for N replicas."""
    strategy = model.distribute_strategy

    def make() -> Step:
        return Step(
            step,
            layout.spec,
            has_rows=layout.has_rows,
            rows=None if sharded else layout.rows,
            replicas=replicas,
            scope=strategy.scope,
            jit=jit,
            shared_wholes=not sharded,
            keep_rows=keep_rows,
            does_the_same_again=functools.partial(checks.does_the_same_again, model),
            may_wait=functools.partial(checks.states_of_metrics, model),
        )

    with optimizers.of_one_device(strategy.scope) as has_others:
        try:
            return make()
        except Exception:
            if not has_others():
                raise
    # The step creates an optimizer when it is first traced.
    with optimizers.of_one_device(strategy.scope):
        return make()


def has_few_rows(step: Step, batch: Any) -> tf.Tensor:
    """Whether a batch leaves a replica without rows."""
    return rows_of(batch, step.has_rows) < step.replicas.num_replicas


def is_for_few_rows(step: Step, batch: Any) -> bool:
    """Whether a batch takes the program for few rows."""
    return step.needs_rows and bool(has_few_rows(step, batch))


def compiled(method: Callable, replicas: Replicas) -> Callable:
    """A `tf.function` of a bound method, for the replicas."""
    return _rounding_alike(_function(method), replicas)


def compiled_for_iterators(driver: Any, name: str) -> Callable:
    """As `compiled`, for a driver's method whose first argument is an iterator.

    Pass other tensors by position and Python values by keyword.
    """
    function = calls.IteratorCalls(_function(getattr(driver, name)))
    return _rounding_alike(function, driver.replicas)


def _function(method: Callable) -> Callable:
    # TensorFlow would take the methods of several models, which `verify` compares, for
    # one function that is retraced again and again.
    return tf.function(
        functools.partial(method), autograph=False, reduce_retracing=True
    )


def _rounding_alike(function: Callable, replicas: Replicas) -> Callable:
    one = replicas.num_replicas == 1
    return function if one else rewriting.alike_on_replicas(function)


def naming_lines(method: Callable) -> Callable:
    """Makes the errors of a driver's method name the lines of the user's step."""

    @functools.wraps(method)
    def run(self, *args):
        try:
            return method(self, *args)
        except tf.errors.OpError as error:
            if not self.eagerly and not hasattr(error, "__notes__"):
                for line in self.step.lines_of(error):
                    error.add_note(f"In the step, at {line}")
            raise

    return run
