"""Keras and TensorFlow are unchanged, beside distfit and after it."""

import pathlib
import subprocess
import sys
import threading

import comparing
import keras
import numpy as np
import pytest
from keras import layers

import distfit


def test_import_and_training_leave_every_name_of_keras_and_tensorflow():
    program = pathlib.Path(__file__).with_name("untouched.py")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if ":" in line]
    assert lines == ["import:", "training:", "check: Model.fit"], done.stderr


def _model(base=distfit.Model, seed=3):
    inputs = keras.Input((8,))
    initializer = keras.initializers.GlorotUniform(seed)
    x = layers.Dense(6, activation="tanh", kernel_initializer=initializer)(inputs)
    x = layers.Dropout(0.3, seed=1)(layers.BatchNormalization()(x))
    model = base(inputs, layers.Dense(1, kernel_initializer=initializer)(x))
    model.compile(keras.optimizers.Adam(0.01, clipnorm=1.0), "mse", metrics=["mae"])
    return model


def _fit(model, epochs=4):
    data = comparing.regression_data(50)
    options = {"batch_size": 10, "shuffle": False, "verbose": 0}
    return model.fit(*data, epochs=epochs, **options).history


def _trained(strategy):
    if strategy is None:
        model = _model(keras.Model)
    else:
        with strategy.scope():
            model = _model()
    return _fit(model), model.get_weights()


def _at_once(*jobs):
    """Runs functions in a thread each, all started at once."""
    results: list = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(index, job):
        barrier.wait()
        try:
            results[index] = job()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=job) for job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _assert_equal(one, other):
    assert one[0] == other[0]
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_repeats_are_equal_bit_by_bit(make_strategy):
    _assert_equal(*(_trained(make_strategy(3)) for _ in range(2)))


def test_a_stock_model_in_another_thread_is_unaffected(make_strategy):
    """Its optimizer keeps its own methods while a step of distfit is traced."""
    alone = _trained(None), _trained(make_strategy(2))
    together = _at_once(lambda: _trained(None), lambda: _trained(make_strategy(2)))
    for one, other in zip(alone, together, strict=True):
        _assert_equal(one, other)


def test_two_models_train_in_two_threads(make_strategy):
    numbers = (2, 3)
    alone = [_trained(make_strategy(n)) for n in numbers]
    together = _at_once(*(lambda n=n: _trained(make_strategy(n)) for n in numbers))
    for one, other in zip(alone, together, strict=True):
        _assert_equal(one, other)


def test_a_stock_model_under_a_strategy_trains_as_before(make_strategy):
    """Also one that was made while distfit trained under the same strategy."""
    strategy = make_strategy(2)

    def stock():
        with strategy.scope():
            model = _model(keras.Model)
        return _fit(model, 2), model.get_weights()

    before = stock()
    _trained(strategy)
    _assert_equal(before, stock())


@pytest.mark.parametrize("eager", [False, True])
def test_optimizers_keep_no_attribute_of_a_trace(make_strategy, eager):
    with make_strategy(2).scope():
        model = _model()
        model.run_eagerly = eager
    with make_strategy(2).scope():
        model.optimizer.build(model.trainable_variables)
    before = set(vars(model.optimizer))
    _fit(model, 1)
    assert set(vars(model.optimizer)) == before
