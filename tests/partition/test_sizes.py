"""Integers that follow from shapes: what one device computes, known while tracing."""

import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import assume, given, settings
from rules import by_rows, check, splits
from test_elementwise import batch

few = settings(deadline=None, max_examples=examples(3, 5))


def of_shape(x):
    shape = tf.shape(x)
    rows, features = shape[0], shape[1]
    return {
        "sums": [rows + 3, rows - features, rows + rows, 0 - rows, rows + 0 * rows],
        "products": [rows * features, rows * rows, tf.reduce_prod(shape), -rows * 2],
        "quotients": [
            *(rows * features // rows, rows // 2, (rows * 6) // 4, rows % features),
            *((rows * 6) % 3, tf.truncatediv(-7 + 0 * features, 2), -7 // features),
            tf.raw_ops.Mod(x=-7 + 0 * features, y=features),
            tf.raw_ops.TruncateMod(x=rows - 9, y=features),
        ],
        "extremes": [
            *(tf.maximum(rows, 2), tf.minimum(rows, features), tf.maximum(rows, 0)),
            *(tf.maximum(rows, rows), tf.minimum(features, 1), tf.maximum(-rows, 0)),
        ],
        "vectors": [
            *(shape[::-1], shape[:1], shape[-1:], tf.concat([shape, [7]], 0)),
            *(tf.stack([features, rows]), tf.gather(shape, [1, 0]), shape[tf.newaxis]),
            *(tf.reduce_sum(shape), tf.reverse(shape, [0]), tf.reshape(shape, [2, 1])),
            *(tf.transpose(tf.stack([shape, shape])), tf.unstack(shape)[0]),
            *(tf.slice(tf.stack([shape, shape]), [0, 1], [2, -1]), tf.range(3)),
            *(tf.fill([2], rows), tf.squeeze(shape[:1]), tf.expand_dims(rows, 0)),
            tf.dynamic_stitch([[1], [0]], [shape[:1], shape[1:]]),
            tf.math.invert_permutation([1, 2, 0]),
        ],
        "kinds": [
            *(tf.size(x), tf.rank(x), tf.cast(rows, tf.int64), tf.cast(rows, tf.int8)),
            *(tf.cast(rows, tf.float32) / 3, tf.shape_n([x, x])[1], tf.identity(shape)),
            *(tf.shape(x, tf.int64), tf.cast(300 * rows, tf.uint8), rows > 2),
            tf.equal(rows, features),
        ],
        "broadcasts": [
            tf.broadcast_dynamic_shape(shape, shape[1:]),
            tf.broadcast_dynamic_shape(shape, tf.constant([1, 1])),
            *tf.raw_ops.BroadcastGradientArgs(s0=shape, s1=shape[1:]),
            tf.raw_ops.BroadcastArgs(s0=shape, s1=[1]),
        ],
    }


KINDS = list(of_shape(tf.zeros([2, 3])))


@pytest.mark.parametrize("kind", KINDS)
@few
@given(splits())
def test_integers_of_the_global_shape(kind, counts):
    # For a single row TensorFlow also lists axes of size 1 to sum over, which is the
    # same sum: whether there is a single row is not known while a step is traced.
    assume(kind != "broadcasts" or sum(counts) > 1)
    function = lambda x: of_shape(x)[kind]  # noqa: E731
    outcome = check(function, [batch(counts, 3)], counts)
    assert outcome.exchanges == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[2, 0], [2, 1], [3, 3]])
def test_integers_of_a_fixed_shape(kind, counts):
    function = lambda x: of_shape(x)[kind]  # noqa: E731
    check(function, [batch(counts, 3)], counts, rows=sum(counts))


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_an_open_shape(kind):
    function = lambda x: of_shape(x)[kind]  # noqa: E731
    check(function, [batch([3, 1], 3)], [3, 1], open_dims=(1,))


@by_rows(few)
def test_sizes_of_what_has_rows(counts):
    def function(x):
        both = tf.concat([x, x], 0)
        flat = tf.reshape(x, [-1])
        return [tf.shape(v) for v in (both, flat, x[None], tf.transpose(x), x[:, :2])]

    outcome = check(function, [batch(counts, 3)], counts)
    assert outcome.exchanges == 0
