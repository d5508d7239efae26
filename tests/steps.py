"""Trains a model for two steps on one device and on replicas, and compares.

`fit` is left out: a step of each kind of layer, loss, metric or optimizer is quick.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from breadth import pick
from keras import tree

from distfit.training.compiling import is_for_few_rows
from distfit.training.driver import StepDriver
from distfit.training.shares import Layout

BATCHES = (7, 5)  # Rows; on 3 replicas 2, 2, 3 and 1, 2, 2.


@dataclasses.dataclass
class Trained:
    """The results of two steps.

    Attributes:
        state: Every variable of the model.
        logs: What each step returned.
        fallen: The types of operations that every replica computed in full.
    """

    state: list[np.ndarray]
    logs: list[dict[str, np.ndarray]]
    fallen: list[str] = dataclasses.field(default_factory=list)


def batches_of(arrays: Any, sizes: Sequence[int] = BATCHES) -> list[Any]:
    """Batches of the given sizes, one after another, of arrays of rows."""
    ends = np.cumsum(sizes)
    return [
        tree.map_structure(lambda a, e=end, n=n: tf.constant(a[e - n : e]), arrays)
        for end, n in zip(ends, sizes, strict=True)
    ]


def assert_same(
    make_strategy: Callable,
    build: Callable[[], keras.Model],
    batches: Sequence[Any],
    *,
    replicas: Sequence[int] = tuple(pick([3], [2, 3])),
    eagerly: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> list[str]:
    """Asserts that steps on replicas give the numbers of one device.

    Args:
        make_strategy: Returns a strategy of a number of replicas.
        build: Makes a compiled model.
        batches: The batches, one for each step.
        replicas: The numbers of replicas.
        eagerly: Whether one device may run the steps eagerly, which takes less time.
        rtol, atol: Tolerances.

    Returns:
        The types of operations that were computed in full.
    """
    one = _on_one_device(build, batches, eagerly)
    fallen: set[str] = set()
    for count in replicas:
        other = _on_replicas(make_strategy(count), build, batches)
        fallen.update(other.fallen)
        for expected, got in zip(one.logs, other.logs, strict=True):
            assert expected.keys() == got.keys()
            in_order = [got[name] for name in expected]
            _assert_all_close(list(expected.values()), in_order, rtol, atol)
        _assert_all_close(one.state, other.state, rtol, atol)
    return sorted(fallen)


def _assert_all_close(expected: list, got: list, rtol: float, atol: float) -> None:
    assert len(expected) == len(got)
    for want, value in zip(expected, got, strict=True):
        if np.asarray(want).dtype.kind == "f":
            np.testing.assert_allclose(value, want, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(value, want)


def spec_of(batch: Any) -> Any:
    """The specs of batches like this one, with any number of rows."""
    return tree.map_structure(
        lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), batch
    )


def _on_one_device(build: Callable, batches: Sequence[Any], eagerly: bool) -> Trained:
    keras.utils.set_random_seed(7)
    model = build()
    step = model.train_step
    if not eagerly:
        signature = [spec_of(batches[0])]
        step = tf.function(step, autograph=False, input_signature=signature)
    logs = [tree.map_structure(np.asarray, step(batch)) for batch in batches]
    return Trained(_state(model), logs)


def _on_replicas(strategy, build: Callable, batches: Sequence[Any]) -> Trained:
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model = build()
    spec = spec_of(batches[0])
    driver = StepDriver(model, model.train_step, Layout(spec), False)
    # With a signature, it is not traced again for another number of rows.
    run = {
        few_rows: tf.function(
            functools.partial(driver._run_batch, few_rows=few_rows),
            input_signature=[spec],
            autograph=False,
        )
        for few_rows in (False, True)
    }
    logs = []
    for batch in batches:
        driver._latest = run[is_for_few_rows(driver.step, batch)](batch)
        logs.append(driver.results())
    fallen = [finding.type for finding in driver.step.findings]
    return Trained(_state(model), logs, fallen)


def _state(model: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
