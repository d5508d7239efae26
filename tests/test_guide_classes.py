"""The guide's classes, with another base, equal stock Keras on one device.

A model is built once for each class and number of replicas and set back to its first
weights before each training, so that the whole product of cases takes minutes.
"""

import functools
import itertools

import comparing
import guide
import keras
import numpy as np
import pytest
import tensorflow as tf

import distfit
from distfit.data import without_autotune

REPLICAS = (1, 2, 3, 4)
STEPS_PER_EXECUTION = (1, 4)
# (rows, batch size): a last batch of 10, 11 and 2 rows of 30; even batches; and global
# batches smaller than 2, 3 and 4 replicas.
SIZES = [(1000, 30), (1001, 30), (992, 30), (300, 30), (11, 3), (4, 1), (10, 4)]
NAMES = ("CustomStep", "LowLevelStep", "WeightedStep", "CustomEval")


@functools.cache
def _model(base, name, strategy):
    """A compiled model and a function that sets it back to its start."""
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model = guide.mlp(getattr(guide.classes(base), name))
        metrics = {} if name == "LowLevelStep" else {"loss": "mse", "metrics": ["mae"]}
        model.compile(optimizer="adam", **metrics)
        model.optimizer.build(model.trainable_variables)
    weights = model.get_weights()
    state = [v.numpy() for v in model.optimizer.variables]

    def reset():
        model.set_weights(weights)
        for variable, value in zip(model.optimizer.variables, state, strict=True):
            variable.assign(value)

    return model, reset


@functools.cache
def _run(base, name, strategy, rows, batch_size, steps_per_execution):
    model, reset = _model(base, name, strategy)
    reset()
    model.steps_per_execution = steps_per_execution
    x, *rest = comparing.regression_data(rows)
    if name == "WeightedStep":
        drawn = np.random.default_rng(3).uniform(0.2, 2.0, rows)
        rest.append(drawn.astype("float32"))
    given = _data(base, batch_size, x, *rest)
    history = model.fit(**given, epochs=2, shuffle=False, verbose=0).history
    comparing.check_replicas_agree(strategy, model)
    evaluation = None
    if name != "LowLevelStep":  # The guide's class has no loss to evaluate.
        evaluation = model.evaluate(**given, return_dict=True, verbose=0)
    predictions = model.predict(**_data(base, batch_size, x), verbose=0)
    assert predictions.shape == (rows, 1)
    return comparing.Run(history, model.get_weights(), evaluation, predictions)


def _data(base, batch_size, *arrays):
    """Arrays for distfit. For stock Keras, what it makes of them, but not tuned.

    TensorFlow 2.21 now and then crashes when it releases the iterator of a tuned
    pipeline.
    """
    if base is distfit.Model:
        names = ("x", "y", "sample_weight")
        given = dict(zip(names, arrays, strict=False))
        return {**given, "batch_size": batch_size}
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)
    return {"x": without_autotune(dataset)}


@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("name", NAMES)
def test_guide_class_equals_stock_keras_on_one_device(make_strategy, name, replicas):
    for (rows, batch_size), fused in itertools.product(SIZES, STEPS_PER_EXECUTION):
        stock = _run(keras.Model, name, make_strategy(1), rows, batch_size, 1)
        run = _run(
            distfit.Model, name, make_strategy(replicas), rows, batch_size, fused
        )
        comparing.assert_same(stock, run)


def test_guide_gan_on_one_device_equals_stock_keras(make_strategy):
    def train(base):
        return comparing.run(
            make_strategy(1),
            lambda: guide.small_gan(guide.classes(base).GAN),
            lambda model: model.fit(
                comparing.regression_data(100)[0],
                batch_size=16,
                epochs=2,
                shuffle=False,
                verbose=0,
            ),
        )

    comparing.assert_same(train(keras.Model), train(distfit.Model))
