"""`fit`: epochs of training and validation, from the start or from a checkpoint."""

import json
import logging
import types
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit import _keras
from distfit.callbacks import CallbackList, states
from distfit.callbacks.callback_list import has_checkpoint
from distfit.cluster import agreement, workers
from distfit.training import randomness, resuming, state
from distfit.training.data import make_batches
from distfit.training.drivers import step_driver
from distfit.training.epochs import callback_list, check_ready, run_epoch, run_test
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import check_positive
from distfit.training.saving import Saving


def fit(
    model,
    *,
    x,
    y,
    batch_size,
    epochs,
    verbose,
    callbacks,
    validation_split,
    validation_data,
    shuffle,
    class_weight,
    sample_weight,
    initial_epoch,
    steps_per_epoch,
    validation_steps,
    validation_batch_size,
    validation_freq,
    resume_from,
) -> keras.callbacks.History:
    """See `Model.fit`."""
    check_ready(model, "fit")
    _check_validation_freq(validation_freq)
    team = workers.of(model.distribute_strategy)
    epochs = _capped_epochs(epochs)
    saved = resuming.load(team, resume_from)
    workers.agree_on_randomness(team, "fit()")  # Before data are shuffled.
    if has_checkpoint(callbacks):
        randomness.seed_if_unseeded()
    if saved is not None:
        randomness.set_state(saved.manifest["randomness at the start"])
    at_start = randomness.state()

    def data() -> tuple[GlobalBatches, GlobalBatches | None]:
        given, held_out = (x, y, sample_weight), validation_data
        if validation_split and validation_data is None:
            given, held_out = _keras.train_validation_split(
                given, validation_split=validation_split
            )
        batches = make_batches(
            model.distribute_strategy,
            *given,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=_shuffle_of(x, shuffle),
            class_weight=class_weight,
        )
        return batches, _validation_batches(
            model, held_out, validation_batch_size or batch_size, validation_steps
        )

    batches, validation = data()
    with callback_list(
        model, callbacks, verbose, epochs, batches.epoch_steps, add_history=True
    ) as callbacks:
        # Only now, since callbacks may have changed the model.
        training = Training(
            model, batches, validation, validation_freq, callbacks, epochs, at_start
        )
        if callbacks.checkpoints or saved is not None:
            training.prepare()
        _check_rollback(callbacks, *filter(None, (batches, validation)))
        agreement.check_same_program(
            model,
            "fit()",
            lambda: {
                "epochs": epochs,
                "initial_epoch": initial_epoch,
                "shuffle": shuffle,
                "class_weight": class_weight,
                "validation_freq": validation_freq,
                "at a non-finite loss": [c.action for c in callbacks.non_finite],
                "checkpoints": [c.every for c in callbacks.checkpoints],
                **batches.facts("the data"),
                "has validation data": validation is not None,
                **(validation.facts("the validation data") if validation else {}),
            },
        )
        while not training.run(initial_epoch, saved):
            saved = training.before_bad_step()
            randomness.set_state(at_start)
            training = training.again(*data())
    return model.history


