"""The epoch loop: what `fit`, `evaluate` and `predict` do around the compiled steps."""

import functools
import types
import warnings
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras
from distfit.callbacks import CallbackList
from distfit.cluster import agreement, workers
from distfit.training import checks, predictions
from distfit.training.batch import fingerprint, num_rows
from distfit.training.data import make_batches
from distfit.training.drivers import (
    cached_driver,
    driver_on,
    drivers_of,
    layout_of,
    predict_driver,
    step_driver,
)
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import check_positive
from distfit.training.shards import Shards


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
) -> keras.callbacks.History:
    """See `Model.fit`."""
    _check_ready(model, "fit")
    _check_validation_freq(validation_freq)
    team = workers.of(model.distribute_strategy)
    epochs = _capped_epochs(epochs)
    workers.agree_on_randomness(team, "fit()")  # Before data are shuffled.
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = _keras.train_validation_split(
            (x, y, sample_weight), validation_split=validation_split
        )
    batches = make_batches(
        model.distribute_strategy,
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        shuffle=_shuffle_of(x, shuffle),
        class_weight=class_weight,
    )
    validation = _validation_batches(
        model, validation_data, validation_batch_size or batch_size, validation_steps
    )
    with _callback_list(
        model, callbacks, verbose, epochs, batches.epoch_steps, add_history=True
    ) as callbacks:
        # Only now, since callbacks may have changed the model.
        driver = step_driver(model, "train", batches, callbacks.watch_losses)
        callbacks.use_watch(driver.watch)
        drivers = [driver]
        if validation is not None:
            drivers.append(step_driver(model, "test", validation))
        agreement.check_same_program(
            model,
            "fit()",
            lambda: {
                "epochs": epochs,
                "initial_epoch": initial_epoch,
                "shuffle": shuffle,
                "class_weight": class_weight,
                "validation_freq": validation_freq,
                "stops at a non-finite loss": callbacks.watch_losses,
                **batches.facts("the data"),
                "has validation data": validation is not None,
                **(validation.facts("the validation data") if validation else {}),
            },
        )
        batches.restart()
        model.stop_training = False
        callbacks.on_train_begin()
        agreement.agree_on_state(model, "fit()", drivers)
        first = agreement.first_epoch(model, initial_epoch)
        logs = None
        for epoch in range(first, epochs):
            callbacks.on_epoch_begin(epoch)
            agreement.settle(model, "train", "the start of an epoch")
            logs = _run_epoch(model, "train", driver, batches, callbacks)
            if validation is not None and _is_due(epoch, validation_freq):
                logs |= _validate(model, validation, callbacks)
            callbacks.on_epoch_end(epoch, logs)
            agreement.settle(model, "train", "the end of an epoch")
            if model.stop_training or batches.exhausted:
                break
        if isinstance(model.optimizer, keras.optimizers.Optimizer) and epochs > 0:
            model.optimizer.finalize_variable_values(model.trainable_weights)
        callbacks.on_train_end(logs)
    return model.history


def evaluate(
    model, *, x, y, batch_size, verbose, sample_weight, steps, callbacks
) -> dict[str, float]:
    """See `Model.evaluate`. Returns the logs."""
    _check_ready(model, "evaluate")
    strategy = model.distribute_strategy
    workers.agree_on_randomness(workers.of(strategy), "evaluate()")
    batches = make_batches(
        strategy, x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps
    )
    with _callback_list(model, callbacks, verbose, 1, batches.epoch_steps) as callbacks:
        driver = step_driver(model, "test", batches)
        agreement.check_same_program(
            model, "evaluate()", lambda: batches.facts("the data")
        )
        agreement.agree_on_state(model, "evaluate()", [driver])
        return _test(model, batches, callbacks)


def predict(model, x, *, batch_size, verbose, steps, callbacks) -> Any:
    """See `Model.predict`."""
    strategy = model.distribute_strategy
    team = workers.of(strategy)
    workers.agree_on_randomness(team, "predict()")
    batches = make_batches(strategy, x, batch_size=batch_size, steps_per_epoch=steps)
    driver = predict_driver(model, batches.layout, isinstance(batches, Shards))
    agreement.check_same_program(model, "predict()", lambda: batches.facts("the data"))
    agreement.agree_on_state(model, "predict()", [])
    model.stop_predicting = False
    outputs: list = []  # A list of batches for each execution.

    def run(step_count: int) -> int:
        new = [driver.run(batches) for _ in range(step_count) if batches.has_next()]
        outputs.append(new)
        return len(new)

    def latest() -> dict:
        return {"outputs": predictions.join(team, outputs[-1])}

    with _callback_list(model, callbacks, verbose, 1, batches.epoch_steps) as callbacks:
        callbacks.on_predict_begin()
        _run_steps(model, "predict", run, batches, callbacks, latest)
        callbacks.on_predict_end()
    return predictions.join(team, [batch for some in outputs for batch in some])


