"""Strings, ragged and sparse inputs, loops, Python in a step, on 2 and 3 replicas."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from pieces import ROWS, Program, classes, compiled, mlp, numbers

import distfit
from distfit.training.inputs import without_autotune

WORDS = np.array(["red", "green", "blue", "black"])


class Words(Program):
    """Looks strings up in a vocabulary."""

    def __init__(self):
        super().__init__(mlp(3, 1))
        self.lookup = layers.StringLookup(vocabulary=["red", "green", "blue"])
        self.embedding = layers.Embedding(4, 3)

    def loss_of(self, words, y):
        z = self.net(self.embedding(self.lookup(words)))
        return tf.reduce_mean(tf.square(y - z))


def test_lookup_of_strings(assert_same):
    words = WORDS[classes(4)]
    data = tf.data.Dataset.from_tensor_slices((words, numbers(1))).batch(8)
    assert_same(compiled(Words), data)


class RaggedWords(Program):
    """Sentences of unequal length, averaged."""

    def __init__(self):
        super().__init__(mlp(3, 1))
        self.table = self.add_weight(shape=(6, 3), initializer="normal", name="table")

    def loss_of(self, words, y):
        table = tf.convert_to_tensor(self.table)
        embedded = tf.gather(table, words.values)
        owners, count = words.value_rowids(), words.nrows()
        sums = tf.math.unsorted_segment_sum(embedded, owners, count)
        lengths = tf.cast(words.row_lengths(), tf.float32)[:, None]
        return tf.reduce_mean(tf.square(y - self.net(sums / (lengths + 1.0))))


def _sentences():
    lengths = classes(5, seed=6)
    flat = np.random.default_rng(8).integers(0, 6, lengths.sum())
    return tf.RaggedTensor.from_row_lengths(flat.astype("int32"), lengths)


def test_ragged_inputs(assert_same):
    pairs = (_sentences(), numbers(1))
    data = tf.data.Dataset.from_tensor_slices(pairs).batch(8)
    assert_same(compiled(RaggedWords), data)


class RaggedReduced(RaggedWords):
    """The same by `tf.reduce_mean` of a ragged tensor, and padded."""

    def loss_of(self, words, y):
        embedded = tf.ragged.map_flat_values(
            lambda ids: tf.gather(tf.convert_to_tensor(self.table), ids), words
        )
        sums = tf.reduce_sum(embedded, axis=1)
        padded = embedded.to_tensor(shape=(None, 5, 3))
        return tf.reduce_mean(tf.square(y - self.net(sums) - self.net(padded[:, 0])))


def test_ragged_inputs_reduced_and_padded(assert_same):
    pairs = (_sentences(), numbers(1))
    data = tf.data.Dataset.from_tensor_slices(pairs).batch(8)
    assert_same(compiled(RaggedReduced), data)


class SparseRows(Program):
    """Sparse features times a table."""

    def __init__(self):
        super().__init__(mlp(3, 1))
        self.table = self.add_weight(shape=(7, 3), initializer="normal", name="table")

    def loss_of(self, sparse, y):
        table = tf.convert_to_tensor(self.table)
        z = tf.sparse.sparse_dense_matmul(sparse, table)
        return tf.reduce_mean(tf.square(y - self.net(z)))


def test_sparse_inputs(assert_same):
    dense = numbers(7) * (numbers(7, seed=4) > 0.5)
    pairs = (tf.sparse.from_dense(dense), numbers(1))
    data = tf.data.Dataset.from_tensor_slices(pairs).batch(8)
    assert_same(compiled(SparseRows), without_autotune(data))


class Mapped(Program):
    """A function of a single row, mapped over rows."""

    def loss_of(self, x, y):
        def of_row(pair):
            row, wanted = pair
            return tf.reduce_sum((self.net(row[None])[0] - wanted) ** 2)

        each = tf.map_fn(of_row, (x, y), fn_output_signature=tf.float32)
        return tf.reduce_mean(each)


def test_map_over_rows(assert_same):
    data = numbers(5), numbers(1, seed=2)
    assert_same(compiled(lambda: Mapped(mlp(5, 1))), *data)


class Vectorized(Mapped):
    """The same, vectorized."""

    def loss_of(self, x, y):
        each = tf.vectorized_map(
            lambda p: tf.reduce_sum((self.net(p[0][None])[0] - p[1]) ** 2), (x, y)
        )
        return tf.reduce_mean(each)


def test_vectorized_map_over_rows(assert_same):
    data = numbers(5), numbers(1, seed=2)
    assert_same(compiled(lambda: Vectorized(mlp(5, 1))), *data)


class Sinkhorn(Program):
    """Normalizes a matrix of pairs over rows and columns in turn."""

    def loss_of(self, x, y):
        a, b = self.net(x), self.net(y)
        cost = tf.reduce_sum((a[:, None] - b[None]) ** 2, axis=-1)

        def normalized(i, logs):
            logs = logs - tf.reduce_logsumexp(logs, axis=1, keepdims=True)
            return i + 1, logs - tf.reduce_logsumexp(logs, axis=0, keepdims=True)

        _, logs = tf.while_loop(lambda i, _: i < 4, normalized, (0, -cost))
        return tf.reduce_sum(tf.exp(logs) * cost)


def test_loop_over_a_matrix_of_pairs(assert_same):
    data = numbers(5), numbers(5, seed=2)
    assert_same(compiled(lambda: Sinkhorn(mlp(5, 2)), rate=0.01), *data)


class Power(Program):
    """The largest eigenvalue of the batch's covariance, by power iteration."""

    def loss_of(self, x):
        z = self.net(x)
        matrix = tf.matmul(z, z, transpose_a=True)

        def turn(vector, change):
            new = tf.linalg.matvec(matrix, vector)
            new = new / tf.norm(new)
            return new, tf.reduce_max(tf.abs(new - vector))

        vector, _ = tf.while_loop(
            lambda _, change: change > 1e-3,
            turn,
            (tf.ones(3) / 2.0, tf.constant(1.0)),
            maximum_iterations=20,
        )
        return tf.tensordot(vector, tf.linalg.matvec(matrix, vector), 1)


