"""`distfit.verify`: is a model's step right on N replicas?

verify              the function
batches.py          the batches to compare on
recording.py        runs on one device and on replicas, recorded step by step
streams.py          one device that draws the random numbers of N replicas
comparison.py       how far two recordings are apart
inspection.py       what can be seen in the traced step
diagnosis.py        from both, the mistakes by name
report.py           the result as a table, JSON and HTML
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit import strategy as strategies
from distfit.verification.batches import Batch, Source
from distfit.verification.comparison import Comparison, Deviation
from distfit.verification.diagnosis import (
    REFERENCE,
    Evidence,
    Finding,
    diagnose,
    diagnose_stock,
    failure_on_one_device,
)
from distfit.verification.inspection import Facts, inspect_step
from distfit.verification.recording import OneDevice, Replicas
from distfit.verification.report import Column, Report

__all__ = ["Finding", "Report", "devices_for", "verify"]


def verify(
    model_fn: Callable[[], keras.Model],
    data: Any,
    *,
    batch_size: int,
    replicas: Sequence[int] = (1, 2, 4),
    steps: int = 3,
    tolerance: float = 1e-5,
) -> Report:
    """Trains a model on one device and on N replicas, and compares what they do.

    From the same initial weights the model is evaluated, asked for predictions and
    trained, on batches that part evenly among the replicas, unevenly, and that have
    fewer rows than there are replicas. After each step the logs, gradients, updates,
    states of layers and slots of optimizers are compared with those of one device,
    which calls the step by hand. Where the model draws random numbers, that device
    draws those of the replicas.

    Nothing is compiled by XLA, which draws other random numbers.

    A `keras.Model` that is no `distfit.Model` runs twice: by Keras's own `fit`, and as
    if its class derived from `distfit.Model`.

    The replicas run on GPUs if there are enough of them, else on virtual CPU devices.
    TensorFlow makes those only before its first use: call this first, or begin the
    program with `distfit.create_strategy("mirrored", virtual_devices=n)`.

    Args:
        model_fn: Makes the compiled model. It is called several times, each time after
            `keras.utils.set_random_seed(0)`, in the scope of a strategy.
        data: What `fit()` takes: arrays `x`, `(x, y)` or `(x, y, sample_weight)`, or a
            dataset, PyDataset or generator of global batches.
        batch_size: Rows of a global batch of arrays.
        replicas: The numbers of replicas to compare with one device.
        steps: Number of training steps; three, or a multiple, are one of each kind.
        tolerance: The largest relative deviation that passes. What rounding explains is
            measured for the model, and set aside.

    Returns:
        A `Report`: `.ok`, `.findings`, and a table as `str()`.

    Raises:
        ValueError: for arguments or data that nothing can be compared with.
        RuntimeError: if there are not enough devices, and TensorFlow is in use already.
    """
    _check(replicas, steps, tolerance)
    devices = devices_for(max(replicas))
    source = Source(data, batch_size, steps)
    batches = {n: source.batches(n) for n in sorted(set(replicas))}
    with warnings.catch_warnings():
        # The runs repeat one another; what they warn of is among the findings.
        warnings.simplefilter("ignore")
        return _Verification(model_fn, source, batches, devices, tolerance).report()


class _Verification:
    """One call of `verify`."""

    def __init__(
        self,
        model_fn: Callable[[], keras.Model],
        source: Source,
        batches: dict[int, list[Batch]],
        devices: list[str],
        tolerance: float,
    ):
        self._model_fn = model_fn
        self._source = source
        self._batches = batches
        self._devices = devices
        self._tolerance = tolerance
        self._made: weakref.WeakSet[keras.Model] = weakref.WeakSet()

    def report(self) -> Report:
        reference = OneDevice(self._make_model, self._source)
        name = type(reference.model).__name__
        failure = reference.prepare()
        facts = inspect_step(reference.model, self._source.spec)
        failure = failure or self._first_failure(reference)
        if failure is not None:
            return self._report(name, [], [failure_on_one_device(failure, facts)])
        distfit = self._column("distfit", reference, facts)
        evidence = Evidence(reference.model, facts, distfit.deviations, distfit.errors)
        findings = diagnose(evidence)
        if reference.derives_from_distfit:
            return self._report(name, [distfit], findings)
        stock = self._column("Keras", reference, facts)
        by_keras = Evidence(reference.model, facts, stock.deviations, stock.errors)
        findings += diagnose_stock(by_keras, mended=evidence)
        return self._report(name, [stock, distfit], findings)

    def _report(self, name: str, columns: list, findings: list[Finding]) -> Report:
        return Report(name, list(self._batches), self._tolerance, columns, findings)

    def _make_model(self) -> keras.Model:
        keras.utils.set_random_seed(0)
        with _keras.fresh_names():
            model = self._model_fn()
        if not isinstance(model, keras.Model):
            return model  # Whoever uses it says so.
        if model in self._made:
            raise ValueError(
                "The function that makes the model must make a new one each time. "
                f"Received: the same {type(model).__name__} again. Build and compile "
                "the model inside the function."
            )
        self._made.add(model)
        return model

    def _first_failure(self, reference: OneDevice) -> Exception | None:
        """What training fails with on one device."""
        batches = next(iter(self._batches.values()))
        return reference.record(batches[:1]).errors.get("fit")

    def _column(self, name: str, reference: OneDevice, facts: Facts) -> Column:
        column = Column(name)
        for number, batches in self._batches.items():
            strategy = strategies.create_strategy(
                "one_device" if number == 1 else "mirrored",
                devices=self._devices[:number],
            )
            stock = name == "Keras"
            many = Replicas(self._make_model, reference, strategy, stock)
            recording = many.record(batches)
            candidates: list[list[Deviation]] = []
            for streams in _streams(number, facts):
                one = reference.record(batches, streams)
                off = [reference.record(batches, streams, seed) for seed in (1, 2)]
                comparison = Comparison(number, one, off, recording, self._tolerance)
                candidates.append(comparison.deviations())
                if all(deviation.ok for deviation in candidates[-1]):
                    break
            column.deviations += min(candidates, key=_failures)
            if "fit" in one.errors:  # It trained before: it cannot draw like replicas.
                column.errors.append((number, REFERENCE, one.errors["fit"]))
            column.errors += [
                (number, mode, error)
                for mode, error in recording.errors.items()
                if mode not in one.errors
            ]
        return column


def _streams(number: int, facts: Facts) -> list[tuple[int, bool] | None]:
    """The ways in which one device may have to draw what the replicas draw."""
    if number == 1 or not facts.draws_by_replica:
        return [None]
    return [(number, True), (number, False)]


def _failures(deviations: Iterable[Deviation]) -> int:
    return sum(not deviation.ok for deviation in deviations)


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
        RuntimeError: if TensorFlow is in use already, and has fewer.
    """
    if len(tf.config.list_physical_devices("GPU")) >= number:
        return [f"GPU:{i}" for i in range(number)]
    try:
        return strategies.make_virtual_devices(number)
    except RuntimeError as error:
        raise RuntimeError(
            f"There are not enough devices for {number} replicas, and TensorFlow is in "
            "use already: it can make no more. Received: "
            f"{len(tf.config.list_logical_devices())} device(s). Begin the program "
            f'with `distfit.create_strategy("mirrored", virtual_devices={number})`.'
        ) from error
