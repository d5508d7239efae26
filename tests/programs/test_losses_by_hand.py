"""Losses as people write them, on 2 and 3 replicas."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from pieces import Program, classes, compiled, mlp, numbers


class Focal(Program):
    """Well classified rows count less; a mean over the positives."""

    def loss_of(self, x, y):
        chance = tf.sigmoid(self.net(x))
        right = tf.where(y > 0, chance, 1 - chance)
        each = -((1 - right) ** 2) * tf.math.log(right + 1e-7)
        positives = tf.reduce_sum(tf.cast(y > 0, tf.float32))
        return tf.reduce_sum(each) / tf.maximum(positives, 1.0)


def test_focal_loss(assert_same):
    assert_same(compiled(lambda: Focal(mlp(5, 2))), numbers(5), numbers(2, seed=2))


class Masked(Program):
    """Only marked rows count: `boolean_mask` of predictions."""

    def loss_of(self, inputs, y):
        x, marks = inputs
        kept = marks > 0
        errors = tf.boolean_mask(y - self.net(x), kept)
        return tf.reduce_sum(errors**2) / (tf.cast(tf.shape(errors)[0], "float32") + 1)


def test_masked_loss(assert_same):
    data = (numbers(5), numbers(seed=3)), numbers(1, seed=2)
    assert_same(compiled(lambda: Masked(mlp(5, 1))), *data)


class Hardest(Program):
    """The mean of the largest losses of the batch."""

    def loss_of(self, x, y):
        each = tf.reduce_mean(tf.square(y - self.net(x)), axis=1)
        largest, _ = tf.math.top_k(each, k=3)
        return tf.reduce_mean(largest)


def test_loss_of_the_hardest_rows(assert_same):
    data = numbers(5), numbers(1, seed=2)
    assert_same(compiled(lambda: Hardest(mlp(5, 1))), *data)


class Ranked(Program):
    """The rows sorted by their loss, as for a quantile."""

    def loss_of(self, x, y):
        each = tf.sort(tf.reduce_mean(tf.square(y - self.net(x)), axis=1))
        half = tf.shape(each)[0] // 2
        return tf.reduce_mean(each[:half])


def test_loss_of_the_easier_half(assert_same):
    data = numbers(5), numbers(1, seed=2)
    assert_same(compiled(lambda: Ranked(mlp(5, 1))), *data)


class MixedUp(Program):
    """Rows are mixed with those of a shuffled batch."""

    def __init__(self):
        super().__init__(mlp(5, 3))
        self.seeds = keras.random.SeedGenerator(4)

    def loss_of(self, x, labels):
        count = tf.shape(x)[0]
        order = keras.random.shuffle(tf.range(count), seed=self.seeds)
        share = keras.random.beta((count, 1), 0.4, 0.4, seed=self.seeds)
        y = tf.one_hot(labels, 3)
        x = share * x + (1 - share) * tf.gather(x, order)
        y = share * y + (1 - share) * tf.gather(y, order)
        return tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(y, self.net(x, training=True))
        )


def test_mixup_with_a_shuffled_batch(assert_same):
    assert_same(compiled(MixedUp), numbers(5), classes(3))


class Swapped(Program):
    """A rectangle of each image comes from the batch in reverse order."""

    def loss_of(self, images, y):
        other = tf.reverse(images, axis=[0])
        inside = tf.range(6) < 3
        mask = tf.cast(inside[:, None] & inside[None, :], tf.float32)[None, :, :, None]
        mixed = images * (1 - mask) + other * mask
        targets = 0.75 * y + 0.25 * y[::-1]
        return tf.reduce_mean(tf.square(targets - self.net(mixed)))


def test_cutmix_with_the_batch_reversed(assert_same):
    def make():
        return Swapped(
            keras.Sequential(
                [
                    keras.Input((6, 6, 1)),
                    layers.Conv2D(2, 3, activation="relu"),
                    layers.Flatten(),
                    layers.Dense(1),
                ]
            )
        )

    assert_same(compiled(make), numbers(6, 6, 1), numbers(1, seed=2))


class Transcription(Program):
    """CTC with different lengths for each row."""

    def loss_of(self, frames, targets):
        labels, lengths = targets
        logits = self.net(frames)
        given = tf.fill([tf.shape(frames)[0]], tf.shape(frames)[1])
        each = tf.nn.ctc_loss(
            labels, logits, lengths, given, logits_time_major=False, blank_index=0
        )
        return tf.reduce_mean(each)


def test_connectionist_temporal_classification(assert_same):
    def make():
        return Transcription(keras.Sequential([keras.Input((8, 3)), layers.Dense(5)]))

    data = numbers(8, 3), (1 + classes(4, 3), 1 + classes(3, seed=4))
    assert_same(compiled(make), *data)


def test_loss_ctc_of_keras(assert_same):
    def build():
        model = keras.Sequential(
            [keras.Input((8, 3)), layers.Dense(5, activation="softmax")]
        )
        model.compile("sgd", keras.losses.CTC())
        return model

    assert_same(build, numbers(8, 3), 1 + classes(4, 3))


class MaskedTokens(keras.Model):
    """Predicts tokens that were hidden at random; positions are learned."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = layers.Embedding(9, 6), layers.Embedding(5, 6)
        self.attention = layers.MultiHeadAttention(2, 3)
        self.norm, self.head = layers.LayerNormalization(), layers.Dense(9)
        self.seeds = keras.random.SeedGenerator(6)
        self.tracker = keras.metrics.Mean(name="loss")

    def call(self, tokens):
        x = self.tokens(tokens) + self.positions(tf.range(tf.shape(tokens)[1]))
        return self.head(self.norm(x + self.attention(x, x)))

    def train_step(self, tokens):
        hidden = keras.random.uniform(tf.shape(tokens), seed=self.seeds) < 0.4
        given = tf.where(hidden, tf.zeros_like(tokens), tokens)
        with tf.GradientTape() as tape:
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(tokens, self(given))
            weights = tf.cast(hidden, tf.float32)
            loss = tf.reduce_sum(each * weights) / (tf.reduce_sum(weights) + 1e-6)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.tracker.update_state(loss, sample_weight=tf.reduce_sum(weights))
        return {"loss": self.tracker.result()}


