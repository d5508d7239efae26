"""Runs a function of a batch on one device and partitioned, and compares the results.

A property test draws arrays and how their rows are split, and calls `check`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from breadth import EXHAUSTIVE
from hypothesis import given
from hypothesis import strategies as st

from distfit.partition.exchanges import Replicas
from distfit.partition.step import Share, Step
from distfit.training.shares import replicas_of, shares


@dataclasses.dataclass
class Outcome:
    """The results of a partitioned run.

    Attributes:
        results: The outputs, flat, as arrays.
        layouts: Their layouts, as `"replicated"`, `"partial"` or `"rows"`.
        fallen: The types of operations that were computed in full on every replica.
        exchanges: Number of levels of the program that exchange something.
    """

    results: list[np.ndarray]
    layouts: list[str]
    fallen: list[str]
    exchanges: int


def splits(max_rows: int = 7) -> st.SearchStrategy[list[int]]:
    """Row counts of 2 or 3 replicas: uneven, one and zero."""
    return st.lists(st.integers(0, max_rows), min_size=2, max_size=3).filter(any)


def by_rows(setting: Callable) -> Callable:
    """Gives a test `counts`, the rows of each replica.

    By default of three replicas, of which one has one row and one none; in the
    exhaustive tests random ones, as many as the setting of hypothesis says.
    """

    def of(test: Callable) -> Callable:
        if EXHAUSTIVE:
            return setting(given(counts=splits())(test))
        return pytest.mark.parametrize("counts", [[4, 0, 1]], ids=["uneven"])(test)

    return of


def partitioned(
    function: Callable,
    arrays: Sequence[Any],
    counts: Sequence[int],
    rows: int | None = None,
    open_dims: Sequence[int] = (),
) -> Outcome:
    """Runs `function(*arrays)` on replicas that have `counts` rows.

    Args:
        function: A TensorFlow function. An array has rows if its first dimension is the
            sum of `counts`; if that is a coincidence, pass it as a constant instead.
        arrays: The arguments.
        counts: The rows of each replica.
        rows: The number of rows, if it is to be known while tracing.
        open_dims: Other dimensions whose size is not known while tracing.
    """
    total = sum(counts)
    has_rows = [np.ndim(a) > 0 and np.shape(a)[0] == total for a in arrays]
    spec = tuple(_specs(arrays, total, rows, open_dims))
    devices = [f"CPU:{i}" for i in range(len(counts))]
    replicas = Replicas(None, devices, len(counts))
    step = Step(
        lambda batch: function(*batch),
        spec,
        has_rows=has_rows,
        rows=rows,
        replicas=replicas,
        scope=lambda: tf.device(None),
        keep_rows=True,
    )

    every, split = len(counts), counts

    @tf.function(autograph=False)
    def run(counts):
        # `counts` is an argument: as a constant it would be folded, as in no real step.
        tensors = [tf.constant(a) for a in arrays]
        parts = [
            tf.split(t, counts, num=every) if r else [t] * every
            for t, r in zip(tensors, has_rows, strict=True)
        ]
        each = tf.unstack(counts, num=every)
        share = Share(
            parts,
            tensors,
            [tf.reduce_sum(counts)] * every,
            tf.unstack(tf.cumsum(counts, exclusive=True), num=every),
            each,
            [tf.constant(i) for i in range(every)],
        )
        return step.results(step.place(share, step.needs_rows and 0 in split))

    results = [t.numpy() for t in tf.nest.flatten(run(tf.constant(counts)))]
    program = step._program
    return Outcome(
        results,
        [layout.kind for layout in step.layouts],
        [finding.type for finding in step.findings],
        sum(bool(level.meetings) for level in program.levels),
    )


def _specs(arrays, total: int, rows: int | None, open_dims) -> list[tf.TensorSpec]:
    specs = []
    for array in arrays:
        shape = [None if i in open_dims else n for i, n in enumerate(np.shape(array))]
        if shape and np.shape(array)[0] == total:
            shape[0] = rows
        specs.append(tf.TensorSpec(shape, array.dtype))
    return specs


def check(
    function: Callable,
    arrays: Sequence[Any],
    counts: Sequence[int],
    *,
    falls_back: bool | None = False,
    rows: int | None = None,
    open_dims: Sequence[int] = (),
    eagerly: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Outcome:
    """Asserts that a partitioned run gives what one device gives.

    Args:
        function, arrays, counts, rows, open_dims: As for `partitioned`.
        falls_back: Whether an operation must be computed in full (None: it may).
        eagerly: Whether the device may run the function eagerly. That takes less time,
            but need not give the bits of a graph.
        rtol, atol: Tolerances; values that are not finite must be equal.
    """
    one = function
    if not eagerly:
        spec = _specs(arrays, sum(counts), rows, open_dims)
        one = tf.function(function, autograph=False, input_signature=spec)
    expected = [t.numpy() for t in tf.nest.flatten(one(*map(tf.constant, arrays)))]
    outcome = partitioned(function, arrays, counts, rows, open_dims)
    assert len(outcome.results) == len(expected)
    for got, want in zip(outcome.results, expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        if got.dtype.kind in "fc":
            finite = np.abs(want[np.isfinite(want)])
            scale = max(1.0, finite.max(initial=0.0))  # Rounding grows with it.
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol * scale)
        else:
            np.testing.assert_array_equal(got, want)
    if falls_back is not None:
        assert bool(outcome.fallen) == falls_back, outcome.fallen
    return outcome


def compiled_step(function, x, strategy, jit=False):
    """A function that runs a partitioned step on `x` and returns its outputs."""
    replicas = replicas_of(strategy)
    step = Step(
        lambda batch: function(*batch),
        (tf.TensorSpec([None, *x.shape[1:]], x.dtype),),
        has_rows=[True],
        rows=None,
        replicas=replicas,
        scope=strategy.scope,
        jit=jit,
        keep_rows=True,
    )

    @tf.function(autograph=False)
    def place():
        return step.place(shares((tf.constant(x),), [True], replicas))

    results = tf.function(step.results, autograph=False)
    return lambda: tf.nest.flatten(results(place()))
