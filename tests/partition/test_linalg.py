"""Operations on the last dimensions, for each of the rows; diagonals; counts."""

import numpy as np
import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import by_rows, check, splits
from test_elementwise import batch
from test_shapes import both_ways, rows_at

few = settings(deadline=None, max_examples=examples(2, 4))


def positive(counts):
    """Positive definite matrices, far from singular."""
    x = batch(counts, 3, 3)
    return (x @ x.transpose(0, 2, 1) + 2 * np.eye(3)).astype("float32")


DECOMPOSITIONS = {
    "cholesky": tf.linalg.cholesky,
    "inverse": tf.linalg.inv,
    "determinant": tf.linalg.det,
    "logarithm of the determinant": lambda x: tf.linalg.slogdet(x)[1],
    "solve": lambda x: tf.linalg.solve(x, x[..., :1]),
    "triangular solve": lambda x: tf.linalg.triangular_solve(x, x[..., :1]),
    "cholesky solve": lambda x: tf.linalg.cholesky_solve(x, x[..., :1]),
    "least squares": lambda x: tf.linalg.lstsq(x, x[..., :1]),
    "eigenvalues": lambda x: tf.linalg.eigvalsh(x),
    "orthogonal": lambda x: tf.abs(tf.linalg.qr(x)[1]),
    "singular values": lambda x: tf.linalg.svd(x, compute_uv=False),
    "diagonal": lambda x: tf.linalg.diag_part(x),
    "diagonals": lambda x: tf.linalg.diag_part(x, k=(-1, 1)),
    "upper diagonal": lambda x: tf.linalg.diag_part(x, k=1),
    "diagonal matrix": lambda x: tf.linalg.diag(x),
    "trace": tf.linalg.trace,
    "band": lambda x: [tf.linalg.band_part(x, 1, 0), tf.linalg.band_part(x, -1, 0)],
    "cross": lambda x: [tf.linalg.cross(x, x[:, ::-1])],
    "transform": lambda x: tf.abs(tf.signal.fft(tf.complex(x, x))),
    "real transform": lambda x: tf.abs(tf.signal.rfft(x)),
    "inverse transform": lambda x: tf.signal.irfft(tf.complex(x, x), [4]),
    "transform of two": lambda x: tf.abs(tf.signal.ifft2d(tf.complex(x, x))),
}


@pytest.mark.parametrize("kind", DECOMPOSITIONS)
@by_rows(few)
def test_matrices_of_rows(kind, counts):
    function = both_ways(DECOMPOSITIONS[kind])
    check(function, [positive(counts)], counts, rtol=1e-3, atol=1e-3)


@by_rows(few)
def test_without_gradients(counts):
    def function(x):
        lu, order = tf.linalg.lu(x)
        return [
            *(lu, order, tf.linalg.expm(x), tf.sort(x, -1), tf.argsort(x, -1)),
            *(tf.raw_ops.NthElement(input=x, n=1, reverse=False),),
            *(tf.searchsorted(tf.sort(x, -1), x), tf.linalg.logdet(x)),
            tf.linalg.tridiagonal_solve(x, x[..., 0], "compact"),
        ]

    check(function, [positive(counts)], counts, rtol=1e-3, atol=1e-3)


@by_rows(few)
def test_matrices_of_rows_and_of_sums(counts):
    def function(x):
        total = tf.reduce_mean(x, 0)
        return [
            tf.linalg.cholesky(total),
            tf.linalg.triangular_solve(total, x),
            tf.linalg.diag(tf.linalg.diag_part(total)),
            tf.linalg.set_diag(x, tf.zeros([tf.shape(x)[0], 3])),
            tf.linalg.band_part(total, 0, -1),
        ]

    check(function, [positive(counts)], counts, rtol=1e-3, atol=1e-3)


PAIRS = {
    "identity": lambda p: p * tf.eye(tf.shape(p)[0]),
    "diagonal": tf.linalg.diag_part,
    "diagonal of the transpose": lambda p: tf.linalg.diag_part(tf.transpose(p)),
    "trace": tf.linalg.trace,
    "lower": lambda p: tf.linalg.band_part(p, -1, 0),
    "upper": lambda p: tf.linalg.band_part(p, 0, -1),
    "band of the transpose": lambda p: tf.linalg.band_part(tf.transpose(p), 1, 0),
    "diagonal matrix": lambda p: tf.linalg.diag(tf.reduce_sum(p, 1)),
    "contrastive": lambda p: (
        tf.nn.softmax_cross_entropy_with_logits(tf.eye(tf.shape(p)[0]), p)
        + tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(tf.shape(p)[0]), p)
    ),
    "both ways": lambda p: tf.nn.log_softmax(p, 0) + tf.nn.log_softmax(p, 1),
}


