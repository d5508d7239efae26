"""Models that compare rows with one another, on 2 and 3 replicas."""

import keras
import numpy as np
import tensorflow as tf
from pieces import ROWS, Program, classes, compiled, mlp, numbers


class Contrastive(Program):
    """Each row has to find its other view among those of all rows."""

    def loss_of(self, x, other):
        a = tf.math.l2_normalize(self.net(x), axis=1)
        b = tf.math.l2_normalize(self.net(other), axis=1)
        logits = tf.matmul(a, b, transpose_b=True) / 0.1
        own = tf.range(tf.shape(logits)[0])
        losses = [
            keras.losses.sparse_categorical_crossentropy(own, part, from_logits=True)
            for part in (logits, tf.transpose(logits))
        ]
        return tf.reduce_mean(tf.concat(losses, 0))


class BothViews(Program):
    """The loss of SimCLR: all views in one matrix, without its diagonal."""

    def loss_of(self, x, other):
        z = tf.concat([self.net(x), self.net(other)], axis=0)
        z = tf.math.l2_normalize(z, axis=1)
        count = tf.shape(x)[0]
        logits = tf.matmul(z, z, transpose_b=True) / 0.5
        logits -= 1e9 * tf.eye(2 * count)
        labels = tf.concat([tf.range(count, 2 * count), tf.range(count)], axis=0)
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        )


def _two_views(features=5):
    x = numbers(features)
    return x, x + 0.1 * numbers(features, seed=3)


def test_pairs_over_the_batch(assert_same):
    assert_same(compiled(lambda: Contrastive(mlp(5, 3))), *_two_views())


def test_pairs_of_both_views(assert_same):
    assert_same(compiled(lambda: BothViews(mlp(5, 3))), *_two_views())


class BarlowTwins(Program):
    """The correlation of features, over the batch."""

    def loss_of(self, x, other):
        a, b = (self.standardized(self.net(part)) for part in (x, other))
        count = tf.cast(tf.shape(a)[0], a.dtype)
        correlation = tf.matmul(a, b, transpose_a=True) / count
        off = correlation - tf.linalg.diag(tf.linalg.diag_part(correlation))
        on = tf.reduce_sum((tf.linalg.diag_part(correlation) - 1) ** 2)
        return on + 0.01 * tf.reduce_sum(off**2)

    def standardized(self, z):
        mean = tf.reduce_mean(z, axis=0)
        return (z - mean) / (tf.math.reduce_std(z, axis=0) + 1e-3)


def test_correlation_matrix_over_the_batch(assert_same):
    build = compiled(lambda: BarlowTwins(mlp(5, 3)), rate=0.01)
    assert_same(build, *_two_views())


class Queue(keras.Model):
    """Keys of earlier batches are negatives: a queue, and a slow encoder of keys."""

    def __init__(self):
        super().__init__()
        self.net, self.slow = mlp(5, 3), mlp(5, 3)
        self.slow.set_weights(self.net.get_weights())
        self.slow.trainable = False
        self.queue = self.add_weight(
            shape=(12, 3), initializer="normal", trainable=False, name="queue"
        )

    def train_step(self, data):
        x, other = data
        keys = tf.math.l2_normalize(self.slow(other), axis=1)
        with tf.GradientTape() as tape:
            queries = tf.math.l2_normalize(self.net(x), axis=1)
            own = tf.reduce_sum(queries * keys, axis=1, keepdims=True)
            others = tf.matmul(queries, self.queue, transpose_b=True)
            logits = tf.concat([own, others], axis=1) / 0.2
            labels = tf.zeros(tf.shape(x)[0], tf.int32)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            )
        weights = self.net.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        for slow, fast in zip(self.slow.variables, self.net.variables, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        self.queue.assign(tf.concat([keys, self.queue], axis=0)[:12])
        return {"raw": loss}


def test_queue_of_keys(assert_same):
    assert_same(compiled(Queue), *_two_views())


class ActorWithTarget(keras.Model):
    """Learns values against those of a target network."""

    def __init__(self, hard: bool):
        super().__init__()
        self.hard = hard
        self.net, self.target = mlp(5, 3), mlp(5, 3)
        self.target.trainable = False
        self.steps = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="steps"
        )

    def train_step(self, data):
        (state, action, reward), following = data
        best = tf.reduce_max(self.target(following), axis=1)
        wanted = reward + 0.9 * best
        with tf.GradientTape() as tape:
            chosen = tf.gather(self.net(state), action, batch_dims=1)
            loss = tf.reduce_mean(tf.square(wanted - chosen))
        weights = self.net.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        self.steps.assign_add(1)
        self.follow()
        return {"raw": loss}

    def follow(self):
        pairs = list(zip(self.target.variables, self.net.variables, strict=True))
        if not self.hard:
            for slow, fast in pairs:
                slow.assign(0.95 * slow + 0.05 * fast)
            return

        def copy():
            for slow, fast in pairs:
                slow.assign(fast)
            return True

        tf.cond(tf.equal(self.steps % 2, 0), copy, lambda: False)


def _transitions():
    return (numbers(5), classes(3), numbers(seed=4)), numbers(5, seed=5)


def test_target_network_that_follows(assert_same):
    assert_same(compiled(lambda: ActorWithTarget(False)), *_transitions())


def test_target_network_that_is_copied(assert_same):
    assert_same(compiled(lambda: ActorWithTarget(True)), *_transitions())


class Triplets(Program):
    """The hardest positive and negative of each row, among all rows."""

    def loss_of(self, x, labels):
        z = self.net(x)
        squares = tf.reduce_sum(z**2, axis=1)
        distances = squares[:, None] - 2 * tf.matmul(z, z, transpose_b=True) + squares
        distances = tf.sqrt(tf.maximum(distances, 0.0) + 1e-6)
        same = tf.equal(labels[:, None], labels[None, :])
        own = tf.eye(tf.shape(z)[0]) > 0
        positives = tf.where(same & ~own, distances, tf.zeros_like(distances))
        negatives = tf.where(same, 1e3 * tf.ones_like(distances), distances)
        hardest = tf.reduce_max(positives, axis=1) - tf.reduce_min(negatives, axis=1)
        return tf.reduce_mean(tf.nn.relu(hardest + 1.0))


def test_hardest_triplets(assert_same):
    assert_same(compiled(lambda: Triplets(mlp(5, 3))), numbers(5), classes(3))


class Centers(Program):
    """Centers of classes are moved to the mean of their rows of the batch."""

    def __init__(self):
        super().__init__(mlp(5, 3))
        self.centers = self.add_weight(
            shape=(4, 3), initializer="zeros", trainable=False, name="centers"
        )

    def loss_of(self, x, labels):
        z = self.net(x)
        own = tf.gather(tf.convert_to_tensor(self.centers), labels)
        sums = tf.math.unsorted_segment_sum(z, labels, 4)
        counts = tf.math.unsorted_segment_sum(tf.ones_like(labels), labels, 4)
        means = tf.math.divide_no_nan(sums, tf.cast(counts, tf.float32)[:, None])
        self.centers.assign(0.5 * self.centers + 0.5 * means)
        return tf.reduce_mean(tf.reduce_sum((z - own) ** 2, axis=1))


def test_centers_of_classes(assert_same):
    assert_same(compiled(Centers), numbers(5), classes(4))


def test_rows_are_no_multiple_of_the_replicas():
    assert {ROWS % 8 % n for n in (2, 3)} == {1}
    assert np.shape(numbers(5)) == (ROWS, 5)
