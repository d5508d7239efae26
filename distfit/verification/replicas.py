"""The same model on N replicas, run by `distfit.fit`, `evaluate` and `predict`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit import model as distfit_model
from distfit.partition.findings import InFull, merged
from distfit.training import checks
from distfit.training.drivers import step_driver
from distfit.training.global_batches import GlobalBatches
from distfit.verification.batches import Batch
from distfit.verification.recording import (
    ORDER,
    Gradients,
    Recording,
    Step,
    Values,
    Variables,
    flat_arrays,
    log_arrays,
)
from distfit.verification.reference import OneDevice


class Replicas:
    """A model on replicas.

    Args:
        make_model: Returns the compiled model; called in the scope of the strategy.
        reference: The same model on one device.
        source: The data.
        strategy: The strategy.
    """

    def __init__(
        self,
        make_model: Callable[[], keras.Model],
        reference: OneDevice,
        source: Any,
        strategy: tf.distribute.Strategy,
    ):
        self._reference = reference
        self._source = source
        with strategy.scope():
            self.model = make_model()
            self._unseeded = keras.random.SeedGenerator(0)
        self._gradients = Gradients(self.model)

    def record(
        self, batches: list[Batch], starts: Sequence[Values] | None = None
    ) -> Recording:
        """Runs the batches from the initial weights of the reference.

        Args:
            batches: The global batches.
            starts: If given, the values from which each training step starts.
        """
        recording = Recording()
        dataset = self._source.dataset(batches)
        run: dict[str, Callable] = {
            "fit": functools.partial(self._fit, starts=starts),
            "evaluate": self._evaluate,
            "predict": self._predict,
        }
        with _keras.global_seed_generator(self._unseeded):
            try:
                self._driver(dataset)  # The training step first, as in `fit()`.
            except Exception as error:
                recording.errors["fit"] = error
                return recording
            for mode in ORDER:
                self._reference.restore_outside()
                self._variables().restore(self._initial())
                self._unseeded.state.assign([0, 0])
                try:
                    run[mode](recording, dataset, batches)
                except Exception as error:
                    recording.errors[mode] = error
        return recording

    def in_full(self, batches: list[Batch]) -> list[InFull]:
        """What every replica computes in full in a training step."""
        step = getattr(self._driver(self._source.dataset(batches)), "step", None)
        return [] if step is None else merged(step.findings, step.elements)

    def _initial(self) -> Values:
        """The values to start from; new slots are kept, as they may be wrong."""
        initial = self._reference.initial
        if checks.runs_eagerly(self.model):  # The reference trained to build its slots.
            return initial
        return {key: value for key, value in initial.items() if key[0] != "slot"}

    def _driver(self, dataset: tf.data.Dataset) -> Any:
        return step_driver(self.model, "train", GlobalBatches(dataset))

    def _variables(self) -> Variables:
        return Variables(self.model, self._reference.labels)

    def _fit(
        self,
        recording: Recording,
        dataset,
        batches: list[Batch],
        starts: Sequence[Values] | None,
    ) -> None:
        def start(index: int) -> None:
            if starts is not None and index > 0:
                self._variables().restore(starts[index])

        def keep(step: Step) -> None:
            fit = recording.fit
            step.before = fit[-1].values if fit else self._reference.initial
            if starts is not None:
                step.before = starts[len(fit)]
            self._gradients.move_to(step, self._reference.labels)
            step.copies = self._variables().copies()
            step.values |= {key: copies[0] for key, copies in step.copies.items()}
            fit.append(step)

        keeper = _Keeper(batches, keep, start)
        distfit_model.fit(self.model, dataset, verbose=0, callbacks=[keeper])

    def _evaluate(self, recording: Recording, dataset, batches: list[Batch]) -> None:
        keeper = _Keeper(batches, recording.evaluate.append)
        distfit_model.evaluate(self.model, dataset, verbose=0, callbacks=[keeper])

    def _predict(self, recording: Recording, dataset, batches: list[Batch]) -> None:
        outputs = distfit_model.predict(self.model, dataset, verbose=0)
        recording.predict = flat_arrays(outputs)


class _Keeper(keras.callbacks.Callback):
    """Calls `start` with the index of a batch, and `keep` with a `Step` of its logs."""

    def __init__(
        self,
        batches: list[Batch],
        keep: Callable[[Step], None],
        start: Callable[[int], None] | None = None,
    ):
        super().__init__()
        self._batches = batches
        self._keep = keep
        self._start = start

    def on_train_batch_begin(self, batch, logs=None):
        if self._start is not None:
            self._start(batch)

    def on_train_batch_end(self, batch, logs=None):
        self._keep(Step(self._batches[batch], log_arrays(logs)))

    def on_test_batch_end(self, batch, logs=None):
        self._keep(Step(self._batches[batch], log_arrays(logs)))
