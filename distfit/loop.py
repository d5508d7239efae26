"""The epoch loop: what `fit`, `evaluate` and `predict` do around the compiled steps."""

import types
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras, build
from distfit.callbacks import CallbackList
from distfit.data import GlobalBatches, check_positive, num_rows
from distfit.driver import PredictDriver, StepDriver
from distfit.strategy import is_chief


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
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = _keras.train_validation_split(
            (x, y, sample_weight), validation_split=validation_split
        )
    batches = GlobalBatches(
        x,
        y,
        sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        shuffle=shuffle and not isinstance(x, tf.data.Dataset | types.GeneratorType),
        class_weight=class_weight,
    )
    validation = _validation_batches(
        validation_data, validation_batch_size or batch_size, validation_steps
    )
    callbacks = _callback_list(
        model, callbacks, verbose, epochs, batches.epoch_steps, add_history=True
    )
    driver = step_driver(model, "train", batches)
    if validation is not None:
        step_driver(model, "test", validation)
    model.stop_training = False
    callbacks.on_train_begin()
    logs = None
    for epoch in range(_keras.initial_epoch(model) or initial_epoch, epochs):
        callbacks.on_epoch_begin(epoch)
        logs = _run_epoch(model, "train", driver, batches, callbacks)
        if validation is not None and _keras.should_evaluate(
            model, epoch, validation_freq
        ):
            logs |= _validate(model, validation, callbacks)
        callbacks.on_epoch_end(epoch, logs)
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
    batches = GlobalBatches(
        x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps
    )
    callbacks = _callback_list(model, callbacks, verbose, 1, batches.epoch_steps)
    return _test(model, batches, callbacks)


def predict(model, x, *, batch_size, verbose, steps, callbacks) -> Any:
    """See `Model.predict`."""
    batches = GlobalBatches(x, batch_size=batch_size, steps_per_epoch=steps)
    callbacks = _callback_list(model, callbacks, verbose, 1, batches.epoch_steps)
    driver = _predict_driver(model, batches.spec)
    model.stop_predicting = False
    callbacks.on_predict_begin()
    outputs: list = []  # A list of batches for each execution.

    def run(step_count: int) -> int:
        new = [driver.run(batches) for _ in range(step_count) if batches.has_next()]
        outputs.append(new)
        return len(new)

    def latest() -> dict:
        return {"outputs": _joined(outputs[-1])}

    _run_steps(model, "predict", run, batches, callbacks, latest)
    callbacks.on_predict_end()
    return _joined([batch for execution in outputs for batch in execution])


def _joined(batches: list) -> Any:
    """The predictions for several batches, as NumPy arrays where they can be."""
    joined = tree.map_structure(lambda *p: _keras.join_batches(list(p)), *batches)
    return tree.map_structure(_keras.to_numpy, joined)


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
    outputs = _predict_driver(model, _spec_of(batch)).run_on(batch)
    return tree.map_structure(_keras.to_numpy, outputs)


def _check_ready(model, method: str) -> None:
    build.check_compiled(model, method)
    check_positive("steps_per_execution", model.steps_per_execution)


def _validation_batches(validation_data, batch_size, steps) -> GlobalBatches | None:
    if validation_data is None:
        return None
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
    return GlobalBatches(
        x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps
    )


def _callback_list(model, callbacks, verbose, epochs, steps, add_history=False):
    if isinstance(callbacks, CallbackList):
        return callbacks
    if type(callbacks) is keras.callbacks.CallbackList:  # One with its own settings.
        return CallbackList(
            callbacks.callbacks,
            model=model,
            add_history=add_history,
            **callbacks.params,
        )
    return CallbackList(
        callbacks,
        add_history=add_history,
        add_progbar=verbose != 0 and is_chief(model.distribute_strategy),
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

    def run(steps: int) -> int:
        return driver.run(batches, steps)

    _run_steps(model, kind, run, batches, callbacks, driver.results)
    return driver.results()


_STOP = {
    "train": "stop_training",
    "test": "stop_evaluating",
    "predict": "stop_predicting",
}


def _run_steps(model, kind, run, batches, callbacks, read) -> None:
    """Runs the steps of an epoch, `steps_per_execution` at a time."""
    total = batches.start_epoch()
    step = 0
    while (total is None or step < total) and batches.has_next():
        steps = model.steps_per_execution
        if total is not None:
            steps = min(steps, total - step)
        callbacks.batch_begin(kind, step)
        step += run(steps)
        callbacks.batch_end(kind, step - 1, read)
        if getattr(model, _STOP[kind]):
            break
    batches.end_epoch(step)


def _run_on_batch(model, kind: str, batch) -> dict[str, float]:
    batch = tree.map_structure(_to_tensor, batch)
    replicas = model.distribute_strategy.num_replicas_in_sync
    rows = int(num_rows(batch))
    check_positive("batch_size", rows)
    driver = _cached_driver(model, kind, _spec_of(batch), rows < replicas)
    driver.reset()
    driver.run_on(batch)
    return driver.results()


def step_driver(model, kind: str, batches: GlobalBatches) -> StepDriver:
    """The compiled steps of a kind for some data, built if there are none yet."""
    smallest = batches.smallest_batch()
    replicas = model.distribute_strategy.num_replicas_in_sync
    may_be_few = replicas > 1 and (smallest is None or smallest < replicas)
    return _cached_driver(model, kind, batches.spec, may_be_few)


class _Drivers:
    """The compiled steps of one kind, kept until the model is compiled anew."""

    def __init__(self):
        self.by_key: dict[tuple, Any] = {}


def _drivers(model, kind: str) -> dict[tuple, Any]:
    attribute = f"{kind}_function"  # Keras sets it to None in `compile()`.
    if not isinstance(getattr(model, attribute), _Drivers):
        setattr(model, attribute, _Drivers())
    return getattr(model, attribute).by_key


def _cached_driver(model, kind: str, spec, may_be_few: bool) -> StepDriver:
    drivers = _drivers(model, kind)
    key = (_signature(spec), may_be_few, model.run_eagerly, model.check_finite)
    if key not in drivers:
        step = getattr(model, f"{kind}_step")
        drivers[key] = StepDriver(model, step, spec, may_be_few)
    return drivers[key]


def _predict_driver(model, spec) -> PredictDriver:
    drivers = _drivers(model, "predict")
    key = (_signature(spec), model.run_eagerly)
    if key not in drivers:
        drivers[key] = PredictDriver(model, spec)
    return drivers[key]


def first_non_finite(model) -> tuple[int, int] | None:
    """See `Model.first_non_finite`."""
    watches = [d.watch for d in _drivers(model, "train").values() if d.watch]
    return next((w.first() for w in watches if w.first()), None)


def _signature(spec) -> str:
    """What distinguishes specs for which a step does different things."""
    return str(tree.map_structure(_rank_and_dtype, spec))


def _rank_and_dtype(spec) -> str:
    if isinstance(spec, tf.TensorSpec):
        return f"{spec.dtype.name}{spec.shape.rank}"
    return str(spec)


def _spec_of(batch) -> Any:
    return tree.map_structure(
        lambda t: t if t is None else tf.TensorSpec([None, *t.shape[1:]], t.dtype),
        batch,
    )


def _to_tensor(value):
    return value if value is None else tf.convert_to_tensor(value)
