"""Products: rows that stay, rows that are contracted, and batches of matrices."""

import math

import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import by_rows, check, splits
from test_elementwise import batch
from test_shapes import both_ways, rows_at

few = settings(deadline=None, max_examples=examples(2, 5))


def weights(*shape):
    return tf.reshape(tf.cos(tf.range(float(math.prod(shape)))), shape)


@given(splits(), st.booleans(), st.booleans())
@few
def test_matmul(counts, by_columns, transposed):
    def function(x):
        a = tf.transpose(x) if by_columns else x  # [4, rows] or [rows, 4]
        w = weights(2, 4) if transposed else weights(4, 2)
        total = tf.matmul(x, x, transpose_a=True)  # A sum.
        return [
            tf.matmul(a, w, transpose_a=by_columns, transpose_b=transposed),
            tf.matmul(w, a, not transposed, not by_columns),
            tf.matmul(a, a, transpose_b=True),
            tf.matmul(a, a, transpose_a=True),
            tf.matmul(total, w, transpose_b=transposed),
            tf.matmul(x, total),
            tf.matmul(total, total),
        ]

    check(both_ways(function), [batch(counts, 4)], counts, rtol=1e-4, atol=1e-4)


@by_rows(few)
def test_batches_of_matrices(counts):
    def function(x):
        moved, last = rows_at(x, 1), rows_at(x, 2)  # [3, rows, 4], [3, 4, rows]
        return [
            tf.matmul(x, x, transpose_b=True),
            tf.matmul(x, weights(4, 2)),
            tf.matmul(x, weights(1, 4, 2)),
            tf.matmul(weights(2, 3), x),
            tf.matmul(x[:, None], weights(5, 4, 2)),
            tf.matmul(moved, weights(3, 4, 2)),
            tf.matmul(moved, weights(4, 2)),
            tf.matmul(moved, moved, transpose_a=True),
            tf.matmul(moved, moved, transpose_b=True),
            tf.matmul(last, moved),
            tf.matmul(x[:, None], x[None], transpose_b=True),
            tf.matmul(x[:, :1], x, transpose_b=True),
            tf.matmul(tf.reduce_sum(x, 0), x, transpose_b=True),
            tf.matmul(tf.reduce_sum(x, 0, keepdims=True), weights(2, 4, 2)),
        ]

    check(both_ways(function), [batch(counts, 3, 4)], counts, rtol=1e-4, atol=1e-4)


EQUATIONS = [
    *("btf->btf", "btf->tfb", "btf->b", "btf->", "btf->tf", "btf->f", "b...->...b"),
    *("btf,fg->btg", "btf,tfg->bg", "btf,bsf->bts", "btf,csf->btcs", "btf,ctf->bc"),
    *("btf,btg->fg", "btf,btg->tfg", "btf,btf->", "btf,g->btfg", "...f,fg->...g"),
    *("...tf,...sf->...ts", "b...,b...->...", "b...,c...->bc...", "btf,b->tf"),
]


@pytest.mark.parametrize("equation", EQUATIONS)
@few
@given(splits(4))
def test_einsum(equation, counts):
    sizes = {"t": 3, "f": 4, "g": 2, "s": 3}

    def factor(x, term):
        if term[0] in "bc." and len(term) > 1:
            named = term.replace("...", "btf"[: 3 - len(term.replace("...", ""))])
            return x if len(named) == 3 or "." in term else x[:, 0, 0]
        if term == "b":
            return x[:, 0, 0]
        return weights(*(sizes[c] for c in term))

    def function(x):
        left = equation.split("->")[0].split(",")
        return tf.einsum(equation, *(factor(x, term) for term in left))

    check(both_ways(function), [batch(counts, 3, 4)], counts, rtol=1e-4, atol=1e-4)


@by_rows(few)
def test_einsum_of_diagonals_sums_and_ones(counts):
    def function(x):
        square = tf.matmul(x, x, transpose_b=True)  # [rows, 3, 3]
        return [
            tf.einsum("bii->bi", square),
            tf.einsum("bii->b", square),
            tf.einsum("bij,b...->ij", square, tf.ones_like(x[:, 0, 0])),
            tf.einsum("ij,bjk->bik", tf.reduce_sum(square, 0), square),
            tf.einsum("ij,jk->ik", tf.reduce_sum(square, 0), weights(3, 2)),
            tf.einsum("...ij,...jk->...ik", square[:, None], weights(2, 3, 3)),
            tf.einsum("...ij,...jk->...ik", square, weights(1, 3, 3)),
        ]

    check(both_ways(function), [batch(counts, 3, 4)], counts, rtol=1e-4, atol=1e-4)


@by_rows(few)
def test_a_diagonal_of_pairs(counts):
    def function(x):
        pairs = tf.matmul(x, x, transpose_b=True)
        return [tf.einsum("bb->b", pairs), tf.linalg.trace(pairs)]

    check(function, [batch(counts, 3)], counts, falls_back=None)


def test_layouts_of_products():
    x = batch([2, 1], 4)
    product = lambda x: [tf.matmul(x, weights(4, 2)), tf.matmul(x, x, True)]  # noqa: E731
    outcome = check(product, [x], [2, 1])
    assert outcome.layouts == ["rows", "partial"]
    assert outcome.exchanges == 0
    outcome = check(lambda x: tf.matmul(x, x, transpose_b=True), [x], [2, 1])
    assert outcome.layouts == ["rows"]


@pytest.mark.parametrize("counts", [[1, 0], [0, 1, 0], [2, 1], [3, 1]])
def test_products_with_a_fixed_number_of_rows(counts):
    """Three or four rows are as many as there are features; one row broadcasts."""
    rows = sum(counts)

    def function(x):
        return [
            tf.matmul(x, weights(4, 2)),
            tf.matmul(x, weights(1, 4, 2)),
            tf.matmul(x[:, None], x[None], transpose_b=True),
            tf.matmul(rows_at(x, 1), x, transpose_b=True),
            tf.matmul(weights(rows, 2, 3), x),
            tf.einsum("btf,btg->fg", x, x),
        ]

    if rows not in (1, 3):
        function = lambda x: [tf.matmul(x, weights(4, 4)), tf.matmul(x, x, True)]  # noqa
    check(
        both_ways(function),
        [batch(counts, 3, 4)],
        counts,
        rows=rows,
        falls_back=None,
        rtol=1e-4,
    )


@by_rows(few)
def test_integers_and_complex_numbers(counts):
    def function(x):
        numbers, z = tf.cast(x * 9, tf.int32), tf.complex(x, 1 - x)
        return [
            tf.matmul(numbers, numbers, transpose_a=True) // 2,
            tf.matmul(z, z, adjoint_a=True),
            tf.matmul(z[:, None], z[:, None], adjoint_b=True),
            tf.linalg.matvec(x, tf.ones([4])),
            tf.tensordot(x, weights(4, 2, 3), 1),
            tf.tensordot(x, x, [[0], [0]]),
        ]

    check(function, [batch(counts, 4)], counts, rtol=1e-4)
