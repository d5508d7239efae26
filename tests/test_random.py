"""Draws are those of one device, whatever the number of replicas."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit

ROWS = 40
REPLICAS = pick([3], [1, 2, 3])


def _drawing(base):
    class Draws(base):
        """Predicts what its step draws, a row for each row."""

        def __init__(self, draw):
            super().__init__()
            self.draw = draw
            self.seeds = keras.random.SeedGenerator(11)
            self.generator = tf.random.Generator.from_seed(5)

        def predict_step(self, data):
            return self.draw(self, tf.shape(data)[0])

    return Draws


def _drawn(base, strategy, draw, rows, batch_size):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = _drawing(base)(draw)
    x = np.zeros((rows, 1), "float32")
    return model.predict(x, batch_size=batch_size, verbose=0)


def _pair(model, rows):
    first = keras.random.normal((rows, 2), seed=model.seeds)
    return tf.concat([first, keras.random.uniform((rows, 2), seed=model.seeds)], 1)


DRAWS = {
    "normal": lambda m, n: keras.random.normal((n, 3), seed=m.seeds),
    "uniform": lambda m, n: keras.random.uniform((n, 2, 5), seed=m.seeds),
    "truncated": lambda m, n: keras.random.truncated_normal((n, 3), seed=m.seeds),
    "integers": lambda m, n: keras.random.randint((n, 3), 0, 99, seed=m.seeds),
    "of a number": lambda m, n: keras.random.normal((n, 3), seed=7),
    "unseeded": lambda m, n: keras.random.normal((n, 3)),
    "of a tensor's shape": lambda m, n: keras.random.normal(
        tf.shape(tf.zeros((n, 3))), seed=m.seeds
    ),
    "one for all": lambda m, n: tf.repeat(
        keras.random.uniform((1, 3), seed=m.seeds), n, axis=0
    ),
    "two": _pair,
    "gamma": lambda m, n: keras.random.gamma((n, 2), 0.7, seed=m.seeds),
    "beta": lambda m, n: keras.random.beta((n, 2), 0.7, 2.0, seed=m.seeds),
    "binomial": lambda m, n: keras.random.binomial((n, 2), 9, 0.4, seed=m.seeds),
    "categorical": lambda m, n: keras.random.categorical(
        tf.zeros((n, 5)), 4, seed=m.seeds
    ),
    "shuffle": lambda m, n: keras.random.shuffle(tf.range(n), seed=m.seeds),
    "generator": lambda m, n: m.generator.normal((n, 3)),
    "seeded operation": lambda m, n: tf.random.normal((n, 3), seed=4),
    "stateless": lambda m, n: tf.random.stateless_uniform((n, 3), seed=[1, 2]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_equal_stock_keras_on_one_device(make_strategy, name):
    """Bit for bit, in batches of 5 and of 2 rows.

    When the size of a batch changes, stock Keras traces its function again, and an
    operation with a seed of its own restarts: that case has even batches.
    """
    rows = 10 if name == "seeded operation" else 12
    stock = tf.distribute.get_strategy()
    one = _drawn(keras.Model, stock, DRAWS[name], rows, 5)
    assert len(np.unique(one)) > 2
    for replicas in REPLICAS:
        many = _drawn(distfit.Model, make_strategy(replicas), DRAWS[name], rows, 5)
        np.testing.assert_array_equal(one, many)


RANDOM_LAYERS = [
    lambda: layers.Dropout(0.5, seed=5),
    lambda: layers.Dropout(0.5),
    lambda: layers.GaussianNoise(1.0, seed=5),
    lambda: layers.GaussianDropout(0.5, seed=5),
    lambda: layers.AlphaDropout(0.5, seed=5),
    lambda: layers.SpatialDropout1D(0.5, seed=5),
    lambda: layers.RandomRotation(0.2, seed=5),
]


@pytest.mark.parametrize("make_layer", RANDOM_LAYERS)
def test_random_layers_equal_stock_keras_on_one_device(make_strategy, make_layer):
    rotates = "Rotation" in type(make_layer()).__name__
    shape = (5, 6, 6, 3) if rotates else (5, 8, 4)
    x = np.repeat(np.random.default_rng(0).normal(size=(1, *shape[1:])), 5, axis=0)

    def applied(base, strategy):
        class Applies(base):
            def predict_step(self, data):
                return self.layer(data, training=True)

        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = Applies()
            model.layer = make_layer()
        return model.predict(x.astype("float32"), batch_size=3, verbose=0)

    one = applied(keras.Model, tf.distribute.get_strategy())
    assert not np.allclose(one[0], one[1])
    for replicas in REPLICAS:
        many = applied(distfit.Model, make_strategy(replicas))
        np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-6 if rotates else 0)


def test_unseeded_draws_in_a_step_differ_from_step_to_step(make_strategy):
    class Unseeded(distfit.Model):
        def train_step(self, data):
            noise = keras.random.normal((tf.shape(data)[0], 1))
            return {"mean": tf.reduce_mean(noise)}

    def train(replicas):
        keras.utils.set_random_seed(1)
        with make_strategy(replicas).scope():
            model = Unseeded()
            model.compile()
        return model.fit(np.zeros((8, 1)), batch_size=4, epochs=3, verbose=0).history

    first = train(2)
    assert len(set(first["mean"])) == 3
    assert first == train(2)
    comparing.assert_close_logs(train(1), first, 1e-6)


def test_seed_state_stays_equal_on_replicas_and_as_on_one_device(make_strategy):
    def state(replicas):
        strategy = make_strategy(replicas)
        with strategy.scope():
            inputs = keras.Input((8,))
            model = distfit.Model(
                inputs, layers.Dense(1)(layers.Dropout(0.5, seed=3)(inputs))
            )
            model.compile("sgd", "mse")
        model.fit(*comparing.regression_data(ROWS), batch_size=10, verbose=0)
        variable = model.layers[1].seed_generator.state.value
        return [v.numpy() for v in strategy.experimental_local_results(variable)]

    assert len({tuple(s) for s in [*state(1), *state(2), *state(4)]}) == 1


@pytest.mark.parametrize("replicas", numbers_of_replicas([4], [2, 4, 8]))
def test_streams_do_not_depend_on_what_is_known_of_the_batches(make_strategy, replicas):
    class Sums(distfit.Model):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(4)

        def train_step(self, data):
            drawn = keras.random.uniform((tf.shape(data)[0], 3), seed=self.seeds)
            return {"mean": tf.reduce_mean(drawn)}

    def mean(replicas, drop_remainder):
        with make_strategy(replicas).scope():
            model = Sums()
            model.compile()
        rows = tf.data.Dataset.from_tensor_slices(np.zeros((16, 1), "float32"))
        batches = rows.batch(8, drop_remainder=drop_remainder)
        return model.fit(batches, verbose=0).history["mean"]

    known, unknown, one = mean(replicas, True), mean(replicas, False), mean(1, True)
    assert known == pytest.approx(one, rel=1e-6)
    assert unknown == pytest.approx(one, rel=1e-6)


def test_draws_in_a_nested_function_can_be_used_by_every_step(make_strategy):
    """TensorFlow uses the trace of one step for the next."""

    class Nested(distfit.Model):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(4)

        @tf.function
        def call(self, x):
            return x + keras.random.uniform(tf.shape(x), seed=self.seeds)

        def test_step(self, data):
            return {"mean": tf.reduce_mean(self(data))}

    def run(replicas):
        with make_strategy(replicas).scope():
            model = Nested()
            model.compile()
        x = np.zeros((8, 3), "float32")
        drawn = model.predict(x, batch_size=8, verbose=0)
        means = [model.evaluate(x[:n], batch_size=8, verbose=0) for n in (8, 7, 2)]
        return drawn, means

    (one, means), (four, others) = run(1), run(4)
    assert len(np.unique(one)) == 24
    np.testing.assert_array_equal(one, four)
    assert others == pytest.approx(means, rel=1e-6)
    assert len(set(means)) == 3