def test_masked_language_model(assert_same):
    def build():
        model = MaskedTokens()
        model.compile(keras.optimizers.SGD(0.1))
        model(np.zeros((1, 5), "int32"))
        return model

    assert_same(build, 1 + classes(8, 5))


class Quantile(Program):
    """Outliers are cut at a quantile of the batch; rows are weighted by frequency."""

    def loss_of(self, x, labels):
        each = keras.losses.sparse_categorical_crossentropy(
            labels, self.net(x), from_logits=True
        )
        counts = tf.math.bincount(labels, minlength=3, dtype=tf.float32)
        weights = tf.gather(1.0 / (counts + 1.0), labels)
        return tf.reduce_sum(each * weights) / tf.reduce_sum(weights)


def test_weights_by_frequency_in_the_batch(assert_same):
    assert_same(compiled(lambda: Quantile(mlp(5, 3))), numbers(5), classes(3))


class Kernel(Program):
    """The maximum mean discrepancy of two samples, bandwidth from the batch."""

    def loss_of(self, x, y):
        a, b = self.net(x), y
        both = tf.concat([a, b], axis=0)
        distances = tf.reduce_sum((both[:, None] - both[None]) ** 2, axis=-1)
        width = tf.stop_gradient(tf.reduce_mean(distances))
        kernel = tf.exp(-distances / width)
        n = tf.shape(a)[0]
        inner = tf.reduce_mean(kernel[:n, :n]) + tf.reduce_mean(kernel[n:, n:])
        return inner - 2 * tf.reduce_mean(kernel[:n, n:])


def test_discrepancy_of_two_samples(assert_same):
    data = numbers(5), numbers(2, seed=2)
    assert_same(compiled(lambda: Kernel(mlp(5, 2))), *data)


class WithoutLast(Program):
    """Successive rows of the batch, as of a time series."""

    def loss_of(self, x):
        z = self.net(x)
        return tf.reduce_mean((z[1:] - z[:-1]) ** 2) + tf.reduce_mean((z - 1.0) ** 2)


def test_differences_of_successive_rows(assert_same):
    assert_same(compiled(lambda: WithoutLast(mlp(5, 2))), numbers(5))


class Whitened(Program):
    """Features decorrelated by the covariance of the batch."""

    def loss_of(self, x, y):
        z = self.net(x)
        centered = z - tf.reduce_mean(z, axis=0)
        count = tf.cast(tf.shape(z)[0], tf.float32)
        covariance = tf.matmul(centered, centered, transpose_a=True) / count
        root = tf.linalg.cholesky(covariance + 0.1 * tf.eye(2))
        white = tf.transpose(tf.linalg.triangular_solve(root, tf.transpose(centered)))
        return tf.reduce_mean((white - y) ** 2)


def test_whitening_by_the_batch(assert_same):
    data = numbers(5), numbers(2, seed=2)
    assert_same(compiled(lambda: Whitened(mlp(5, 2))), *data)
