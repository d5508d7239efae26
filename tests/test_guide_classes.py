"""The guide's classes, trained by distfit, equal stock Keras on one device.

Their base is `keras.Model`: they know nothing of distfit. A model is built once for
each class and number of replicas and reset to its initial weights before each training,
so that all combinations take only minutes. Stock Keras trains without a strategy, whose
iterators would take as long to make as an epoch.
"""

import functools
import itertools

import comparing
import guide
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick

import distfit
from distfit.training.inputs import without_autotune

REPLICAS = numbers_of_replicas([4], [1, 2, 3, 4])
STEPS_PER_EXECUTION = (1, 4)
# (rows, batch size): a last batch of 10, 11 and 2 rows of 30; even batches; and global
# batches smaller than 2, 3 and 4 replicas.
SIZES = [(1000, 30), (1001, 30), (992, 30), (300, 30), (11, 3), (4, 1), (10, 4)]
NAMES = ("CustomStep", "LowLevelStep", "WeightedStep", "CustomEval")
CLOSE = 1e-6


@functools.cache
def _model(name, strategy, base):
    """A compiled model and a function that resets it."""
    keras.utils.set_random_seed(7)
    with comparing.scope_of(strategy):
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
def _run(library, name, strategy, rows, batch_size, fused=1, base=keras.Model):
    """The results of training by the `fit` of a library.

    Args:
        library: `distfit`, or `keras.Model` for its methods.
        strategy: Where to train; None: where stock Keras does.
    """
    model, reset = _model(name, strategy, base)
    reset()
    model.steps_per_execution = fused
    x, *rest = comparing.regression_data(rows)
    if name == "WeightedStep":
        drawn = np.random.default_rng(3).uniform(0.2, 2.0, rows)
        rest.append(drawn.astype("float32"))
    given = _data(library, batch_size, x, *rest)
    history = library.fit(model, **given, epochs=2, shuffle=False, verbose=0).history
    if strategy is not None:
        comparing.check_replicas_agree(strategy, model)
    evaluation = None
    if name != "LowLevelStep":  # The guide's class has no loss to evaluate.
        evaluation = library.evaluate(model, **given, return_dict=True, verbose=0)
    given = _data(library, batch_size, x)
    predictions = library.predict(model, **given, verbose=0)
    assert predictions.shape == (rows, 1)
    return comparing.Run(history, model.get_weights(), evaluation, predictions)


def _data(library, batch_size, *arrays):
    """Arrays for distfit; for stock Keras, its dataset without autotuning.

    TensorFlow 2.21 sometimes crashes when it releases the iterator of an autotuned
    pipeline.
    """
    if library is distfit:
        names = ("x", "y", "sample_weight")
        given = dict(zip(names, arrays, strict=False))
        return {**given, "batch_size": batch_size}
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)
    return {"x": without_autotune(dataset)}


def _assert_same(stock, run):
    comparing.assert_same(stock, run, relative=CLOSE, absolute=CLOSE)


@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("name", pick(["WeightedStep", "CustomEval"], NAMES))
def test_guide_class_equals_stock_keras_on_one_device(make_strategy, name, replicas):
    every = list(itertools.product(SIZES, STEPS_PER_EXECUTION))
    few = [((1001, 30), 4), ((11, 3), 1)]
    for (rows, batch_size), fused in pick(few, every):
        stock = _run(keras.Model, name, None, rows, batch_size)
        run = _run(distfit, name, make_strategy(replicas), rows, batch_size, fused)
        _assert_same(stock, run)


@pytest.mark.parametrize("name", pick(["WeightedStep"], NAMES))
def test_methods_of_distfit_models_equal_stock_keras(make_strategy, name):
    own = _run(distfit.Model, name, make_strategy(2), 1001, 30, base=distfit.Model)
    _assert_same(_run(keras.Model, name, None, 1001, 30), own)


@functools.cache
def _run_gan(library, strategy, rows):
    x = comparing.regression_data(rows)[0]
    dataset = without_autotune(tf.data.Dataset.from_tensor_slices(x).batch(30))
    return comparing.run(
        strategy,
        lambda: guide.small_gan(guide.classes(keras.Model).GAN),
        lambda model: library.fit(model, dataset, epochs=2, shuffle=False, verbose=0),
    )


@pytest.mark.parametrize("rows", pick([1001], [1001, 992]))
@pytest.mark.parametrize("replicas", REPLICAS)
def test_guide_gan_equals_stock_keras_on_one_device(make_strategy, replicas, rows):
    """It draws with plain `keras.random`."""
    stock = _run_gan(keras.Model, tf.distribute.get_strategy(), rows)
    _assert_same(stock, _run_gan(distfit, make_strategy(replicas), rows))
