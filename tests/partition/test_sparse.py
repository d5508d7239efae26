"""Gathers, scatters, segments and tables: what picks elements or puts them in place."""

import numpy as np
import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import by_rows, check, splits
from test_elementwise import batch
from test_shapes import both_ways, rows_at, weighted

few = settings(deadline=None, max_examples=examples(2, 4))

TABLE = np.random.default_rng(1).normal(size=(5, 3, 4)).astype("float32")


def places(counts, *shape, below=5, seed=2):
    """Places in a table, for the rows of all replicas."""
    random = np.random.default_rng(seed)
    return random.integers(0, below, (sum(counts), *shape)).astype("int32")


GATHERS = {
    "of a table": lambda x, ids: tf.gather(TABLE, ids),
    "along another axis": lambda x, ids: tf.gather(TABLE[:, :, None], ids % 3, axis=1),
    "of a sum": lambda x, ids: tf.gather(tf.reduce_sum(x, 0), ids % 3),
    "of a sum, the same": lambda x, ids: tf.gather(tf.reduce_sum(x, 0), [2, 0, 2]),
    "of features": lambda x, ids: tf.gather(x, [[1, 0], [2, 2]], axis=1),
    "of the last axis": lambda x, ids: tf.gather(rows_at(x, 1), [3, 1], axis=-1),
    "in each row": lambda x, ids: tf.gather(x, ids % 3, axis=1, batch_dims=1),
    "in each row of a table": lambda x, ids: tf.gather(
        tf.tile(x[:, :1], [1, 5, 1]), ids, batch_dims=1, axis=1
    ),
    "elements of a table": lambda x, ids: tf.gather_nd(TABLE, (ids % 3)[:, :2]),
    "elements of features": lambda x, ids: tf.gather_nd(
        tf.transpose(x, [1, 2, 0]), [[0, 1], [2, 3]]
    ),
}


@pytest.mark.parametrize("name", GATHERS)
@by_rows(few)
def test_gathers_and_their_gradients(name, counts):
    ids = places(counts, 2)
    function = both_ways(lambda x: GATHERS[name](x, tf.constant(ids)))
    check(function, [batch(counts, 3, 4)], counts, falls_back=None)
    check(GATHERS[name], [batch(counts, 3, 4), ids], counts)


FROM_ALL_ROWS = {
    "rows": lambda x, ids: tf.gather(x, ids),
    "rows, a few": lambda x, ids: tf.gather(x, ids[:1]),
    "rows in another axis": lambda x, ids: tf.gather(rows_at(x, 1), ids, axis=1),
    "elements of rows": lambda x, ids: tf.gather_nd(x, tf.stack([ids, ids % 3], 1)),
}


@pytest.mark.parametrize("name", FROM_ALL_ROWS)
@by_rows(few)
def test_rows_that_are_picked_from_all_rows(name, counts):
    """As a queue, a shuffle or hard negatives pick them."""
    ids = places(counts, below=sum(counts))

    def function(x, ids):
        with tf.GradientTape() as tape:
            tape.watch(x)
            picked = FROM_ALL_ROWS[name](x, ids)
            total = tf.reduce_sum(weighted(picked))
        return [picked, tf.convert_to_tensor(tape.gradient(total, x))]

    check(function, [batch(counts, 3, 4), ids], counts, falls_back=None)


SCATTERS = {
    "into zeros": lambda x, ids: tf.scatter_nd(ids[:, None], x, [5, 3]),
    "elements into zeros": lambda x, ids: tf.scatter_nd(
        tf.stack([ids, ids % 3], 1), x[:, 0], [5, 3]
    ),
    "a sum": lambda x, ids: tf.scatter_nd([[1], [3], [1]], tf.reduce_sum(x, 0), [5]),
    "one for all rows": lambda x, ids: tf.scatter_nd(
        ids[:, None], tf.ones([tf.shape(x)[0], 2]), [5, 2]
    ),
    "added to a table": lambda x, ids: tf.tensor_scatter_nd_add(
        TABLE[:, :, 0], ids[:, None], x
    ),
    "taken from a table": lambda x, ids: tf.tensor_scatter_nd_sub(
        TABLE[:, :, 0], ids[:, None], x
    ),
    "added to a sum": lambda x, ids: tf.tensor_scatter_nd_add(
        tf.reduce_sum(x, 0), (ids % 3)[:, None], x[:, 0]
    ),
    "set in all rows": lambda x, ids: tf.transpose(
        tf.tensor_scatter_nd_update(tf.transpose(x), [[1]], 2 * tf.transpose(x)[:1])
    ),
    "added in all rows": lambda x, ids: tf.tensor_scatter_nd_add(
        tf.transpose(x), [[1], [1]], tf.transpose(x)[:2]
    ),
    "larger in all rows": lambda x, ids: tf.tensor_scatter_nd_max(
        tf.transpose(x), [[2]], 3 * tf.transpose(x)[:1]
    ),
}


