"""`jit_compile=True` on several replicas: XLA compiles what lies between exchanges."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit

# Batches of 7, 7, 7 and 2 rows: uneven parts, then fewer rows than replicas.
ROWS, BATCH = 23, 7


def _run(make_strategy, replicas, build, data, then=None):
    """On one replica without XLA, on several with it."""

    def build_and_compile():
        model, optimizer = build()
        model.compile(optimizer, "mse", metrics=["mae"], jit_compile=replicas > 1)
        return model

    def fit(model):
        return model.fit(*data, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)

    return comparing.run(make_strategy(replicas), build_and_compile, fit, then)


@pytest.mark.parametrize(
    "replicas, normalized", pick([(3, True)], [(2, False), (3, True)])
)
def test_layers_losses_and_updates_equal_one_device(
    make_strategy, replicas, normalized
):
    """With losses that layers add, statistics of the global batch, and clipping."""
    data = comparing.regression_data(ROWS)

    def build():
        inputs = keras.Input((8,))
        x = layers.Dense(5, "tanh", activity_regularizer="l2")(inputs)
        x = layers.Dense(4, use_bias=False, kernel_regularizer="l2")(x)
        x = layers.BatchNormalization()(x) if normalized else x
        model = distfit.Model(inputs, layers.Dense(1)(x))
        return model, keras.optimizers.SGD(0.02, 0.9, clipnorm=0.5, use_ema=True)

    def then(model):
        logs = model.evaluate(*data, batch_size=BATCH, verbose=0, return_dict=True)
        return logs, model.predict(data[0], batch_size=BATCH, verbose=0)

    one = _run(make_strategy, 1, build, data, then)
    many = _run(make_strategy, replicas, build, data, then)
    comparing.assert_same(one, many)


@pytest.mark.parametrize("recurrent", pick([True], [False, True]))
def test_masks_sparse_gradients_and_accumulation_equal_one_device(
    make_strategy, recurrent
):
    """The mask of the output decides which positions the loss counts."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 4, (ROWS, 6))
    y = generator.normal(size=(ROWS, 6, 1)).astype("float32")

    def build():
        inputs = keras.Input((6,), dtype="int32")
        hidden = layers.Embedding(4, 3, mask_zero=True)(inputs)
        if recurrent:
            hidden = layers.SimpleRNN(4, return_sequences=True)(hidden)
        outputs = layers.Dense(1)(hidden)
        inner = keras.optimizers.Adam(0.02, gradient_accumulation_steps=2)
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
        return distfit.Model(inputs, outputs), optimizer

    one, two = (_run(make_strategy, n, build, (x, y)) for n in (1, 2))
    comparing.assert_same(one, two)


class TwoParts(distfit.Model):
    """The step calls both parts, one on the output of the other."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((8,)), layers.Dense(3, "tanh")])
        self.critic = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
        self.critic_optimizer = keras.optimizers.RMSprop(0.01)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            made = self.generator(x)
            score = tf.reduce_mean(tf.square(self.critic(made) - y))
            (slope,) = tape.gradient(score, [made])
            penalty = tf.reduce_mean(tf.reduce_sum(tf.square(slope), 1))
            loss = score + 10.0 * penalty
        for part, optimizer in (
            (self.generator, self.optimizer),
            (self.critic, self.critic_optimizer),
        ):
            variables = part.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss, "penalty": penalty}


def test_parts_and_second_derivatives_equal_one_device(make_strategy):
    def run(replicas):
        def build():
            model = TwoParts()
            model.compile("sgd", jit_compile=replicas > 1)
            return model

        def fit(model):
            data = comparing.regression_data(ROWS)
            return model.fit(*data, batch_size=BATCH, shuffle=False, verbose=0)

        return comparing.run(make_strategy(replicas), build, fit)

    comparing.assert_same(run(1), run(2))


def test_rows_lose_different_units(make_strategy):
    """The log counts the rows that no other row equals."""

    class CountsRows(distfit.Model):
        def train_step(self, data):
            rows = self(data, training=True)
            same = tf.reduce_all(rows[:, tf.newaxis] == rows, axis=-1)
            alone = tf.reduce_sum(tf.cast(same, tf.float32), axis=1) == 1
            return {"alone": tf.reduce_sum(tf.cast(alone, tf.float32))}

    with make_strategy(2).scope():
        inputs = keras.Input((64,))
        model = CountsRows(inputs, layers.Dropout(0.5, seed=1)(inputs))
        model.compile(jit_compile=True)
    ones = np.ones((8, 64), "float32")
    assert model.fit(ones, batch_size=8, verbose=0).history["alone"] == [8]


def _through_text(x):
    """Something that XLA cannot compile."""
    return tf.strings.to_number(tf.strings.as_string(x))


class TextLayer(layers.Layer):
    @tf.custom_gradient
    def call(self, x):
        return _through_text(x), lambda upstream: upstream


class TextUpdate(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(_through_text(gradient), variable, learning_rate)


@pytest.mark.parametrize(
    "layer, optimizer",
    [(TextLayer, keras.optimizers.SGD), (layers.Identity, TextUpdate)],
)
def test_layers_and_updates_are_compiled(make_strategy, layer, optimizer):
    with make_strategy(2).scope():
        inputs = keras.Input((8,))
        model = distfit.Model(inputs, layers.Dense(1)(layer()(inputs)))
        model.compile(optimizer(0.01), "mse")
    data = comparing.regression_data(8)
    model.fit(*data, verbose=0)
    with make_strategy(2).scope():
        model.compile(optimizer(0.01), "mse", jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="unsupported operations"):
        model.fit(*data, verbose=0)


class Centers(layers.Layer):
    """Needs an exchange in the middle of the forward pass."""

    def call(self, x):
        return x - tf.reduce_mean(x)


class Doubles(layers.Layer):
    """Calls a Python function, between compiled parts."""

    @tf.custom_gradient
    def call(self, x):
        doubled = tf.numpy_function(lambda x: 2 * x, [x], x.dtype)
        return tf.ensure_shape(doubled, x.shape), lambda upstream: 2 * upstream


@pytest.mark.parametrize("layer", [Centers, Doubles])
def test_a_layer_that_is_compiled_in_parts(make_strategy, layer):
    def build():
        inputs = keras.Input((8,))
        x = layer()(layers.Dense(4, activation="tanh")(inputs))
        return distfit.Model(inputs, layers.Dense(1)(x)), "sgd"

    data = comparing.regression_data(ROWS)
    one, two = (_run(make_strategy, n, build, data) for n in (1, 2))
    comparing.assert_same(one, two)


def test_auto_is_no_xla_on_several_replicas(make_strategy, monkeypatch):
    """Keras compiles with XLA by itself if there is a GPU, but not here."""
    stock = tf.config.list_physical_devices
    gpu = tf.config.PhysicalDevice("GPU:0", "GPU")
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda *args: [*stock(*args), gpu]
    )
    with make_strategy(2).scope():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
        model.compile("sgd", "mse")
    assert model.jit_compile is False
