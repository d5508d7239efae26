"""Replicas draw different numbers, or their rows of a common draw; reproducibly."""

import comparing
import guide
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import distfit

ROWS = 40


class FaithfulGAN(guide.classes(distfit.Model).GAN):
    """The guide's step with its draws made for the global batch."""

    def train_step(self, real_images):
        rows = tf.shape(real_images)[0]
        latent = self._latent(rows)
        noise = [self._noise(rows), self._noise(rows)]
        generated = self.generator(latent)
        labels = tf.concat([tf.ones((rows, 1)) + noise[0], noise[1]], axis=0)
        with tf.GradientTape() as tape:
            predictions = self.discriminator(
                tf.concat([generated, real_images], axis=0)
            )
            d_loss = self.loss_fn(labels, predictions)
        grads = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply(grads, self.discriminator.trainable_weights)
        latent = self._latent(rows)
        with tf.GradientTape() as tape:
            predictions = self.discriminator(self.generator(latent))
            g_loss = self.loss_fn(tf.zeros((rows, 1)), predictions)
        grads = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply(grads, self.generator.trainable_weights)
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {m.name: m.result() for m in self.metrics}

    def _latent(self, rows):
        shape = (rows, self.latent_dim)
        return distfit.random.normal(shape, seed=self.seed_generator)

    def _noise(self, rows):
        return 0.05 * distfit.random.uniform((rows, 1), seed=self.seed_generator)


def _fit_gan(model):
    x, _ = comparing.regression_data(ROWS)
    batches = tf.data.Dataset.from_tensor_slices(x).batch(10).repeat()
    return model.fit(batches, epochs=4, steps_per_epoch=5, verbose=0)


def _gan_run(strategy, cls):
    return comparing.run(strategy, lambda: guide.small_gan(cls), _fit_gan)


def test_gan_with_global_draws_does_not_depend_on_replicas(make_strategy):
    one = _gan_run(make_strategy(1), FaithfulGAN)
    for replicas in (2, 4):
        run = _gan_run(make_strategy(replicas), FaithfulGAN)
        comparing.assert_same(one, run, relative=1e-4)


def test_gan_with_plain_keras_random_draws_apart_but_reproducibly(make_strategy):
    gan = guide.classes(distfit.Model).GAN
    one = _gan_run(make_strategy(1), gan)
    first, second = (_gan_run(make_strategy(2), gan) for _ in range(2))
    assert first.history == second.history
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.history["d_loss"] != pytest.approx(first.history["d_loss"], rel=1e-5)


class Draws(distfit.Model):
    """Predicts what its step draws, a row for each row."""

    def predict_step(self, data):
        return self.draw(tf.shape(data)[0])


def _drawn(strategy, draw, rows=8, batch_size=8):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = Draws()
        model.draw = draw
        model.generator = keras.random.SeedGenerator(11)
        model.dropout = layers.Dropout(0.5, seed=5)
    model.draw = lambda count: draw(model, count)
    return model.predict(np.zeros((rows, 1)), batch_size=batch_size, verbose=0)


RANDOM_LAYERS = [
    lambda: layers.Dropout(0.5, seed=5),
    lambda: layers.GaussianNoise(1.0, seed=5),
    lambda: layers.GaussianDropout(0.5, seed=5),
    lambda: layers.AlphaDropout(0.5, seed=5),
    lambda: layers.SpatialDropout1D(0.5, seed=5),
    lambda: layers.RandomRotation(0.2, seed=5),
]


@pytest.mark.parametrize("make_layer", RANDOM_LAYERS)
def test_random_layers_draw_apart_on_replicas(make_strategy, make_layer):
    strategy = make_strategy(2)
    shape = (2, 6, 6, 3) if "Rotation" in type(make_layer()).__name__ else (2, 64, 4)
    x = np.repeat(np.random.default_rng(0).normal(size=(1, *shape[1:])), 2, axis=0)

    class Applies(distfit.Model):
        def predict_step(self, data):
            return self.layer(data, training=True)

    def draw():
        with strategy.scope():
            model = Applies()
            model.layer = make_layer()
        return model.predict(x.astype("float32"), batch_size=2, verbose=0)

    first = draw()
    assert not np.allclose(first[0], first[1])
    np.testing.assert_array_equal(first, draw())