@by_rows(few)
def test_pairs_of_two_views(counts):
    """Every row has two views: the mask of the diagonal is that of one device."""

    def loss(x):
        rows = tf.shape(x)[0]
        views = tf.concat([x, 1.1 * x], 0)
        scores = tf.matmul(views, views, transpose_b=True)
        own = tf.eye(2 * rows)
        labels = tf.concat([rows + tf.range(rows), tf.range(rows)], 0)
        return (
            scores * own,
            tf.where(tf.cast(own, tf.bool), -1.0, scores),
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores - own * 1e9),
            tf.linalg.diag(tf.range(2 * rows) % 3),
        )

    def results(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = loss(x)
            total = tf.reduce_sum(values[0] ** 2) + tf.reduce_sum(values[2])
        return [*values, tape.gradient(total, x)]

    check(results, [batch(counts, 3)], counts, rtol=1e-4, atol=1e-4)


@by_rows(few)
def test_diagonals_that_are_set(counts):
    """In their gradient, a size comes from a branch."""

    def function(x):
        pairs = tf.matmul(x[:, 0], x[:, 1], transpose_b=True)
        return [
            tf.linalg.set_diag(x, x[..., 0]),
            tf.linalg.set_diag(pairs, tf.zeros(tf.shape(x)[:1])),
            tf.linalg.set_diag(pairs, x[:, 0, 0]),
        ]

    check(function, [batch(counts, 3, 3)], counts, rtol=1e-4)
    check(both_ways(function), [batch(counts, 3, 3)], counts, falls_back=None)


@pytest.mark.parametrize("kind", PAIRS)
@few
@given(splits(4))
def test_pairs_of_rows(kind, counts):
    function = both_ways(lambda x: PAIRS[kind](tf.matmul(x, x[:, ::-1], False, True)))
    check(function, [batch(counts, 3)], counts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("counts", [[1, 0], [2, 1]])
def test_pairs_of_a_fixed_number_of_rows(kind, counts):
    function = both_ways(lambda x: PAIRS[kind](tf.matmul(x, x[:, ::-1], False, True)))
    x, rows = batch(counts, 3), sum(counts)
    check(function, [x], counts, rtol=1e-3, atol=1e-3, rows=rows, falls_back=None)


@by_rows(few)
def test_rows_among_the_last_dimensions_fall_back(counts):
    def function(x):
        moved = rows_at(x, 1)
        return [
            tf.abs(tf.signal.fft(tf.complex(rows_at(x, 2), 0.0))),
            tf.linalg.diag_part(moved),
            tf.linalg.diag_part(moved, k=1),
            tf.math.top_k(rows_at(x, 2), 1)[0],
        ]

    check(function, [batch(counts, 3, 3)], counts, falls_back=True, rtol=1e-4)


@given(splits(), st.booleans())
@few
def test_counts(counts, weighted):
    random = np.random.default_rng(0)
    numbers = random.integers(0, 5, (sum(counts), 3)).astype("int32")
    weights = batch(counts, 3)

    def function(x, w):
        flat = tf.reshape(x, [-1])
        own = tf.reshape(w, [-1]) if weighted else None
        return [
            tf.math.bincount(flat, own, minlength=6, maxlength=6),
            tf.math.bincount(x, w if weighted else None, 6, 6, axis=-1),
            tf.math.bincount(flat, own),
            tf.histogram_fixed_width(w, [0.0, 1.0], 4),
            tf.math.confusion_matrix(x[:, 0], x[:, 1], 5),
        ]

    check(function, [numbers, weights], counts, falls_back=None)


def test_counts_are_sums():
    numbers = np.array([[0], [3], [3]], "int32")
    function = lambda x: tf.math.bincount(x[:, 0], minlength=4, maxlength=4)  # noqa: E731
    outcome = check(function, [numbers], [2, 1])
    assert outcome.layouts == ["partial"]
