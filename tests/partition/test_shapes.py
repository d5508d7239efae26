"""Operations that move elements: rows in any dimension, blocks of rows, sums."""

import numpy as np
import pytest
import tensorflow as tf
from breadth import examples, pick
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rules import by_rows, check, splits
from test_elementwise import batch

few = settings(deadline=None, max_examples=examples(2, 4))


def weighted(value):
    """Gives every element a different gradient."""
    return tf.math.log1p(tf.square(tf.cast(value, tf.float32)))


def both_ways(function):
    """The results of a function of a batch and its gradient."""

    def results(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = tf.nest.flatten(function(x))
            total = tf.add_n([tf.reduce_sum(weighted(v)) for v in values])
        gradient = tape.gradient(total, x, unconnected_gradients="zero")
        return [*values, tf.convert_to_tensor(gradient)]

    return results


def rows_at(x, dim):
    """A batch [rows, ...] with its rows as another dimension."""
    order = list(range(1, x.shape.rank))
    order.insert(dim, 0)
    return tf.transpose(x, order)


PARTITIONED = {
    "flat": lambda x: tf.reshape(x, [-1]),
    "flat and back": lambda x: tf.reshape(tf.reshape(x, [-1, 4]) * 2, [-1, 3, 4]),
    "flat and back by shape": lambda x: tf.reshape(tf.reshape(x, [-1]), tf.shape(x)),
    "rows x time": lambda x: tf.reshape(
        tf.reshape(x, [tf.shape(x)[0] * 3, 4]), [tf.shape(x)[0], 3, 4]
    ),
    "heads": lambda x: tf.transpose(tf.reshape(x, [-1, 3, 2, 2]), [0, 2, 1, 3]),
    "heads into rows": lambda x: tf.reshape(
        tf.transpose(tf.reshape(x, [-1, 3, 2, 2]), [2, 0, 1, 3]), [-1, 3, 2]
    ),
    "rows last, flat": lambda x: tf.reshape(rows_at(x, 2), [12, -1]),
    "expand": lambda x: [tf.expand_dims(x, a) for a in (0, 1, -1)],
    "squeeze": lambda x: [tf.squeeze(x[:, None], 1), tf.squeeze(x[:, :1], [1])],
    "transpose": lambda x: [tf.transpose(x), rows_at(x, 1), rows_at(x, 2)],
    "conjugate transpose": lambda x: tf.math.real(
        tf.transpose(tf.complex(x, x), conjugate=True)
    ),
    "zeros": lambda x: [
        tf.zeros([tf.shape(x)[0], 2]) + x[:, 0, :2],
        tf.fill([2, tf.shape(x)[0]], 3.0) * x[:, 0, 0],
    ],
    "broadcast": lambda x: [
        tf.broadcast_to(x[:, :1], tf.shape(x)),
        tf.broadcast_to(tf.constant([1.0, 2, 3, 4]), tf.shape(x)) * x,
        tf.broadcast_to(x, [2, tf.shape(x)[0], 3, 4]),
        tf.broadcast_to(tf.reduce_mean(x, 0), [2, 3, 4]),
    ],
    "tile": lambda x: [
        *(tf.tile(x, [1, 2, 1]), tf.tile(x, [3, 1, 2]), tf.tile(x[:, 0], [2, 1])),
        tf.tile(tf.constant([[1.0, 2.0]]), [tf.shape(x)[0], 1]) + x[:, 0, :2],
        tf.tile(tf.constant([1.0]), [tf.shape(x)[0] * 2])
        + tf.reshape(x[:, 0, :2], [-1]),
        tf.tile(tf.constant([1.0, 2.0]), [tf.shape(x)[0]])
        + tf.reshape(x[:, 0, :2], [-1]),
        tf.tile(tf.reduce_mean(x, 0), [2, 1]),
    ],
    "repeat": lambda x: [
        tf.repeat(x, 2, axis=0),
        tf.repeat(x, 3, axis=1),
        tf.repeat(rows_at(x, 2), 2, axis=2),
    ],
    "concat": lambda x: [
        tf.concat([x, 2 * x], 1),
        tf.concat([x, tf.ones([tf.shape(x)[0], 1, 4])], 1),
        tf.concat([rows_at(x, 1), tf.zeros([1, tf.shape(x)[0], 4])], 0),
        tf.concat([tf.reduce_sum(x, 0), tf.reduce_max(x, 0)], -1),
    ],
    "blocks": lambda x: tf.concat([x, -x, tf.zeros_like(x)], 0),
    "blocks of constants": lambda x: (
        tf.concat([tf.ones([tf.shape(x)[0], 1]), tf.zeros([2 * tf.shape(x)[0], 1])], 0)
        * tf.concat([x[:, 0, :1]] * 3, 0)
    ),
    "inner blocks": lambda x: tf.concat([tf.reshape(x, [-1, 4])] * 2, 0),
    "inner blocks of ones": lambda x: tf.concat(
        [tf.reshape(x, [-1, 4]), tf.ones([tf.shape(x)[0] * 3, 4])], 0
    ),
    "stack": lambda x: (
        [tf.stack([x, 2 * x], a) for a in (0, 1, -1)]
        + [tf.stack([tf.reduce_sum(x, 0), tf.ones([3, 4])])]
    ),
    "unstack": lambda x: [*tf.unstack(x, axis=1), *tf.unstack(rows_at(x, 1))],
    "split": lambda x: [
        *tf.split(x, 2, 2),
        *tf.split(x, [1, 2], 1),
        *tf.split(x, [1, -1], -1),
        *tf.split(tf.reduce_sum(x, 0), 3),
    ],
    "blocks apart": lambda x: tf.split(tf.concat([x, 2 * x], 0), 2),
    "blocks apart by sizes": lambda x: tf.split(
        tf.concat([x, 2 * x, 3 * x], 0), [tf.shape(x)[0], 2 * tf.shape(x)[0]]
    ),
    "slices of blocks": lambda x: _slices_of_blocks(tf.concat([x, 2 * x], 0)),
    "slices of inner blocks": lambda x: _slices_of_blocks(
        tf.reshape(tf.concat([x, 2 * x], 0), [-1, 4]), 3
    ),
    "slices": lambda x: [
        *(x[:, 0], x[:, -1], x[:, 1:], x[:, ::-1], x[:, ::2], x[..., 1:-1], x[:, -2:]),
        *(x[:, 2:0:-1], x[:, :, None], x[None], x[0:], x[: tf.shape(x)[0]], x[:]),
        *(rows_at(x, 1)[1], rows_at(x, 2)[:, 1:], x[:, 0, 1], x[..., 0], x[:, 5:]),
        *(x[: tf.shape(x)[0], 1], tf.reduce_sum(x, 0)[1:], tf.reduce_sum(x, 0)[0]),
    ],
    "slice": lambda x: [
        tf.slice(x, [0, 1, 0], [-1, 2, -1]),
        tf.slice(x, [0, 0, 1], [tf.shape(x)[0], 3, 2]),
        tf.slice(tf.concat([x, x * 2], 0), [tf.shape(x)[0], 0, 1], [-1, -1, 2]),
        tf.slice(tf.concat([x, x * 2], 0), [0, 0, 1], [tf.shape(x)[0], -1, -1]),
    ],
    "pairs": lambda x: [
        tf.reshape(x[:, None, 0] * x[None, :, 0], [-1, 4]),
        tf.reshape(x[:, None, 0] * x[None, :, 0], [-1]),
        (x[:, None, 0, 0] - x[None, :, 0, 0])[:, : tf.shape(x)[0]],
        (x[:, None, 0, 0] - x[None, :, 0, 0])[:, -tf.shape(x)[0] :],
        (x[:, None, 0, 0] - x[None, :, 0, 0])[:, tf.shape(x)[0] :],
        (x[:, None, 0, 0] - x[None, :, 0, 0])[:, 1:],
    ],
    "pad": lambda x: [
        tf.pad(x, [[0, 0], [1, 2], [0, 1]]),
        tf.pad(x, [[0, 0], [1, 0], [0, 0]], constant_values=2.0),
        tf.pad(x, [[0, 0], [1, 1], [0, 0]], "REFLECT"),
        tf.pad(x, [[0, 0], [1, 1], [2, 0]], "SYMMETRIC"),
        tf.pad(tf.reduce_sum(x, 0), [[1, 0], [0, 0]]),
        tf.pad(tf.reduce_sum(x, 0), [[1, 0], [0, 0]], constant_values=1.0),
        tf.pad(rows_at(x, 2), [[1, 0], [1, 0], [0, 0]]),
    ],
    "order": lambda x: [
        *(tf.reverse(x, [1]), tf.reverse(x, [-1, 1]), tf.roll(x, 1, 1)),
        *(tf.roll(x, [1, -2], [1, 2]), tf.reverse(tf.reduce_sum(x, 0), [0])),
        *(tf.roll(rows_at(x, 1), 1, 0), tf.roll(tf.reduce_sum(x, 0), 1, 0)),
    ],
    "running": lambda x: [
        *(tf.cumsum(x, 1), tf.cumsum(x, -1, exclusive=True, reverse=True)),
        *(tf.math.cumprod(x, 1), tf.math.cumulative_logsumexp(x, 2)),
        *(tf.cumsum(rows_at(x, 1), 0), tf.cumsum(tf.reduce_sum(x, 0), 1)),
    ],
    "range": lambda x: [
        tf.cast(tf.range(tf.shape(x)[0]), tf.float32)[:, None] + x[:, 0],
        tf.cast(tf.range(0, 2 * tf.shape(x)[0], 2), tf.float32)[:, None] + x[:, 0],
    ],
    "eye": lambda x: tf.eye(tf.shape(x)[0]) * (x[:, None, 0, 0] * x[None, :, 0, 0]),
}


def _slices_of_blocks(both, inner=1):
    half = tf.shape(both)[0] // 2
    rest = [] if both.shape.rank < 3 else [both[half:, 0], both[:half, ..., 1:]]
    return [
        *(both[:half], both[half:], both[-half:], both[:-half], both[: 2 * half]),
        *(both[:half, None], both[half:, ::-1], both[:half, 1]),
        *rest,
    ]


@pytest.mark.parametrize("kind", PARTITIONED)
@by_rows(few)
def test_partitioned_and_equal_to_one_device(kind, counts):
    check(both_ways(PARTITIONED[kind]), [batch(counts, 3, 4)], counts)


@pytest.mark.parametrize("kind", PARTITIONED)
@pytest.mark.parametrize(
    "counts", pick([[3, 0, 1]], [[2, 1], [1, 0], [3, 0, 1], [0, 12]])
)
def test_equal_with_a_fixed_number_of_rows(kind, counts):
    """Includes one row, and as many rows as features: 4, and 3 and 12."""
    x = batch(counts, 3, 4)
    check(both_ways(PARTITIONED[kind]), [x], counts, rows=sum(counts), falls_back=None)


FALLEN = {
    "slices of rows": lambda x: [x[1:], x[:-1], x[::-1], x[::2], x[:1]],
    "a row": lambda x: [x[0], x[-1]],
    "running over rows": lambda x: [tf.cumsum(x, 0), tf.reverse(x, [0])],
    "rolled rows": lambda x: tf.roll(x, 1, 0),
    "padded rows": lambda x: tf.pad(x, [[1, 0], [0, 0], [0, 0]]),
    "blocks cut": lambda x: tf.concat([x, 2 * x], 0)[1:],
    "rows within features": lambda x: tf.reshape(x, [4, 3, -1]),
    "features before rows": lambda x: tf.reshape(tf.transpose(x), [-1, 4]),
    "repeated features": lambda x: tf.concat([x, tf.ones([2, 3, 4])], 0),
    "blocks and inner": lambda x: tf.concat(
        [tf.reshape(x, [-1, 4]), tf.ones([3 * tf.shape(x)[0], 4]), x[:, 0]], 0
    ),
}


@pytest.mark.parametrize("kind", FALLEN)
@by_rows(few)
def test_what_moves_rows_between_replicas_falls_back(kind, counts):
    x = batch(counts, 3, 4)
    check(both_ways(FALLEN[kind]), [x], counts, falls_back=True)


@pytest.mark.parametrize("kind", FALLEN)
@pytest.mark.parametrize("counts", pick([[3, 0, 1]], [[1, 0], [2, 2], [3, 0, 1]]))
def test_the_same_with_a_fixed_number_of_rows(kind, counts):
    x = batch(counts, 3, 4)
    check(both_ways(FALLEN[kind]), [x], counts, falls_back=None, rows=sum(counts))


@given(splits(), st.permutations(range(4)), st.data())
@few
def test_reshapes_of_any_order_of_dimensions(counts, order, data):
    x = batch(counts, 2, 3, 2)
    sizes = [[2], [3], [2], [6], [4], [3, 2], [2, 2], [-1]]
    wanted = sum(data.draw(st.lists(st.sampled_from(sizes), max_size=3)), [])
    total, known = x.size, int(np.prod([w for w in wanted if w != -1]))
    if wanted.count(-1) > 1 or total % known:
        wanted = [-1]
    elif -1 not in wanted:
        wanted = [*wanted, -1]
    function = both_ways(lambda x: tf.reshape(tf.transpose(x, order), wanted))
    check(function, [x], counts, falls_back=None)
    check(function, [x], counts, falls_back=None, rows=sum(counts))


@given(splits(), st.data())
@few
def test_any_slices(counts, data):
    x = batch(counts, 4, 3)
    border = st.one_of(st.none(), st.integers(-5, 5))
    step = st.sampled_from([None, 1, 2, -1, -2])
    entry = st.one_of(
        st.builds(slice, border, border, step), st.integers(-3, 2), st.just(None)
    )
    entries = data.draw(st.lists(entry, min_size=1, max_size=2))
    index = [slice(None), *entries]
    for new in (None, data.draw(st.sampled_from([None, ..., slice(None)]))):
        index.insert(data.draw(st.integers(0, len(index))), new)
    assume(sum(i is not None and i is not ... for i in index) <= 3)
    dim = data.draw(st.integers(0, 2))
    places = data.draw(st.booleans())

    def function(x):
        value = tf.concat([x, 2 * x], 0) if places else rows_at(x, dim)
        return value[tuple(index)]

    check(both_ways(function), [x], counts, falls_back=None)


def test_layouts_of_blocks_and_heads():
    x = batch([2, 1], 3, 4)
    outcome = check(lambda x: tf.reshape(x, [-1, 4]) * 2, [x], [2, 1])
    assert outcome.layouts == ["replicated"]  # Only rows(0) are returned as they lie.
    assert outcome.exchanges == 1
    outcome = check(PARTITIONED["blocks apart"], [x], [2, 1])
    assert outcome.layouts == ["rows", "rows"]
    assert outcome.exchanges == 0


@by_rows(few)
def test_an_open_second_dimension(counts):
    """Batches [rows, time, 4] whose time is open, too."""
    x = batch(counts, 3, 4)

    def function(x):
        shape = tf.shape(x)
        flat = tf.reshape(x, [-1, 4])
        again = tf.reshape(flat * 2, [shape[0], shape[1], 4])
        scores = tf.matmul(x, again, transpose_b=True)
        mask = tf.range(shape[1])[None, :, None] <= tf.range(shape[1])[None, None]
        return [
            *(again, flat, tf.reduce_mean(x, [0, 1]), tf.reduce_sum(flat, 0)),
            *(tf.where(mask, scores, -1e9), tf.nn.softmax(scores), x[:, ::-1]),
            *(tf.tile(x[:, :1], [1, shape[1], 1]), tf.zeros([shape[0], shape[1]])),
            tf.concat([x, x], 1)[:, : shape[1]],
            x + tf.ones([shape[1], 1]),
            tf.math.reduce_variance(x, [0, 1]),
        ]

    check(both_ways(function), [x], counts, open_dims=(1,))


@by_rows(few)
def test_top_k_and_one_hot(counts):
    x = batch(counts, 5, 4)

    def function(x):
        values, indices = tf.math.top_k(x, 2)
        classes = tf.argmax(x, -1)
        hot = [tf.one_hot(classes, 4, axis=axis) for axis in (-1, 0, 1, 2)]
        last = tf.math.top_k(rows_at(x, 1), 3)
        return [values, indices, *hot, *last, tf.one_hot(classes, 4, 2.0, -1.0)]

    check(function, [x], counts)


@given(splits(), st.booleans())
@few
def test_repeated_for_each_of_a_known_number_of_rows(counts, tiled_twice):
    """A replica repeats for its own rows, also through operations in between."""
    rows, x = sum(counts), batch(counts, 3)
    numbers = tf.constant([0.5, 2.0, -1.0])

    def function(x):
        tiled = tf.tile(numbers[tf.newaxis], [rows, 1])
        tiled = tf.tile(tiled, [1, 2])[:, :3] if tiled_twice else tiled
        filled = tf.exp(-tf.fill([rows, 3], numbers[1])) + tiled / 3
        spread = tf.broadcast_to(numbers, [rows, 3]) * tf.broadcast_to(2.0, [rows, 3])
        mean = tf.reduce_mean(tf.square(x), 0, keepdims=True)
        return [x * tiled, x + filled, x - spread, tf.reduce_sum(tiled), spread, mean]

    check(both_ways(function), [x], counts, rows=rows)
