"""The gradient is summed once, before everything else an optimizer does."""

import comparing
import keras
import pytest
import tensorflow as tf
from keras import layers

import distfit


def _run(strategy, make_optimizer, cls=distfit.Model, **dense):
    def build():
        inputs = keras.Input((8,))
        hidden = layers.Dense(5, activation="tanh", **dense)(inputs)
        model = cls(inputs, layers.Dense(1)(hidden))
        model.compile(make_optimizer(), "mse")
        return model

    def fit(model):
        x, y = comparing.regression_data(22)
        return model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)

    return comparing.run(strategy, build, fit)


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.05),
    "accumulation": lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=3),
    "ema": lambda: keras.optimizers.SGD(
        0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_equals_one_device(make_strategy, name):
    """The last batch of each epoch has 2 rows, fewer than there are replicas."""
    one = _run(make_strategy(1), OPTIMIZERS[name])
    comparing.assert_same(one, _run(make_strategy(3), OPTIMIZERS[name]))


def test_constraint_equals_one_device(make_strategy):
    def run(replicas):
        constraint = keras.constraints.UnitNorm()
        return _run(
            make_strategy(replicas),
            lambda: keras.optimizers.SGD(0.1),
            kernel_constraint=constraint,
        )

    comparing.assert_same(run(1), run(2))


class TwoOptimizers(distfit.Model):
    """The second optimizer is first used inside the step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = keras.optimizers.Adam(0.01)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        kernels, biases = self.trainable_variables[::2], self.trainable_variables[1::2]
        self.optimizer.apply(gradients[::2], kernels)
        self.second.apply_gradients(zip(gradients[1::2], biases, strict=True))
        return {"loss": loss}


def test_second_optimizer_first_used_inside_the_step(make_strategy):
    """Stock Keras: you must feed a value for placeholder."""

    def run(replicas):
        return _run(
            make_strategy(replicas), lambda: keras.optimizers.SGD(0.05), TwoOptimizers
        )

    one = run(1)
    comparing.assert_same(one, run(2))
    comparing.assert_same(one, run(4))


class NoGradient(distfit.Model):
    """One of its variables has no gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unused = self.add_weight(shape=(2,), name="unused")


def test_variable_without_gradient(make_strategy):
    def run(replicas):
        return _run(
            make_strategy(replicas), lambda: keras.optimizers.Adam(0.05), NoGradient
        )

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        comparing.assert_same(run(1), run(2))


@pytest.mark.parametrize("named", [True, False])
def test_mixed_float16_scales_and_skips_as_on_one_device(make_strategy, named):
    """The last of three batches overflows: everyone skips it and halves the scale."""
    x, y = comparing.regression_data(12)
    y[9] = 60000.0

    def run(replicas):
        keras.utils.set_random_seed(0)
        with make_strategy(replicas).scope():
            inputs = keras.Input((8,))
            model = distfit.Model(inputs, layers.Dense(1)(inputs))
            optimizer = keras.optimizers.SGD(0.01)
            if not named:
                scale = keras.optimizers.LossScaleOptimizer
                optimizer = scale(optimizer, initial_scale=64.0)
            model.compile(optimizer, "mse")
            if named:
                model.optimizer.initial_scale = 64.0
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        comparing.check_replicas_agree(make_strategy(replicas), model)
        return model

    keras.config.set_dtype_policy("mixed_float16")
    try:
        one, two = run(1), run(2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert type(two.optimizer) is keras.optimizers.LossScaleOptimizer
    scales = [model.optimizer.dynamic_scale.numpy() for model in (one, two)]
    assert scales == [32, 32]
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        assert a == pytest.approx(b, abs=2e-3)  # The rounding of float16.
