"""A call of `fit()` as an object: it runs, and can be saved and gone on with."""

import json
import logging
import warnings
from typing import Any

import keras
import numpy as np

from distfit.callbacks import CallbackList, states
from distfit.cluster import agreement, workers
from distfit.training import randomness, resuming, state
from distfit.training.drivers import step_driver
from distfit.training.epochs import run_epoch, run_test
from distfit.training.global_batches import GlobalBatches
from distfit.training.saving import Saving

_MOST_SKIPPED = 10  # Batches that a rollback leaves out before it gives up.


class Training:
    """A call of `fit()`: what it trains, and where it stands.

    Args:
        model: A compiled model.
        batches: The data to train on.
        validation: The data to validate with, or None.
        validation_freq: After how many or, as a list, after which epochs.
        callbacks: The callbacks.
        epochs: The epoch to end before.
        at_start: The random generators before data were made, and the learning rates.

    Attributes:
        epoch: The current epoch, from 0.
        step: How many steps of it were run.
        steps: How many steps were run in all epochs.
    """

    def __init__(
        self,
        model: keras.Model,
        batches: GlobalBatches,
        validation: GlobalBatches | None,
        validation_freq: int | list[int],
        callbacks: CallbackList,
        epochs: int,
        at_start: dict[str, Any],
    ):
        self.model = model
        self.batches = batches
        self.validation = validation
        self.callbacks = callbacks
        self.epochs = epochs
        self.epoch = self.step = self.steps = 0
        self._more = True  # Whether steps of this epoch may follow.
        # Weights that are not finite from the start: a mask of -inf, say.
        self._never_finite: set[str] = set()
        self._team = workers.of(model.distribute_strategy)
        self._has_warned = False
        self._validation_freq = validation_freq
        self._at_start = at_start
        self._driver = step_driver(
            model,
            "train",
            batches,
            watched=callbacks.watch_losses,
            timed=bool(callbacks.data_waits),
        )
        callbacks.use_watch(self._driver.watch)
        callbacks.use_clock(self._driver.clock)
        batches.clock = self._driver.clock
        self._drivers, self._data = [self._driver], [batches]
        self._saving = Saving(self._team, callbacks.checkpoints, self.frozen)
        if validation is not None:
            self._drivers.append(step_driver(model, "test", validation))
            self._data.append(validation)

    def prepare(self) -> None:
        """Notes what a checkpoint compares with: the order of data, callbacks' states.

        Raises:
            ValueError: a checkpoint cannot hold the place in these data.
        """
        for driver in self._drivers:
            driver.take_notes()
        self.take_notes()
        self.callbacks.note_states()

    def take_notes(self) -> None:
        """See `GlobalBatches.take_notes`, of all data."""
        for data in self._data:
            data.take_notes()

    def again(
        self, batches: GlobalBatches, validation: GlobalBatches | None
    ) -> "Training":
        """The same from the start, without the batch whose loss was not finite."""
        for callback in self.callbacks.non_finite:
            callback.skipped = [*callback.skipped, [self.epoch + 1, callback.bad_step]]
        training = Training(
            self.model,
            batches,
            validation,
            self._validation_freq,
            self.callbacks,
            self.epochs,
            self._at_start,
        )
        training.take_notes()
        for data, before in zip(training._data, self._data, strict=True):
            data.begin_as(before)
        return training

    def before_bad_step(self) -> resuming.Saved:
        """The checkpoint to go back to from a loss that was not finite.

        Raises:
            FloatingPointError: there is none, or too many batches were left out.
        """
        error = self._non_finite
        for checkpoints in self.callbacks.checkpoints:
            checkpoints.join()
        if len(self.callbacks.non_finite[0].skipped) >= _MOST_SKIPPED:
            raise error
        folder = self.callbacks.checkpoints[0].folder

        def why_not(saved: resuming.Saved) -> str:
            bad = set(resuming.non_finite(saved.arrays)) - self._never_finite
            return f"{saved.path}: {min(bad)} is not finite." if bad else ""

        try:
            saved = resuming.load(self._team, folder, why_not)
        except ValueError:  # Each was named as it was passed over.
            text = f"{error} No checkpoint can be gone back to: {folder}."
            raise FloatingPointError(text) from error
        if saved is None:
            raise error
        if self._team.is_chief:
            logging.getLogger("distfit").warning(
                "%s Going back, and on without that batch of epoch %d.",
                error,
                self.epoch + 1,
            )
        return saved

    def run(self, initial_epoch: int, saved: resuming.Saved | None) -> bool:
        """Trains from an epoch, or from where a checkpoint was taken.

        Returns:
            Whether it has ended; else at a loss from which callbacks roll back.
        """
        try:
            self._run(initial_epoch, saved)
        except FloatingPointError as error:
            bad = any(callback.bad_step for callback in self.callbacks.non_finite)
            if not (bad and self.callbacks.rolls_back):
                raise
            self._non_finite = error
            return False
        finally:
            # This object is part of a cycle: the garbage collector would wait for them.
            for data in self._data:
                data.release()
        return True

    def _run(self, initial_epoch: int, saved: resuming.Saved | None) -> None:
        model, callbacks = self.model, self.callbacks
        model.stop_training = False
        if saved is None:
            self.batches.restart()
        else:  # Before anything is changed, or data are read, which may take long.
            resuming.check_same(saved, "facts", self._facts())
            if not self._driver.eagerly:
                self._check_model(saved)
            if self._team.is_chief:
                resuming.keep_rows_before(saved.manifest["epoch"], callbacks.callbacks)
        callbacks.on_train_begin()
        agreement.agree_on_state(model, "fit()", self._drivers)
        self.epoch = agreement.first_epoch(model, initial_epoch)
        if saved is not None:
            self._go_on(saved)
        if callbacks.rolls_back:
            variables = state.variables_of(model, self._drivers)
            values = state.values_of(self._team, variables)
            self._never_finite = set(resuming.non_finite(values))
        resumed = None if saved is None else saved.path.parent
        self._saving.begin(self.steps, self.epoch, resumed)
        if callbacks.rolls_back and saved is None and not self._driver.eagerly:
            # There is a way back at once. Eager steps have yet to make variables.
            self._saving.end(self.steps, self.epoch)
        if callbacks.checkpoints:
            self._warn_of_counted_draws()
        logs, has_ended = None, False
        if saved is not None and self.step == 0:
            has_ended = model.stop_training or self.batches.exhausted
        while self.epoch < self.epochs and not has_ended:
            logs = self._run_epoch()
            has_ended = model.stop_training or self.batches.exhausted
        self._saving.end(self.steps, self.epoch)
        if isinstance(model.optimizer, keras.optimizers.Optimizer) and self.epochs > 0:
            model.optimizer.finalize_variable_values(model.trainable_weights)
        callbacks.on_train_end(logs)

    def _run_epoch(self) -> dict[str, float]:
        model, callbacks = self.model, self.callbacks
        if self.step == 0:
            callbacks.on_epoch_begin(self.epoch)
            agreement.settle(model, "train", "the start of an epoch")
        logs = run_epoch(
            model,
            "train",
            self._driver,
            self.batches,
            callbacks,
            self.step,
            self._after,
            self._skipped(),
        )
        if (validation := self._next_validation()) is not None:
            found = run_test(
                model, validation, callbacks, self._saving.after_test_steps
            )
            logs |= {f"val_{name}": value for name, value in found.items()}
        callbacks.on_epoch_end(self.epoch, logs)
        agreement.settle(model, "train", "the end of an epoch")
        self.epoch, self.step = self.epoch + 1, 0
        self._saving.after_epoch(self.steps, self.epoch)
        return logs

    def _skipped(self) -> set[int]:
        """The steps of this epoch whose batches are left out."""
        return {
            step - 1
            for callback in self.callbacks.non_finite
            for epoch, step in callback.skipped
            if epoch == self.epoch + 1
        }

    def _after(self, step: int, more: bool) -> None:
        """Notes that steps were run."""
        self.steps += step - self.step
        self.step, self._more = step, more
        if more:  # Else the end of the epoch, with its logs, is what to save.
            self._saving.after_steps(self.steps, self.epoch)
        elif self._next_validation() is not None:
            self._saving.hold(self.steps, self.epoch)

    def _next_validation(self) -> GlobalBatches | None:
        """The data to validate with after this epoch, if it is due."""
        return self.validation if _is_due(self.epoch, self._validation_freq) else None

    # Checkpoints.

    def _warn_of_counted_draws(self) -> None:
        lines = [line for driver in self._drivers for line in driver.counted_draws]
        if lines and self._team.is_chief and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "A checkpoint cannot hold the state of random operations: a training "
                f"that goes on draws their first numbers again. Received: {lines[0]}. "
                "Draw with `keras.random` or a `tf.random.Generator`.",
                stacklevel=2,
            )

    def _warn_of_other_rates(self, given: list[float]) -> None:
        """Warns of learning rates that were set for this training, and are not used."""
        taken = state.learning_rates_of(self.model)
        if (
            given not in (self._at_start["learning rates"], taken)
            and self._team.is_chief
        ):
            warnings.warn(
                f"The learning rate is that of the checkpoint: {_listed(taken)}. "
                f"Received: a model with {_listed(given)}. Let a callback change "
                "it, or start anew in another folder.",
                stacklevel=2,
            )

    def frozen(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """All that the rest depends on, as it is now: for JSON, and arrays by name.

        All workers call this at the same place.
        """
        self._warn_of_counted_draws()  # Eager steps show theirs as they run.
        variables = state.variables_of(self.model, self._drivers)
        arrays = state.values_of(self._team, variables)
        callbacks = self.callbacks.states(arrays)
        places = [data.position() for data in self._data]
        self._add_iterators(arrays)
        stops = self._team.tell("who stops", bool(self.model.stop_training))
        # Where no step of the epoch may follow, its logs are those of the latest.
        is_last = self.step and (any(stops) or not self._more)
        results = self._driver.results() if is_last else {}
        manifest = {
            "versions": resuming.versions(),
            "replicas": self.model.distribute_strategy.num_replicas_in_sync,
            "workers": self._team.count,
            "epoch": self.epoch,
            "step of the epoch": self.step,
            "stops": stops,  # Of each: in an epoch, that of one is not yet of all.
            "results": states.encode(results, arrays, "results"),
            "at the start": self._at_start,
            # Of each worker, which may read data of its own.
            "places in the data": self._team.tell("the places in the data", places),
            "callbacks": callbacks,
            "facts": self._facts(),
            "facts of the model": self._facts_of_model(variables),
        }
        return manifest, arrays

    def _add_iterators(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the places of the iterators: that of the chief, if all read the same."""
        for index, data in enumerate(self._data):
            tells = self._team.is_chief or data.others_may_have_rows
            own = data.iterator_place() if tells else b""
            for worker, place in enumerate(self._team.gather("the iterators", own)):
                if place:
                    name = _iterator_name(index, worker)
                    arrays[name] = np.frombuffer(place, "uint8")

    def _facts(self) -> dict[str, Any]:
        """What must be the same of data and callbacks where this training goes on."""
        facts = self.batches.facts("the data")
        if self.validation is not None:
            facts |= self.validation.facts("the validation data")
        facts["callbacks"] = [type(c).__name__ for c in self.callbacks.stateful]
        return _as_read(facts)

    def _facts_of_model(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The same of the model, with variables that may come with its first step."""
        # Names count what a process has made: shapes and types stand in the state.
        facts = {
            name: fact
            for name, fact in agreement.facts_of_model(self.model).items()
            if not name.startswith("variable ")
        }
        for name, variable in variables.items():
            facts[f"state {name}"] = f"{tuple(variable.shape)} {variable.dtype.name}"
        return _as_read(facts)

    def _go_on(self, saved: resuming.Saved) -> None:
        """Takes up the training that a checkpoint holds."""
        manifest, arrays = saved.manifest, saved.arrays
        self.epoch, self.steps = manifest["epoch"], manifest["step"]
        self.step = manifest["step of the epoch"]
        error = ""
        of_workers = manifest["places in the data"]
        # Those that read the same data are in the same place, however many there are.
        places = of_workers[min(self._team.index, len(of_workers) - 1)]
        try:
            for index, (data, place) in enumerate(zip(self._data, places, strict=True)):
                worker = self._team.index if data.others_may_have_rows else 0
                of_iterator = arrays.get(_iterator_name(index, worker))
                data.move_to(place, b"" if of_iterator is None else bytes(of_iterator))
        except ValueError as problem:
            error = str(problem)
        errors = self._team.tell("the place in the data", error)
        if any(errors):
            raise ValueError(next(filter(None, errors)))
        self._tell_place(saved)  # Before the progress bar, which begins with an epoch.
        if self.step:
            self.callbacks.on_epoch_begin(self.epoch)
        if self._driver.eagerly:
            self._make_variables(saved)
            self._check_model(saved)
        variables = state.variables_of(self.model, self._drivers)
        given = state.learning_rates_of(self.model)
        state.set_values(self._team, variables, arrays)
        self._warn_of_other_rates(given)
        skipped = [list(each.skipped) for each in self.callbacks.non_finite]
        self.callbacks.set_states(manifest["callbacks"], arrays)
        for callback, more in zip(self.callbacks.non_finite, skipped, strict=True):
            callback.skipped += [each for each in more if each not in callback.skipped]
            callback.bad_step = 0
        randomness.set_state(places[0]["randomness"])
        self._driver.set_results(states.decode(manifest["results"], arrays))
        stops = manifest["stops"]
        self.model.stop_training = stops[min(self._team.index, len(stops) - 1)]
        if any(stops) and self.step == 0 and self._team.is_chief:
            logging.getLogger("distfit").warning(
                "The training of %s had stopped itself: nothing is left to do.",
                saved.path,
            )

    def _tell_place(self, saved: resuming.Saved) -> None:
        if not self._team.is_chief:
            return
        place = f"epoch {self.epoch + 1}, step {self.step + 1}"
        text = f"Going on from {saved.path}: {place}."
        if self.callbacks.params["verbose"]:
            print(text, flush=True)
        else:
            logging.getLogger("distfit").info(text)

    def _check_model(self, saved: resuming.Saved) -> None:
        variables = state.variables_of(self.model, self._drivers)
        facts = self._facts_of_model(variables)
        resuming.check_same(saved, "facts of the model", facts)

    def _make_variables(self, saved: resuming.Saved) -> None:
        """Makes what only the first step of a kind makes, by running one.

        A step that runs eagerly also tells only then which variables it uses. It runs
        on a batch that was read before; what it changes is set afterwards.
        """
        before = saved.manifest["facts of the model"].keys()
        for driver, data in zip(self._drivers, self._data, strict=True):
            variables = state.variables_of(self.model, self._drivers)
            if before - self._facts_of_model(variables).keys():
                driver.try_on(data.sample.get_value())


def _iterator_name(data: int, worker: int) -> str:
    return f"iterators/{data}/{worker}"


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _as_read(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON gives them back."""
    return json.loads(json.dumps(facts, default=str))


def _is_due(epoch: int, validation_freq: int | list[int]) -> bool:
    """Whether validation follows an epoch, which `validation_freq` counts from 1."""
    if isinstance(validation_freq, int):
        return (epoch + 1) % validation_freq == 0
    return epoch + 1 in validation_freq