def test_unseeded_draws_in_a_step_work_and_differ(make_strategy):
    class Unseeded(distfit.Model):
        def train_step(self, data):
            noise = keras.random.normal((tf.shape(data)[0], 1))
            return {"mean": tf.reduce_mean(noise)}

    def train():
        keras.utils.set_random_seed(1)
        with make_strategy(2).scope():
            model = Unseeded()
            model.compile()
        return model.fit(np.zeros((8, 1)), batch_size=4, epochs=3, verbose=0).history

    first = train()
    assert len(set(first["mean"])) == 3
    assert first == train()


def test_common_draw_gives_each_replica_its_rows(make_strategy):
    def draw(model, rows):
        return distfit.random.normal((rows, 3), seed=model.generator)

    one = _drawn(make_strategy(1), draw, rows=9, batch_size=5)
    for replicas in (2, 3, 4, 8):
        drawn = _drawn(make_strategy(replicas), draw, rows=9, batch_size=5)
        np.testing.assert_array_equal(one, drawn)


def test_common_draw_without_rows_is_the_same_everywhere(make_strategy):
    def draw(model, rows):
        one = distfit.random.uniform((1, 3), seed=model.generator)
        return tf.repeat(one, rows, axis=0)

    drawn = _drawn(make_strategy(2), draw)
    np.testing.assert_array_equal(drawn, np.repeat(drawn[:1], 8, axis=0))


def test_keras_random_draws_apart_on_replicas(make_strategy):
    def draw(model, rows):
        return keras.random.normal((rows, 3), seed=model.generator)

    drawn = _drawn(make_strategy(2), draw)
    assert not np.allclose(drawn[:4], drawn[4:])
    one = _drawn(make_strategy(1), draw)
    np.testing.assert_array_equal(drawn[:4], one[:4])


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


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_streams_do_not_depend_on_what_is_known_of_the_batches(make_strategy, replicas):
    """A batch that may be smaller than the replica count is drawn for alike."""

    class Sums(distfit.Model):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(4)

        def train_step(self, data):
            drawn = keras.random.uniform((tf.shape(data)[0], 3), seed=self.seeds)
            return {"mean": tf.reduce_mean(drawn)}

    def mean(drop_remainder):
        with make_strategy(replicas).scope():
            model = Sums()
            model.compile()
        rows = tf.data.Dataset.from_tensor_slices(np.zeros((16, 1), "float32"))
        batches = rows.batch(8, drop_remainder=drop_remainder)
        return model.fit(batches, verbose=0).history["mean"]

    assert mean(drop_remainder=True) == mean(drop_remainder=False)


def _nested(draw):
    class Nested(distfit.Model):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(4)

        @tf.function
        def call(self, x):
            return x + draw(tf.shape(x), seed=self.seeds)

        def test_step(self, data):
            return {"mean": tf.reduce_mean(self(data))}

    return Nested


def test_draws_in_a_nested_function_can_be_used_by_every_step(make_strategy):
    """TensorFlow takes the trace of one step for the next."""
    with make_strategy(4).scope():
        model = _nested(keras.random.uniform)()
        model.compile()
    x = np.zeros((8, 3), "float32")
    drawn = model.predict(x, batch_size=8, verbose=0)
    assert len(np.unique(drawn)) == 24
    for rows in (8, 7, 2):
        logs = model.evaluate(x[:rows], batch_size=8, verbose=0, return_dict=True)
        assert 0 < logs["mean"] < 1


def test_common_draw_in_a_nested_function_is_refused(make_strategy):
    with make_strategy(2).scope():
        model = _nested(distfit.random.uniform)()
    with pytest.raises(ValueError, match="`distfit.random` in a nested `tf.function`"):
        model.predict(np.zeros((8, 3), "float32"), verbose=0)


def test_common_draw_takes_the_shape_of_a_tensor(make_strategy):
    def draw(model, rows):
        x = tf.zeros((rows, 3))
        return distfit.random.normal(tf.shape(x), seed=model.generator)

    one = _drawn(make_strategy(1), draw)
    np.testing.assert_array_equal(one, _drawn(make_strategy(3), draw))
