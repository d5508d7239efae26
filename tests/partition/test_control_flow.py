"""Branches, loops and lists of loops: what they carry may have any layout."""

import numpy as np
import pytest
import tensorflow as tf
from breadth import examples, pick
from hypothesis import settings
from rules import by_rows, check
from test_elementwise import batch
from test_shapes import both_ways, rows_at

few = settings(deadline=None, max_examples=examples(2, 3))


def whole(x):
    """A number that every replica has."""
    return tf.reduce_mean(x) + 0.5


BRANCHES = {
    "rows": (lambda x: 2 * x, lambda x: x + 1),
    "sums": (lambda x: tf.reduce_sum(x, 0), lambda x: tf.reduce_sum(x * x, 0)),
    "a sum or a mean": (lambda x: tf.reduce_sum(x, 0), lambda x: tf.reduce_mean(x, 0)),
    "a sum or a constant": (lambda x: tf.reduce_sum(x, 0), lambda x: tf.ones([3])),
    "rows or zeros": (lambda x: x, lambda x: tf.zeros_like(x)),
    "rows or a table": (lambda x: x, lambda x: tf.zeros([tf.shape(x)[0], 3])),
    "rows first or last": (lambda x: rows_at(x, 1), lambda x: tf.transpose(x * x)),
    "all rows": (lambda x: x @ tf.transpose(x), lambda x: x @ tf.transpose(2 * x)),
    "as many blocks of rows": (
        lambda x: tf.concat([x, 2 * x], 0),
        lambda x: tf.concat([x, x], 0),
    ),
    "a branch within": (
        lambda x: tf.cond(whole(x) > 0.9, lambda: tf.exp(x), lambda: tf.tanh(x)),
        lambda x: tf.cond(whole(x) > 0.1, lambda: x * x, lambda: x / whole(x)),
    ),
    "a loop within": (
        lambda x: rounds(lambda i, r: [tf.tanh(r) + x], x)[0],
        lambda x: tf.exp(x),
    ),
    "the number of rows": (
        lambda x: tf.cast(tf.shape(x)[0], tf.float32),
        lambda x: tf.reduce_max(x),
    ),
}


FEW_BRANCHES = [n for n in BRANCHES if n not in ("rows", "sums", "rows or zeros")]
MIXED = ("all rows", "as many blocks of rows", "a branch within", "a loop within")


@pytest.mark.parametrize("name", pick(FEW_BRANCHES, list(BRANCHES)))
@by_rows(few)
def test_branches(name, counts):
    one, other = BRANCHES[name]

    # By data, and by the number of rows; the last takes either branch, or both.
    conditions = [
        lambda x: tf.cond(whole(x) > 0.0, lambda: one(x), lambda: other(x)),
        lambda x: tf.cond(whole(x) < 0.0, lambda: one(x), lambda: other(x)),
        lambda x: tf.cond(tf.shape(x)[0] > 2, lambda: one(x), lambda: other(x)),
        lambda x: tf.switch_case(
            tf.shape(x)[0] % 3,
            [lambda: one(x), lambda: other(x), lambda: one(x) + other(x)],
        ),
    ]
    chosen = pick([conditions[1], conditions[3]], conditions)

    def taken(x):
        return [condition(x) for condition in chosen]

    # Three branches may keep different tensors in the same place for their gradients.
    falls_back = None if name in MIXED else False
    arrays = [batch(counts, 3)]
    check(both_ways(taken), arrays, counts, falls_back=falls_back, rtol=1e-4)


def rounds(body, *start, times=3):
    """The variables of a loop after three iterations."""
    _, *results = tf.while_loop(
        lambda i, *_: i < times,
        lambda i, *carried: (i + 1, *body(i, *carried)),
        [tf.constant(0), *start],
    )
    return results


LOOPS = {
    "rows": lambda x: rounds(lambda i, r: [tf.tanh(r) + x], x),
    "zeros that become rows": lambda x: rounds(
        lambda i, r: [r + x], tf.zeros([tf.shape(x)[0], 3])
    ),
    "a sum that stays one": lambda x: rounds(
        lambda i, s: [s + tf.reduce_sum(x, 0)], tf.zeros([3])
    ),
    "a sum that is needed whole": lambda x: rounds(
        lambda i, s: [tf.sqrt(1 + s) + tf.reduce_mean(x, 0)], tf.zeros([3])
    ),
    "rows by a sum": lambda x: rounds(
        lambda i, r, s: [r / tf.reduce_sum(r, 0), s + tf.reduce_max(r)], x, 0.0
    ),
    "two that change places": lambda x: rounds(
        lambda i, a, b: [b, a + 1], x, tf.ones([tf.shape(x)[0], 3])
    ),
    "columns that are normalised in turn": lambda x: rounds(
        lambda i, m: [m / tf.reduce_sum(m, 0) / tf.reduce_sum(m, 1, keepdims=True)], x
    ),
    "a matrix of all pairs": lambda x: rounds(
        lambda i, m: [tf.tanh(m) + x @ tf.transpose(x)], x @ tf.transpose(x)
    ),
    "within a loop": lambda x: rounds(
        lambda i, r: rounds(lambda j, q: [q * 0.5 + x], r, times=i + 1), x
    ),
    "a branch within": lambda x: rounds(
        lambda i, r: [tf.cond(i < 1, lambda: r + x, lambda: tf.reduce_mean(r, 0) + r)],
        x,
    ),
    "several branches within": lambda x: rounds(
        lambda i, r: [
            tf.switch_case(
                i, [lambda: tf.tanh(r), lambda: r * tf.reduce_sum(x, 0), lambda: x / r]
            )
        ],
        x,
    ),
    "until the data say so": lambda x: tf.while_loop(
        lambda r: tf.reduce_sum(r) < 40.0, lambda r: [r * 1.5 + x], [x]
    )[0],
}


