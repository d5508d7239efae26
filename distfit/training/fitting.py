"""`fit`: epochs of training and validation, from the start or from a checkpoint."""

import types
import warnings
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras
from distfit.callbacks import CallbackList
from distfit.callbacks.callback_list import checkpoints_among
from distfit.cluster import agreement, workers
from distfit.training import randomness, resuming, state
from distfit.training.checks import outside_of_scopes
from distfit.training.data import make_batches
from distfit.training.epochs import callback_list, check_ready
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import check_positive
from distfit.training.training import Training


@outside_of_scopes
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
    checkpoints = checkpoints_among(callbacks)
    saved = resuming.load(team, resume_from, owned=[c.folder for c in checkpoints])
    workers.agree_on_randomness(team, "fit()")  # Before data are shuffled.
    if checkpoints:
        randomness.seed_if_unseeded()
    if saved is not None:
        randomness.set_state(saved.manifest["at the start"]["randomness"])
    at_start: dict[str, Any] = {
        "randomness": randomness.state(),
        "learning rates": state.learning_rates_of(model),
    }
    if saved is not None:
        at_start["learning rates"] = saved.manifest["at the start"]["learning rates"]

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
        _check_rollback(callbacks, batches, validation)
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
            randomness.set_state(at_start["randomness"])
            training = training.again(*data())
    return model.history


def _check_rollback(
    callbacks: CallbackList, batches: GlobalBatches, validation: GlobalBatches | None
) -> None:
    if not callbacks.rolls_back:
        return
    if not callbacks.checkpoints:
        raise ValueError(
            "A rollback goes back to a checkpoint. Received: NonFinite("
            'action="rollback") without a Checkpoint. Add one to the callbacks.'
        )
    data = [batches] if validation is None else [batches, validation]
    if not all(each.can_start_again for each in data):
        raise ValueError(
            "A rollback reads the data from their beginning again. Received: NonFinite("
            'action="rollback") with data that change as they are read: a generator, a '
            "PyDataset with hooks, a tf.data.Dataset that draws numbers, or whose "
            "shuffle is not the last part that chooses rows. Give arrays, which fit() "
            "shuffles, a dataset with one shuffle behind cache, repeat, interleave and "
            "concatenate, or data that are the same each time."
        )
    if validation is not None and batches.shares_a_shuffle_with(validation):
        raise ValueError(
            "A rollback cannot restore a shuffle that the data and the validation data "
            'share. Received: NonFinite(action="rollback") with two datasets made of '
            "one that shuffles. Shuffle each by itself."
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
    warnings.warn(f"Limiting epochs to {most}", stacklevel=5)
    return most


def _check_validation_freq(validation_freq) -> None:
    if isinstance(validation_freq, int):
        check_positive("validation_freq", validation_freq)
    elif not isinstance(validation_freq, list):
        raise ValueError(
            "`validation_freq` must be a number of epochs or a list of them. "
            f"Received: validation_freq={validation_freq}"
        )


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
