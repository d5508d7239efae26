"""`evaluate`, `predict` and the methods for one batch, around the compiled steps."""

import functools
from typing import Any

import tensorflow as tf
from keras import tree

from distfit.cluster import agreement, workers
from distfit.training import predictions
from distfit.training.batch import fingerprint, num_rows
from distfit.training.checks import outside_of_scopes
from distfit.training.data import make_batches
from distfit.training.drivers import (
    cached_driver,
    driver_on,
    drivers_of,
    layout_of,
    predict_driver,
    step_driver,
)
from distfit.training.epochs import callback_list, check_ready, run_steps, run_test
from distfit.training.inputs import check_positive
from distfit.training.shards import Shards


@outside_of_scopes
def evaluate(
    model, *, x, y, batch_size, verbose, sample_weight, steps, callbacks
) -> dict[str, float]:
    """See `Model.evaluate`. Returns the logs."""
    check_ready(model, "evaluate")
    strategy = model.distribute_strategy
    workers.agree_on_randomness(workers.of(strategy), "evaluate()")
    batches = make_batches(
        strategy, x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps
    )
    with callback_list(model, callbacks, verbose, 1, batches.epoch_steps) as callbacks:
        driver = step_driver(model, "test", batches)
        agreement.check_same_program(
            model, "evaluate()", lambda: batches.facts("the data")
        )
        agreement.agree_on_state(model, "evaluate()", [driver])
        return run_test(model, batches, callbacks)


@outside_of_scopes
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

    with callback_list(model, callbacks, verbose, 1, batches.epoch_steps) as callbacks:
        callbacks.on_predict_begin()
        run_steps(model, "predict", run, batches, callbacks, latest)
        callbacks.on_predict_end()
    return predictions.join(team, [batch for some in outputs for batch in some])


@outside_of_scopes
def train_on_batch(model, batch) -> dict[str, float]:
    """See `Model.train_on_batch`. Returns the logs."""
    check_ready(model, "train_on_batch")
    return _run_on_batch(model, "train", batch)


@outside_of_scopes
def test_on_batch(model, batch) -> dict[str, float]:
    """See `Model.test_on_batch`. Returns the logs."""
    check_ready(model, "test_on_batch")
    return _run_on_batch(model, "test", batch)


@outside_of_scopes
def predict_on_batch(model, x) -> Any:
    """See `Model.predict_on_batch`."""
    batch = (tree.map_structure(tf.convert_to_tensor, x),)
    cached = functools.partial(predict_driver, model)
    driver = driver_on(model, "predict", batch, layout_of(batch), cached)
    outputs = driver.run_on(batch)
    return predictions.join(workers.of(model.distribute_strategy), [outputs])


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