def train_on_batch(model, batch) -> dict[str, float]:
    """See `Model.train_on_batch`. Returns the logs."""
    _check_ready(model, "train_on_batch")
    return _run_on_batch(model, "train", batch)


def test_on_batch(model, batch) -> dict[str, float]:
    """See `Model.test_on_batch`. Returns the logs."""
    _check_ready(model, "test_on_batch")
    return _run_on_batch(model, "test", batch)


def predict_on_batch(model, x) -> Any:
    """See `Model.predict_on_batch`."""
    batch = (tree.map_structure(tf.convert_to_tensor, x),)
    cached = functools.partial(predict_driver, model)
    driver = driver_on(model, "predict", batch, layout_of(batch), cached)
    outputs = driver.run_on(batch)
    return predictions.join(workers.of(model.distribute_strategy), [outputs])


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


def _check_ready(model, method: str) -> None:
    checks.check_compiled(model, method)
    checks.check_in_scope(model)
    check_positive("steps_per_execution", model.steps_per_execution)


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


def _callback_list(model, callbacks, verbose, epochs, steps, add_history=False):
    if isinstance(callbacks, keras.callbacks.CallbackList):  # With its own settings.
        return CallbackList(
            callbacks.callbacks,
            model=model,
            add_history=add_history,
            team=workers.of(model.distribute_strategy),
            **callbacks.params,
        )
    return CallbackList(
        callbacks,
        team=workers.of(model.distribute_strategy),
        add_history=add_history,
        add_progbar=verbose != 0,
        verbose=verbose,
        epochs=epochs,
        steps=steps,
        model=model,
    )


def _validate(model, validation: GlobalBatches, callbacks: CallbackList) -> dict:
    logs = _test(model, validation, callbacks)
    return {f"val_{name}": value for name, value in logs.items()}


def _test(model, batches: GlobalBatches, callbacks: CallbackList) -> dict:
    driver = step_driver(model, "test", batches)
    batches.restart()
    model.stop_evaluating = False
    callbacks.on_test_begin()
    logs = _run_epoch(model, "test", driver, batches, callbacks)
    callbacks.on_test_end(logs)
    return logs


def _run_epoch(model, kind, driver, batches, callbacks) -> dict[str, float]:
    driver.reset()
    compilation = _keras.compilation(model)

    def run(steps: int) -> int:
        if _keras.compilation(model) is not compilation:
            raise RuntimeError(
                "A model cannot be compiled while it trains. Received: a call of "
                f"`compile()` in a callback of {model.name!r}. End `fit()` first."
            )
        return driver.run(batches, steps)

    _run_steps(model, kind, run, batches, callbacks, driver.results)
    return driver.results_of_epoch()


def _run_steps(model, kind, run, batches, callbacks, read) -> None:
    """Runs the steps of an epoch, `steps_per_execution` at a time."""
    several_workers = workers.of(model.distribute_strategy).count > 1
    total = batches.start_epoch()
    step = 0
    while (total is None or step < total) and batches.has_next():
        steps = model.steps_per_execution
        if total is not None:
            steps = min(steps, total - step)
        callbacks.batch_begin(kind, step)
        step += run(steps)
        callbacks.batch_end(kind, step - 1, read)
        if callbacks.may_stop_alone[kind]:
            agreement.settle(model, kind, "the end of an execution")
        elif several_workers:
            continue  # A stop requested on one worker waits for the next `settle`.
        if getattr(model, agreement.STOP_FLAGS[kind]):
            break
    batches.end_epoch(step)
    agreement.check_same_batches(model, kind, batches)


def _run_on_batch(model, kind: str, batch) -> dict[str, float]:
    place = f"{kind}_on_batch()"
    workers.check_not_alone(place)
    batch = tree.map_structure(_to_tensor, batch)
    layout = layout_of(batch)
    check_positive("batch_size", int(num_rows(batch)))
    known = len(drivers_of(model, kind))
    cached = functools.partial(cached_driver, model, kind)
    driver = driver_on(model, kind, batch, layout, cached)
    if len(drivers_of(model, kind)) > known:  # Not at every call: it reads all weights.
        agreement.check_same_program(
            model, place, lambda: {"batch": fingerprint(batch)}
        )
        agreement.agree_on_state(model, place, [driver])
    driver.reset()
    driver.run_on(batch)
    return driver.results()


def _to_tensor(value):
    return value if value is None else tf.convert_to_tensor(value)
