"""`distfit.verify`: does a model on N replicas do what it does on one device?

verify              the function
batches.py          the batches to compare on
reference.py        the model's steps on one device, without distfit
replicas.py         the same on N replicas, by distfit
recording.py        logs, gradients and variables after each step
comparison.py       how far two recordings are apart
precision.py        a step in float64, which tells rounding from mistakes
problems.py         why a model could not be compared
report.py, plot.py  the result as a table, JSON and HTML
"""

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit import strategy as strategies
from distfit.partition import tracing
from distfit.partition.findings import InFull
from distfit.verification.batches import Batch, Source
from distfit.verification.comparison import (
    Comparison,
    Deviation,
    describe,
    settle,
    unrepeated,
)
from distfit.verification.precision import doubled
from distfit.verification.problems import (
    Problem,
    does_not_repeat,
    fails_on_one_device,
    fails_on_replicas,
)
from distfit.verification.recording import Recording
from distfit.verification.reference import OneDevice, check_compiled
from distfit.verification.replicas import Replicas
from distfit.verification.report import Report

__all__ = ["Deviation", "Problem", "Report", "devices_for", "verify"]


def verify(
    build: Callable[[], keras.Model],
    data: Any,
    *,
    batch_size: int,
    replicas: Sequence[int] = (1, 2, 4),
    steps: int = 3,
    tolerance: float = 1e-5,
) -> Report:
    """Trains a model on one device and on N replicas, and compares what they do.

    On one device the model's own `train_step`, `test_step` and `predict_step` are
    called as stock Keras calls them; on replicas `distfit.fit`, `evaluate` and
    `predict` run. Both start from the same weights, on batches that divide evenly among
    the replicas, unevenly, and that have fewer rows than there are replicas. After each
    step the logs, gradients, updates of weights, states of layers, seed generators and
    metrics, slots of optimizers and all replicas' copies are compared.

    Nothing is compiled by XLA, which draws different random numbers.

    The replicas run on GPUs if there are enough of them, else on virtual CPU devices.
    TensorFlow can create those only before its first use: call this first, or begin the
    program with `distfit.create_strategy("mirrored", virtual_devices=n)`.

    Args:
        build: Makes the compiled model, a `keras.Model` of any class. It is called
            several times, each time after `keras.utils.set_random_seed(0)`, once
            outside and then in the scope of a strategy.
        data: What `fit()` takes: arrays `x`, `(x, y)` or `(x, y, sample_weight)`, or a
            dataset, PyDataset or generator of global batches.
        batch_size: Rows of a global batch of arrays.
        replicas: The numbers of replicas to compare with one device.
        steps: Number of training steps; three cover the three kinds of batches.
        tolerance: The largest relative deviation that passes. Deviations explained by
            rounding, which is measured for the model, are set aside; so are those that
            vanish when the same graph is computed in float64.

    Returns:
        A `Report`: `.ok`, what deviates, what every replica computes in full, and a
        table as `str()`.

    Raises:
        ValueError: for invalid arguments or data.
        RuntimeError: if there are too few devices and TensorFlow is in use already.
    """
    _check(replicas, steps, tolerance)
    numbers = sorted(set(replicas))
    devices = devices_for(numbers[-1])
    source = Source(data, batch_size, steps)
    for number in numbers:  # Raises for small batches before any work.
        source.batches(number)
    verification = _Verification(build, source, numbers, devices, tolerance)
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # Each run would repeat them.
        return verification.report()