@pytest.mark.parametrize("name", SCATTERS)
@by_rows(few)
def test_scatters(name, counts):
    arrays = [batch(counts, 3), places(counts)]
    check(SCATTERS[name], arrays, counts)


SET_BY_ROWS = {
    "set": lambda x, ids: tf.tensor_scatter_nd_update(
        TABLE[:, :, 0], tf.argsort(ids)[:5, None] % 5, tf.ones([5, 3])[: tf.shape(x)[0]]
    ),
    "larger": lambda x, ids: tf.tensor_scatter_nd_max(TABLE[:, :, 0], ids[:, None], x),
    "smaller": lambda x, ids: tf.tensor_scatter_nd_min(TABLE[:, :, 0], ids[:, None], x),
    "at the place of the row": lambda x, ids: tf.tensor_scatter_nd_update(
        x, [[0]], tf.zeros([1, 3])
    ),
    "the same places": lambda x, ids: tf.scatter_nd(
        [[0], [4], [0]], tf.transpose(x), [5, tf.shape(x)[0]]
    ),
    "into rows": lambda x, ids: tf.scatter_nd(
        tf.stack([tf.range(tf.shape(x)[0]), ids], 1), x[:, 0], [tf.shape(x)[0], 5]
    ),
}


@pytest.mark.parametrize("name", SET_BY_ROWS)
@by_rows(few)
def test_what_is_set_by_rows_may_be_computed_in_full(name, counts):
    arrays = [batch(counts, 3), places(counts)]
    check(SET_BY_ROWS[name], arrays, counts, falls_back=None)


SEGMENTS = {
    "sum": tf.math.unsorted_segment_sum,
    "mean": tf.math.unsorted_segment_mean,
    "max": tf.math.unsorted_segment_max,
    "min": tf.math.unsorted_segment_min,
    "product": tf.math.unsorted_segment_prod,
    "sqrt": tf.math.unsorted_segment_sqrt_n,
}


@pytest.mark.parametrize("name", SEGMENTS)
@by_rows(few)
def test_segments_and_their_gradients(name, counts):
    segments = SEGMENTS[name]

    def function(x, ids):
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = [
                segments(x, ids, 6),
                segments(x[:, :, 0], tf.tile(ids[:, None], [1, 3]), 6),
                segments(rows_at(x, 1), [0, 2, 0], 3),
                segments(tf.reduce_sum(x, 0), [0, 2, 0], 3),
            ]
            # A segment without rows holds the largest or the smallest number there is.
            total = tf.add_n(
                [tf.reduce_sum(tf.math.sigmoid(t) * weighted(ids[0])) for t in found]
            )
        return [*found, tape.gradient(total, x)]

    arrays = [batch(counts, 3, 4), places(counts)]
    check(function, arrays, counts, falls_back=None, rtol=1e-4)


@by_rows(few)
def test_segments_by_rows_are_not_computed_in_full(counts):
    def function(x, ids):
        return [segments(x, ids, 6) for segments in SEGMENTS.values()]

    check(function, [batch(counts, 3), places(counts)], counts)


@by_rows(few)
def test_unique_values(counts):
    def function(ids):
        values, places, numbers = tf.unique_with_counts(ids)
        return [values, places, numbers, *tf.unique(ids), tf.gather(numbers, places)]

    outcome = check(function, [places(counts)], counts)
    assert outcome.layouts[1] == outcome.layouts[-1] == "rows"


@by_rows(few)
def test_tables(counts):
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(["a", "b"], [3, 4]), default_value=-1
    )
    words = np.array([b"a", b"b", b"c"])[places(counts, 2, below=3)]
    outcome = check(lambda words: table.lookup(words), [words], counts)
    assert outcome.layouts == ["rows"]


@few
@given(splits(), st.integers(1, 3))
def test_in_top_k(counts, k):
    classes = places(counts, below=4)
    tied = np.round(batch(counts, 4), 1)
    table = np.linspace(0, 1, 4, dtype="float32")

    def function(scores, classes):
        everywhere = tf.tile(table[None], [tf.shape(classes)[0], 1])
        return [
            tf.math.in_top_k(classes, scores, k),
            tf.math.in_top_k(classes, everywhere, k),
        ]

    check(function, [tied, classes], counts)


@by_rows(few)
def test_reversed_sequences(counts):
    lengths = places(counts, below=4)

    def function(x, lengths):
        fixed = tf.fill([tf.shape(x)[0]], 2)
        return [
            tf.reverse_sequence(x, lengths, seq_axis=1),
            tf.reverse_sequence(x, fixed, seq_axis=2),
            tf.reverse_sequence(rows_at(x, 1), lengths, seq_axis=0, batch_axis=1),
        ]

    check(function, [batch(counts, 3, 4), lengths], counts)
