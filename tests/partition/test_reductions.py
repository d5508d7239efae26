"""Reductions over rows and other dimensions, and what is built on them."""

import numpy as np
import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import by_rows, check, partitioned, splits
from test_elementwise import batch
from test_shapes import both_ways, rows_at

few = settings(deadline=None, max_examples=examples(2, 4))

REDUCTIONS = [
    *(tf.reduce_sum, tf.reduce_mean, tf.reduce_max, tf.reduce_min, tf.reduce_prod),
    *(tf.math.reduce_euclidean_norm, tf.reduce_logsumexp),
    *(tf.math.reduce_std, tf.math.reduce_variance),
]
AXES = [None, 0, 1, -1, -2, (0, 1), (0, 2), (1, 2), (-1, 0), (0, 1, 2), ()]


@pytest.mark.parametrize("axis", AXES)
@few
@given(splits(), st.booleans(), st.integers(0, 2))
def test_any_axes(axis, counts, keepdims, dim):
    def function(x):
        value = rows_at(x, dim)
        return [reduce(value, axis, keepdims=keepdims) for reduce in REDUCTIONS]

    check(function, [batch(counts, 3, 2)], counts)


@given(splits(), st.sampled_from([None, 0, 1, (0, 1)]), st.booleans())
@few
def test_gradients_of_reductions(counts, axis, keepdims):
    kept = [r for r in REDUCTIONS if r is not tf.reduce_prod]
    function = lambda x: [r(x, axis, keepdims=keepdims) for r in kept]  # noqa: E731
    check(both_ways(function), [batch(counts, 3)], counts, rtol=1e-4)
    check(both_ways(tf.reduce_prod), [batch(counts, 2)], counts, falls_back=None)


@by_rows(few)
def test_blocks_inner_and_sums(counts):
    def function(x):
        both = tf.concat([x, 2 * x], 0)
        flat = tf.reshape(x, [-1, 2])
        total = tf.reduce_sum(x, 0)
        pairs = x[:, None, 0] - x[None, :, 0]
        return [
            reduce(value, axis)
            for reduce in REDUCTIONS
            for value in (both, flat, total, pairs)
            for axis in (None, 0)
        ]

    check(function, [batch(counts, 3, 2)], counts)


def test_layouts_and_exchanges():
    x = batch([2, 1], 3)
    for reduce in (tf.reduce_sum, tf.reduce_mean):
        outcome = check(lambda x, r=reduce: [r(x), r(x, 0), r(x, 1)], [x], [2, 1])
        assert outcome.layouts == ["partial", "partial", "rows"]
        assert outcome.exchanges == 0
    outcome = check(lambda x: tf.nn.moments(x, 0), [x], [2, 1])
    assert outcome.exchanges == 1
    outcome = check(lambda x: tf.math.reduce_std(x), [x], [2, 1])
    assert outcome.exchanges == 1