@pytest.mark.parametrize("name", LOOPS)
@by_rows(few)
def test_loops_and_their_gradients(name, counts):
    function = both_ways(LOOPS[name])
    falls_back = None if name == "several branches within" else False
    check(function, [batch(counts, 3)], counts, falls_back=falls_back, rtol=1e-4)


def recurrent(x):
    """A recurrent network by hand, over time that is not known while tracing."""
    states = tf.TensorArray(tf.float32, tf.shape(x)[1], element_shape=[None, 2])

    def body(t, state, states):
        state = tf.tanh(x[:, t, :2] + 0.5 * state)
        return t + 1, state, states.write(t, state)

    _, last, states = tf.while_loop(
        lambda t, *_: t < tf.shape(x)[1],
        body,
        [0, tf.zeros([tf.shape(x)[0], 2]), states],
    )
    return [last, tf.transpose(states.stack(), [1, 0, 2])]


def unrolled(x):
    """Lists that are written in one go, read in any order, and gathered."""
    each = tf.TensorArray(tf.float32, 3).unstack(tf.transpose(x, [1, 0, 2]))
    sums = tf.TensorArray(tf.float32, 3, clear_after_read=False)
    for i in range(3):
        sums = sums.write(i, tf.reduce_sum(each.read(2 - i), 0))
    return [sums.stack(), sums.gather([2, 0]), sums.read(1)]


LISTS = {
    "recurrent": recurrent,
    "unrolled": unrolled,
    "scan over time": lambda x: tf.scan(
        lambda a, t: 0.5 * a + t,
        tf.transpose(x, [1, 0, 2]),
        tf.zeros([tf.shape(x)[0], 4]),
    ),
    "fold over time": lambda x: tf.foldl(
        lambda a, t: tf.tanh(a + t), tf.transpose(x, [1, 0, 2])
    ),
    "map over time": lambda x: tf.map_fn(
        lambda t: tf.reduce_max(t, -1) + tf.reduce_mean(t), tf.transpose(x, [1, 0, 2])
    ),
}


@pytest.mark.parametrize("name", LISTS)
@by_rows(few)
def test_lists_and_their_gradients(name, counts):
    function = both_ways(LISTS[name])
    # The size of a sum over a list of unknown length cannot be told from rows.
    falls_back = name == "recurrent"
    check(function, [batch(counts, 3, 4)], counts, falls_back=falls_back, rtol=1e-4)


def joined(x):
    """A list of rows that is joined: as many blocks of rows as it has elements."""
    each = tf.TensorArray(tf.float32, 3)
    for i in range(3):
        each = each.write(i, x * tf.cast(i + 1, tf.float32))
    return each.concat()


BY_ROWS = {
    "joined": joined,
    "map over rows": lambda x: tf.map_fn(lambda r: tf.reduce_max(r) * r, x),
    "scan over rows": lambda x: tf.scan(lambda a, r: 0.5 * a + r, x, tf.zeros([3])),
    "fold over rows": lambda x: tf.foldl(lambda a, r: tf.tanh(a + r), x, tf.zeros([3])),
    "rows one by one": lambda x: tf.while_loop(
        lambda i, s: i < tf.shape(x)[0],
        lambda i, s: (i + 1, s * 0.5 + x[i]),
        [0, tf.zeros([3])],
    )[1],
    "vectorized": lambda x: tf.vectorized_map(lambda r: tf.reduce_max(r) * r, x),
}


@pytest.mark.parametrize("name", BY_ROWS)
@by_rows(few)
def test_what_goes_through_rows_one_by_one_may_be_computed_in_full(name, counts):
    function = both_ways(BY_ROWS[name])
    check(function, [batch(counts, 3)], counts, falls_back=None, rtol=1e-4)


def test_python_loops_and_branches_of_autograph():
    @tf.function
    def stepped(x):
        total = tf.zeros([3])
        for i in tf.range(4):
            if tf.reduce_mean(x) > 0.5:
                total += tf.reduce_sum(x, 0)
            elif i > 2:
                break
            else:
                total += tf.reduce_max(x, 0)
        while tf.reduce_sum(total) > 1.0:
            total = total / 2.0
        return total

    for seed in range(3):
        x = batch([2, 0, 3], 3, seed=seed) + np.float32(0.1 * seed - 0.1)
        check(stepped, [x], [2, 0, 3])
