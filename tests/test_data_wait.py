"""`DataWait` tells how long steps wait for data, and no more than that."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit
from distfit.callbacks import DataWait

STEPS, EPOCHS, PAUSE = 6, 2, 0.05
ROWS = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")


def _slow(counted):
    def pause(x):
        time.sleep(PAUSE)
        return x

    data = tf.data.Dataset.from_tensors(ROWS).repeat(STEPS)
    data = data.map(
        lambda x, y: (
            tf.ensure_shape(tf.py_function(pause, [x], "float32"), x.shape),
            y,
        )
    )
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    data = data.with_options(options)  # Nothing is read beside the steps.
    return data if counted else data.filter(lambda x, y: True)


def _fit(strategy, x, *, fused=1, eagerly=False, pause=0.0, **arguments):
    with strategy.scope():
        model = distfit.Sequential([keras.Input((3,)), layers.Dense(1)])
        model.compile("sgd", "mse", steps_per_execution=fused, run_eagerly=eagerly)
    waits = DataWait()
    works = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: time.sleep(pause)
    )
    model.fit(x, epochs=EPOCHS, verbose=0, callbacks=[works, waits], **arguments)
    return model, waits


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
@pytest.mark.parametrize("fused, eagerly", [(1, False), (4, False), (1, True)])
@pytest.mark.parametrize("counted", [True, False])
def test_slow_data_are_waited_for(make_strategy, replicas, fused, eagerly, counted):
    began = time.monotonic()
    arguments = {"fused": fused, "eagerly": eagerly}
    _, waits = _fit(make_strategy(replicas), _slow(counted), **arguments)
    taken = time.monotonic() - began
    # What is read beside a step does not count, and steps take far less than a pause.
    assert 0.5 * EPOCHS * STEPS * PAUSE < waits.seconds_waited < taken


def test_slow_shards_are_waited_for(make_strategy):
    strategy = make_strategy(2)
    _, waits = _fit(strategy, lambda context: _slow(True), steps_per_epoch=STEPS // 2)
    assert waits.seconds_waited > 0.5 * EPOCHS * STEPS * PAUSE


def test_data_that_are_there_are_not_waited_for(make_strategy):
    data = tf.data.Dataset.from_tensors(ROWS).repeat(STEPS).prefetch(STEPS)
    model, waits = _fit(make_strategy(2), data, pause=PAUSE)
    first = waits.seconds_waited
    assert first < 0.5 * EPOCHS * STEPS * PAUSE
    model.fit(_slow(True), verbose=0, callbacks=[waits])  # It adds up.
    assert waits.seconds_waited - first > 0.5 * STEPS * PAUSE
    both, other = waits.seconds_waited, DataWait()
    model.fit(_slow(True), verbose=0, callbacks=[other])
    assert waits.seconds_waited == both and other.seconds_waited > 0
    again = DataWait()
    again.set_state(waits.get_state())  # Of a checkpoint.
    assert again.seconds_waited == waits.seconds_waited