@given(splits(), st.sampled_from([None, 0, 1, (0, 1)]))
@few
def test_booleans_and_integers(counts, axis):
    numbers = np.random.default_rng(0).integers(-9, 9, (sum(counts), 3))

    def function(x):
        results = [f(x > 5, axis) for f in (tf.reduce_any, tf.reduce_all)]
        reductions = (tf.reduce_sum, tf.reduce_max, tf.reduce_min, tf.reduce_prod)
        results += [f(x, axis) for f in reductions]
        results += [f(tf.cast(x, tf.int8), axis) for f in reductions]
        return results + [tf.math.count_nonzero(x, axis)]

    check(function, [numbers.astype("int32")], counts)
    check(function, [numbers], counts)
    mean = lambda x: [tf.reduce_mean(x, axis), tf.reduce_mean(x - 5, 1)]  # noqa: E731
    check(mean, [numbers.astype("int32")], counts, falls_back=None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_means_and_moments_of_half_precision_stay_in_range(dtype):
    x = np.full((200, 500), 20.0, "float32")
    x[::2] += 8

    def function(x):
        half = tf.cast(x, dtype)
        results = [
            *(tf.reduce_mean(half), tf.reduce_mean(half * half, 0)),
            *(tf.math.reduce_variance(half, 0), *tf.nn.moments(half, [0, 1])),
            tf.math.reduce_std(half),
        ]
        return [tf.cast(r, tf.float32) for r in results]

    # TensorFlow's own means overflow on a CPU, so these are NumPy's.
    outcome = partitioned(function, [x], [150, 50])
    mean, variance = np.mean(x), np.var(x)
    expected = [mean, np.mean(x * x, 0), np.var(x, 0), mean, variance, np.std(x)]
    for got, want in zip(outcome.results, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-2)


@by_rows(few)
def test_moments_far_from_zero(counts):
    x = batch(counts, 3) + 1000
    function = lambda x: [*tf.nn.moments(x, 0), tf.math.reduce_std(x)]  # noqa: E731
    outcome = check(function, [x], counts, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(outcome.results[1], np.var(x, 0), rtol=1e-3, atol=1e-6)


@given(splits(), st.sampled_from([0, 1, (0, 1), (0, 1, 2)]), st.booleans())
@few
def test_moments_and_normalization(counts, axes, keepdims):
    axes = [axes] if isinstance(axes, int) else list(axes)

    def function(x):
        mean, variance = tf.nn.moments(x, axes, keepdims=True)
        weights = tf.abs(x) + 0.1
        return [
            tf.nn.batch_normalization(x, mean, variance, None, 2.0, 1e-3),
            *tf.nn.moments(x, axes, keepdims=keepdims),
            *tf.nn.weighted_moments(x, axes, weights, keepdims=keepdims),
        ]

    check(both_ways(function), [batch(counts, 3, 2)], counts, rtol=1e-3, atol=1e-4)


@given(splits(), st.sampled_from([None, 0, 1, -1]))
@few
def test_norms(counts, axis):
    def function(x):
        return [
            tf.nn.l2_normalize(x, axis),
            tf.norm(x, axis=axis),
            tf.norm(x, 1, axis=axis),
            tf.norm(x, np.inf, axis=axis),
            tf.nn.l2_loss(x),
            tf.nn.l2_loss(tf.reduce_sum(x, 0)),
            tf.clip_by_norm(x, 0.5, axis),
            tf.clip_by_global_norm([x, tf.reduce_sum(x, 0)], 0.5)[0],
        ]

    check(both_ways(function), [batch(counts, 3)], counts, rtol=1e-4, atol=1e-4)


@given(splits(), st.integers(0, 2), st.sampled_from(["float32", "float16"]))
@few
def test_softmax_along_any_dimension(counts, axis, dtype):
    def function(x):
        x = tf.cast(x * 20, dtype)
        values = [tf.nn.softmax(x, axis), tf.nn.log_softmax(x, axis)]
        return [tf.cast(v, tf.float32) for v in values]

    rtol = 1e-4 if dtype == "float32" else 2e-2
    check(function, [batch(counts, 3, 2)], counts, rtol=rtol, atol=1e-3)
    if dtype == "float32":
        check(both_ways(function), [batch(counts, 3, 2)], counts, rtol=1e-3, atol=1e-3)


@given(splits(), st.integers(-3, 2))
@few
def test_places_of_extremes(counts, axis):
    x = batch(counts, 3, 2)
    function = lambda x: [tf.argmax(x, axis), tf.argmin(x, axis)]  # noqa: E731
    check(function, [x], counts, falls_back=axis in (0, -3))


@by_rows(few)
def test_fake_quantization_and_its_limits(counts):
    def function(x):
        low, high = tf.reduce_min(x) + 0.1, tf.reduce_max(x) - 0.1
        return tf.quantization.fake_quant_with_min_max_vars(x, low, high)

    check(both_ways(function), [batch(counts, 3)], counts, rtol=1e-4)


@given(splits(), st.sampled_from([None, 0, 1]))
@few
def test_infinite_and_missing_numbers(counts, axis):
    x = batch(counts, 3)
    x[0, 1], x[-1, 2], x[0, 0] = np.inf, np.nan, -np.inf
    reductions = [tf.reduce_sum, tf.reduce_mean, tf.reduce_logsumexp]
    check(lambda x: [r(x, axis) for r in reductions], [x], counts)


@by_rows(few)
def test_a_masked_mean(counts):
    mask = np.random.default_rng(3).integers(0, 2, (sum(counts), 3)) > 0

    def function(x, mask):
        weight = tf.cast(mask, tf.float32)
        return [
            tf.math.divide_no_nan(tf.reduce_sum(x * weight), tf.reduce_sum(weight)),
            tf.reduce_sum(tf.where(mask, x, 0.0), 0) / (tf.reduce_sum(weight, 0) + 1),
            tf.reduce_sum(tf.cast(mask, tf.int32)) / tf.size(mask),
        ]

    check(function, [batch(counts, 3), mask], counts)