class Training:
    """A call of `fit()`: what it trains, and where it stands.

    Args:
        model: A compiled model.
        batches: The data to train on.
        validation: The data to validate with, or None.
        validation_freq: After how many or, as a list, after which epochs.
        callbacks: The callbacks.
        epochs: The epoch to end before.
        at_start: The state of the random generators before data were made.

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
        saved = resuming.load(self._team, folder, resuming.non_finite)
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
        if self.validation is not None and _is_due(self.epoch, self._validation_freq):
            found = run_test(model, self.validation, callbacks)
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
        self.step = step
        if more:  # Else the end of the epoch, with its logs, is what to save.
            self._saving.after_steps(self.steps, self.epoch)

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
        results = self._driver.results() if any(stops) and self.step else {}
        manifest = {
            "versions": resuming.versions(),
            "replicas": self.model.distribute_strategy.num_replicas_in_sync,
            "workers": self._team.count,
            "epoch": self.epoch,
            "step of the epoch": self.step,
            "stops": stops,  # Of each: in an epoch, that of one is not yet of all.
            "results": states.encode(results, arrays, "results"),
            "randomness at the start": self._at_start,
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
        if self.step:
            self.callbacks.on_epoch_begin(self.epoch)
        if self._driver.eagerly:
            self._make_variables(saved)
            self._check_model(saved)
        variables = state.variables_of(self.model, self._drivers)
        state.set_values(self._team, variables, arrays)
        skipped = [list(each.skipped) for each in self.callbacks.non_finite]
        self.callbacks.set_states(manifest["callbacks"], arrays)
        for callback, more in zip(self.callbacks.non_finite, skipped, strict=True):
            callback.skipped += [each for each in more if each not in callback.skipped]
            callback.bad_step = 0
        randomness.set_state(places[0]["randomness"])
        self._driver.set_results(states.decode(manifest["results"], arrays))
        stops = manifest["stops"]
        self.model.stop_training = stops[min(self._team.index, len(stops) - 1)]
        if self._team.is_chief and self.callbacks.params["verbose"]:
            place = f"epoch {self.epoch + 1}, step {self.step + 1}"
            print(f"Going on from {saved.path}: {place}.", flush=True)
        if any(stops) and self.step == 0 and self._team.is_chief:
            logging.getLogger("distfit").warning(
                "The training of %s had stopped itself: nothing is left to do.",
                saved.path,
            )

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


def _as_read(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON gives them back."""
    return json.loads(json.dumps(facts, default=str))


_MOST_SKIPPED = 10  # Batches that a rollback leaves out before it gives up.


def _check_rollback(callbacks: CallbackList, *data: GlobalBatches) -> None:
    if not callbacks.rolls_back:
        return
    if not callbacks.checkpoints:
        raise ValueError(
            "A rollback goes back to a checkpoint. Received: NonFinite("
            'action="rollback") without a Checkpoint. Add one to the callbacks.'
        )
    if not all(each.can_start_again for each in data):
        raise ValueError(
            "A rollback reads the data from their beginning again. Received: NonFinite("
            'action="rollback") with data that change as they are read: a generator, a '
            "PyDataset with hooks, a tf.data.Dataset that draws numbers or caches what "
            "it shuffles. Give arrays, which fit() shuffles, a dataset that shuffles "
            "and does no more of that, or data that are the same each time."
        )
    for each in data:
        each.keep_beginning()


def _shuffle_of(x: Any, shuffle: bool | str) -> bool | str:
    """The `shuffle` argument, or False for data that have an order of their own."""
    return False if isinstance(x, tf.data.Dataset | types.GeneratorType) else shuffle


def _capped_epochs(epochs: int) -> int:
    """The number of epochs, which `keras.config.set_max_epochs` may limit."""
    most = keras.config.max_epochs()
    if not most or most >= epochs:
        return epochs
    warnings.warn(f"Limiting epochs to {most}", stacklevel=4)
    return most


def _check_validation_freq(validation_freq) -> None:
    if isinstance(validation_freq, int):
        check_positive("validation_freq", validation_freq)
    elif not isinstance(validation_freq, list):
        raise ValueError(
            "`validation_freq` must be a number of epochs or a list of them. "
            f"Received: validation_freq={validation_freq}"
        )


def _is_due(epoch: int, validation_freq: int | list[int]) -> bool:
    """Whether validation follows an epoch, which `validation_freq` counts from 1."""
    if isinstance(validation_freq, int):
        return (epoch + 1) % validation_freq == 0
    return epoch + 1 in validation_freq


def _validation_batches(
    model, validation_data, batch_size, steps
) -> GlobalBatches | None:
    if validation_data is None:
        return None
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
    return make_batches(
        model.distribute_strategy,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps,
    )