def test_loop_that_ends_when_it_is_done(assert_same):
    assert_same(compiled(lambda: Power(mlp(5, 3)), rate=0.001), numbers(5))


class Pythonic(Program):
    """Targets come from Python; it sees the whole batch, once."""

    def __init__(self):
        super().__init__(mlp(5, 1))
        self.seen = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="seen"
        )

    def loss_of(self, x, y):
        ranks = tf.py_function(self.ranks, [y[:, 0]], tf.float32)
        ranks.set_shape([None])
        counted = tf.numpy_function(lambda a: np.float32(len(a)), [x], tf.float32)
        self.seen.assign_add(tf.reshape(counted, ()))
        return tf.reduce_mean(tf.square(ranks[:, None] - self.net(x)))

    @staticmethod
    def ranks(values):
        return np.argsort(np.argsort(values.numpy())).astype("float32")


def test_python_in_a_step(assert_same):
    assert_same(compiled(Pythonic), numbers(5), numbers(1, seed=2))


class WithMaximum(Program):
    """A `test_step` of its own, with the largest error of all rows."""

    def __init__(self):
        super().__init__(mlp(5, 1))
        self.largest = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="largest"
        )
        self.mean = keras.metrics.Mean(name="mean")

    def loss_of(self, x, y):
        return tf.reduce_mean(tf.square(y - self.net(x)))

    def test_step(self, data):
        x, y = data
        errors = tf.abs(y - self.net(x))
        self.largest.assign(tf.maximum(self.largest, tf.reduce_max(errors)))
        self.mean.update_state(errors)
        return {
            "mean": self.mean.result(),
            "raw_of_batch": tf.reduce_max(errors),
            "raw_so_far": tf.convert_to_tensor(self.largest),
        }


def test_own_evaluation_with_a_maximum(assert_same, make_strategy):
    x, y = numbers(5), numbers(1, seed=2)
    build = compiled(WithMaximum)
    assert_same(build, x, y, validation_data=(x + 1, y))
    keras.utils.set_random_seed(7)
    one = build().evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
    for replicas in (2, 3):
        keras.utils.set_random_seed(7)
        with make_strategy(replicas).scope():
            model = build()
        logs = distfit.evaluate(model, x, y, batch_size=8, verbose=0, return_dict=True)
        comparing.assert_close_logs(one, logs, 1e-5)


class Chosen(Program):
    """A branch that depends on the batch and processes rows."""

    def loss_of(self, x, y):
        z = self.net(x)
        errors = tf.cond(
            tf.reduce_mean(y) > 0.0,
            lambda: tf.square(y - z),
            lambda: tf.abs(y - z) * tf.reduce_max(tf.abs(x)),
        )
        return tf.reduce_mean(errors)


def test_branch_by_a_mean_of_the_batch(assert_same):
    data = numbers(5), numbers(1, seed=2)
    assert_same(compiled(lambda: Chosen(mlp(5, 1))), *data)


class Written(Program):
    """Rows are written to a `TensorArray` in a loop, and read back."""

    def loss_of(self, x, y):
        count = tf.shape(x)[0]
        written = tf.TensorArray(tf.float32, size=count)

        def body(i, array):
            return i + 1, array.write(i, tf.reduce_sum(self.net(x[i : i + 1]) ** 2))

        _, written = tf.while_loop(lambda i, _: i < count, body, (0, written))
        return tf.reduce_mean(written.stack()) - tf.reduce_mean(self.net(x) * y)


def test_array_written_by_rows(assert_same):
    data = numbers(5), numbers(1, seed=2)
    assert_same(compiled(lambda: Written(mlp(5, 1))), *data)


class Scanned(Program):
    """A recurrent network by hand, over time."""

    def __init__(self):
        super().__init__(mlp(4, 1))
        self.kernel = self.add_weight(shape=(7, 4), initializer="normal", name="k")

    def loss_of(self, x, y):
        kernel = tf.convert_to_tensor(self.kernel)

        def step(state, now):
            return tf.tanh(tf.matmul(tf.concat([state, now], axis=1), kernel))

        start = tf.zeros([tf.shape(x)[0], 4])
        states = tf.scan(step, tf.transpose(x, [1, 0, 2]), start)
        return tf.reduce_mean(tf.square(y - self.net(states[-1])))


def test_scan_over_time(assert_same):
    assert_same(compiled(Scanned), numbers(6, 3), numbers(1, seed=2))


@pytest.mark.parametrize("rows", [1, 2])
def test_last_batch_of_fewer_rows_than_replicas(assert_same, rows):
    x, y = numbers(5)[: 8 + rows], numbers(1, seed=2)[: 8 + rows]
    assert_same(compiled(lambda: Chosen(mlp(5, 1))), x, y)
    assert rows < ROWS
