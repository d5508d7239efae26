"""Mixed precision: all replicas skip a step together, and scales equal one device.

Low precision rounds the sums of a batch differently when it is cut into parts, so these
numbers agree within the rounding of the type and not better.
"""

import functools

import comparing
import keras
import numpy as np
import pytest
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit

ROWS_PER_REPLICA = 2


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


class KeepsState(keras.callbacks.Callback):
    """Keeps the loss scale and the weights after each step."""

    def __init__(self):
        super().__init__()
        self.scales, self.weights = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.scales.append(float(self.model.optimizer.dynamic_scale.numpy()))
        self.weights.append(self.model.get_weights())


def _train(strategy, optimizer, x, y, batch_size):
    """Trains by distfit with a strategy, by stock Keras on one device without."""
    state = KeepsState()
    keras.utils.set_random_seed(0)
    base = keras.Model if strategy is None else distfit.Model
    with comparing.scope_of(strategy):
        inputs = keras.Input((8,))
        hidden = layers.Dense(4)(inputs)
        model = base(inputs, layers.Dense(1, dtype="float32")(hidden))
        model.compile(optimizer(), "mse")
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        model.optimizer.initial_scale = 64.0
        callbacks = [state]
    else:
        callbacks = []
    history = model.fit(
        x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=callbacks
    )
    if strategy is not None:
        comparing.check_replicas_agree(strategy, model)
    return model, state, history.history


def _assert_within(rounding, expected, weights):
    for a, b in zip(expected, weights, strict=True):
        np.testing.assert_allclose(b, a, rtol=rounding, atol=rounding)


def _adam():
    return keras.optimizers.Adam(0.01)


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3]))
@pytest.mark.parametrize("make_optimizer", pick([_adam], [lambda: "sgd", _adam]))
def test_an_overflow_on_any_replica_skips_the_step_on_all(
    make_strategy, policy, replicas, make_optimizer
):
    """Steps 2, 4, ... overflow on the first replica, on the second ..."""
    policy("mixed_float16")
    batch_size = replicas * ROWS_PER_REPLICA
    x, y = comparing.regression_data(2 * replicas * batch_size)
    for replica in range(replicas):
        y[(2 * replica + 1) * batch_size + replica * ROWS_PER_REPLICA] = 1e9
    _, one, _ = _train(None, make_optimizer, x, y, batch_size)
    model, many, _ = _train(make_strategy(replicas), make_optimizer, x, y, batch_size)
    assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
    expected = [64.0 / 2 ** ((step + 1) // 2) for step in range(2 * replicas)]
    assert many.scales == one.scales == expected
    for step in range(1, 2 * replicas, 2):
        for before, after in zip(
            many.weights[step - 1], many.weights[step], strict=True
        ):
            np.testing.assert_array_equal(before, after)
        if step + 1 < 2 * replicas:
            assert np.any(many.weights[step][0] != many.weights[step + 1][0])
    for after, expected in zip(many.weights, one.weights, strict=True):
        _assert_within(2**-11, expected, after)


def test_the_scale_grows_as_on_one_device(make_strategy, policy):
    """After every third step without an overflow; there is one in step 5."""
    policy("mixed_float16")
    x, y = comparing.regression_data(8 * 6)
    y[4 * 6 + 5] = 1e9

    def optimizer():
        inner = keras.optimizers.SGD(0.001)
        return keras.optimizers.LossScaleOptimizer(inner, dynamic_growth_steps=3)

    _, one, _ = _train(None, optimizer, x, y, 6)
    _, three, _ = _train(make_strategy(3), optimizer, x, y, 6)
    assert three.scales == one.scales == [64, 64, 128, 128, 64, 64, 64, 128]
    for after, expected in zip(three.weights, one.weights, strict=True):
        _assert_within(2**-11, expected, after)


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_scale_that_the_policy_makes_is_that_of_one_device(
    make_strategy, policy, replicas
):
    """It begins too large for these data, and is halved until it fits.

    The optimizer is built in the first step, which therefore uses another scale than
    the later ones. One row dominates the gradients, so that where sums of rows
    overflow, those of this row's replica do.
    """
    policy("mixed_float16")
    x, y = comparing.regression_data(6)
    y[4] *= 50
    x, y = (np.tile(rows, [20, 1]) for rows in (x, y))

    def run(strategy):
        keras.utils.set_random_seed(0)
        with comparing.scope_of(strategy):
            inputs = keras.Input((8,))
            outputs = layers.Dense(1, dtype="float32")(layers.Dense(4)(inputs))
            model = keras.Model(inputs, outputs)
            model.compile(keras.optimizers.SGD(0.01), "mse")
        state = KeepsState()
        fit = functools.partial(distfit.fit, model) if strategy else model.fit
        options = {"batch_size": 6, "shuffle": False, "verbose": 0}
        fit(x, y, callbacks=[state], **options)
        return state

    one, many = run(None), run(make_strategy(replicas))
    assert many.scales == one.scales
    assert 2 < len(set(one.scales)) < 10
    for after, expected in zip(many.weights, one.weights, strict=True):
        _assert_within(2**-9, expected, after)


@pytest.mark.parametrize(
    "name, rounding", [("mixed_float16", 2**-11), ("mixed_bfloat16", 2**-8)]
)
def test_training_equals_one_device_within_rounding(
    make_strategy, policy, name, rounding
):
    """The last batch has 2 rows, fewer than there are replicas."""
    policy(name)
    data = comparing.regression_data(30)

    def train(replicas):
        def momentum():
            return keras.optimizers.SGD(0.01, momentum=0.9, clipnorm=1.0)

        strategy = make_strategy(replicas) if replicas > 1 else None
        model, _, history = _train(strategy, momentum, *data, 7)
        return model.get_weights(), history

    (one, history), (three, other) = train(1), train(3)
    np.testing.assert_allclose(other["loss"], history["loss"], rtol=2 * rounding)
    for a, b in zip(one, three, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding)


@pytest.mark.parametrize("steps", pick([2], [None, 2]))
def test_scales_of_float8_are_those_of_the_global_batch(make_strategy, steps):
    """They come as "gradients" that replace variables: sums of them would be far off.

    A float32 that is rounded otherwise may be the next of the few numbers of 8 bits.
    """

    def run(replicas):
        def build():
            inputs = keras.Input((8,))
            dense = layers.Dense(6, activation="tanh", dtype="float8_from_float32")
            model = distfit.Model(inputs, layers.Dense(1)(dense(inputs)))
            optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=steps)
            model.compile(optimizer, "mse")
            return model

        def fit(model):
            arguments = {"batch_size": 7, "epochs": 2, "shuffle": False, "verbose": 0}
            return model.fit(*comparing.regression_data(21), **arguments)

        return comparing.run(make_strategy(replicas), build, fit)

    comparing.assert_same(run(1), run(3), relative=1e-4, absolute=1e-3)