class _Verification:
    """One call of `verify`."""

    def __init__(
        self,
        build: Callable[[], keras.Model],
        source: Source,
        numbers: list[int],
        devices: list[str],
        tolerance: float,
    ):
        self._build = build
        self._source = source
        self._numbers = numbers
        self._devices = devices
        self._tolerance = tolerance
        self._made: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self._deviations: list[Deviation] = []
        self._problems: list[Problem] = []
        self._in_full: dict[tuple[str, str], InFull] = {}
        self._set_aside: list[str] = []

    def report(self) -> Report:
        reference, failure = self._reference()
        if failure is None:
            self._check_repeats(reference)
        else:
            self._problems.append(fails_on_one_device(failure))
        if not self._problems:
            for number in self._numbers:
                self._compare(number, reference)
        return Report(
            type(reference.model).__name__,
            self._numbers,
            self._tolerance,
            self._deviations,
            self._problems,
            sorted(self._in_full.values(), key=lambda entry: -entry.share),
            self._set_aside,
        )

    def _reference(self) -> tuple[OneDevice, Exception | None]:
        """The model on one device, and the exception that it fails with, or None."""
        reference = OneDevice(self._make_model, self._source)
        failure = reference.prepare(self._first_batches()[0])
        if failure is None or self._source.fixed_rows is None:
            return reference, failure
        self._source.fix_rows()  # The step may need to know the number of rows.
        reference = OneDevice(self._make_model, self._source)
        return reference, reference.prepare(self._first_batches()[0])

    def _first_batches(self) -> list[Batch]:
        return self._source.batches(self._numbers[0])

    def _make_model(self) -> keras.Model:
        keras.utils.set_random_seed(0)
        with _keras.fresh_names():
            model = self._build()
        # With a global seed, TensorFlow would seed unseeded draws by their place in the
        # graph, which differs between the runs. Without it, they are detected.
        tf.random.set_seed(None)
        check_compiled(model)
        if model in self._made:
            raise ValueError(
                "The function that makes the model must make a new one each time. "
                f"Received: the same {type(model).__name__} again. Build and compile "
                "the model inside the function."
            )
        self._made.add(model)
        model.steps_per_execution = 1
        model.jit_compile = False  # XLA draws different random numbers.
        return model

    def _check_repeats(self, reference: OneDevice) -> None:
        """Records a problem unless one device gives the same results twice."""
        batches = self._first_batches()
        one, again = reference.record(batches), reference.record(batches)
        if "fit" in one.errors:
            self._problems.append(fails_on_one_device(one.errors["fit"]))
            return
        what = unrepeated(one, again, self._tolerance)
        if what is not None:
            draws = reference.unseeded_draws()
            self._problems.append(does_not_repeat(what, draws))

    def _compare(self, number: int, reference: OneDevice) -> None:
        """Compares `number` replicas with one device."""
        strategy = strategies.create_strategy(
            "one_device" if number == 1 else "mirrored", devices=self._devices[:number]
        )
        batches = self._source.batches(number)
        replicas = self._replicas(reference, strategy)
        many = replicas.record(batches)
        one = reference.record(batches, many)
        off = [reference.record(batches, many, seed) for seed in (1, 2)]
        deviations = Comparison(number, one, off, many, self._tolerance).deviations()
        failed = {m: e for m, e in many.errors.items() if m not in one.errors}
        if number > 1 and not failed and not all(d.ok for d in deviations):
            # One rounding error can decide which of two almost equal numbers is the
            # larger, and so where a gradient flows.
            exact = self._in_double(reference, strategy, batches, one, many)
            settled = settle(deviations, exact, self._tolerance)
            if all(d.ok for d in settled):
                self._set_aside.append(describe(deviations))
                deviations = settled
        self._deviations += deviations
        for mode, error in failed.items():
            self._problems.append(fails_on_replicas(number, mode, error))
        if "fit" not in failed:
            self._note_in_full(replicas.in_full(batches))

    def _replicas(self, reference: OneDevice, strategy: Any) -> Replicas:
        return Replicas(self._make_model, reference, self._source, strategy)

    def _in_double(
        self,
        reference: OneDevice,
        strategy: tf.distribute.Strategy,
        batches: list[Batch],
        one: Recording,
        many: Recording,
    ) -> list[Deviation]:
        """Deviations of N replicas from one replica, both computed in float64.

        Empty unless one replica reproduces the reference in float32.

        Args:
            reference: The model on one device.
            strategy: The strategy of the replicas.
            batches: The batches.
            one: The reference in float32, where each step starts from the values that
                `many` had before it.
            many: The replicas in float32.
        """
        one_device = strategies.create_strategy("one_device", devices=self._devices[:1])
        starts = [step.before for step in many.fit]
        single = self._replicas(reference, one_device).record(batches, starts)
        same = Comparison(1, one, [], single, self._tolerance).deviations()
        if single.errors.keys() != one.errors.keys() or not all(d.ok for d in same):
            return []
        with tracing.changed(doubled):
            runs = [
                self._replicas(reference, each).record(batches, starts)
                for each in (one_device, strategy)
            ]
        if any(run.errors.keys() != one.errors.keys() for run in runs):
            return []
        number = strategy.num_replicas_in_sync
        return Comparison(number, runs[0], [], runs[1], self._tolerance).deviations()

    def _note_in_full(self, entries: list[InFull]) -> None:
        for entry in entries:
            known = self._in_full.setdefault((entry.operation, entry.line), entry)
            if entry.share > known.share:
                self._in_full[entry.operation, entry.line] = entry


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps distfit from logging what the report says."""
    logger = logging.getLogger("distfit")

    def refuse(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


def _check(replicas: Sequence[int], steps: int, tolerance: float) -> None:
    if tf.distribute.has_strategy():
        raise ValueError(
            "`verify` makes strategies of its own. Received: a call in the scope of "
            f"{type(tf.distribute.get_strategy()).__name__}. Call it outside."
        )
    if not replicas or min(replicas) < 1:
        raise ValueError(
            "The numbers of replicas must be at least 1. Received: "
            f"replicas={tuple(replicas)}. Give e.g. replicas=(1, 2, 4)."
        )
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1. Received: steps={steps}.")
    if not tolerance > 0:
        raise ValueError(
            f"`tolerance` must be positive. Received: tolerance={tolerance}. "
            "The default, 1e-5, suits float32."
        )


def devices_for(number: int) -> list[str]:
    """The devices that `verify` uses: GPUs, or else virtual devices of the CPU.

    Raises:
        RuntimeError: if TensorFlow is in use already and has too few devices.
    """
    if len(tf.config.list_physical_devices("GPU")) >= number:
        return [f"GPU:{i}" for i in range(number)]
    try:
        return strategies.make_virtual_devices(number)
    except RuntimeError as error:
        raise RuntimeError(
            f"There are not enough devices for {number} replicas, and TensorFlow is in "
            "use already and cannot create more. Received: "
            f"{len(tf.config.list_logical_devices())} device(s). Begin the program "
            f'with `distfit.create_strategy("mirrored", virtual_devices={number})`.'
        ) from error
