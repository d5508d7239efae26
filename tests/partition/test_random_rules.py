"""Random draws on several replicas are those of one device, bit for bit."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import check, splits

few = settings(deadline=None, max_examples=12)

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_INTS = ("int32", "int64")
DRAWS = [
    *(itertools.product(("StatelessRandomUniformV2",), _FLOATS)),
    *(itertools.product(("StatelessRandomNormalV2",), _FLOATS)),
    *(itertools.product(("StatelessTruncatedNormalV2",), _FLOATS)),
    *(itertools.product(("StatelessRandomUniformIntV2",), _INTS)),
    *(
        itertools.product(
            ("StatelessRandomUniformFullIntV2",), (*_INTS, "uint32", "uint64")
        )
    ),
]


def rows_like(counts, *more, seed=0):
    shape = (sum(counts), *more)
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def count_of(x):
    return tf.shape(x)[0]


def bits(tensor):
    """A tensor as integers, so that it is compared bit for bit."""
    kinds = {1: tf.uint8, 2: tf.int16, 4: tf.int32, 8: tf.int64}
    return tf.bitcast(tensor, kinds[tensor.dtype.size])


def drawn(name, dtype, shape, counter=(5, 7), alg=3):
    dtype = tf.as_dtype(dtype)
    given = dict(
        shape=shape,
        key=tf.constant([99], tf.uint64),
        counter=np.array(counter, np.uint64),
        alg=alg,
    )
    operation = getattr(tf.raw_ops, name)
    if name == "StatelessRandomUniformIntV2":
        low, high = tf.constant(-3, dtype), tf.constant(1000, dtype)
        return bits(operation(**given, minval=low, maxval=high))
    return bits(operation(**given, dtype=dtype))


def same(function, arrays, counts, **options):
    return check(function, arrays, counts, rtol=0, atol=0, **options)


@pytest.mark.parametrize("name,dtype", DRAWS)
@given(splits(), st.integers(1, 5), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=5)
def test_a_stateless_draw_by_rows(name, dtype, counts, columns, alg):
    def step(x):
        return drawn(name, dtype, [count_of(x), columns], alg=alg)

    outcome = same(step, [rows_like(counts, 2)], counts)
    assert outcome.layouts == ["rows"] and outcome.exchanges == 0


@pytest.mark.parametrize("name,dtype", DRAWS)
def test_a_large_draw_that_threads_share(name, dtype):
    counts = [3, 4, 1]

    def step(x):
        return drawn(name, dtype, [count_of(x), 40001])

    same(step, [rows_like(counts, 2)], counts)


@pytest.fixture
def spans(monkeypatch):
    """Records each draw that begins at the first row of a replica."""
    from distfit.partition.rules import random

    found = []
    stock = random._in_spans
    monkeypatch.setattr(
        random, "_in_spans", lambda *given, **more: found.append(1) or stock(*given, **more)
    )
    return found


def test_a_replica_draws_its_own_rows_alone(spans):
    counts = [3, 2]
    same(lambda x: drawn(*DRAWS[2], [count_of(x), 3]), [rows_like(counts, 2)], counts)
    assert spans


def test_a_truncated_normal_draw_is_cut(spans):
    counts, name = [3, 2], "StatelessTruncatedNormalV2"
    step = lambda x: drawn(name, "float32", [count_of(x), 3])  # noqa: E731
    same(step, [rows_like(counts, 2)], counts)
    assert not spans


@pytest.mark.parametrize(
    "counter",
    [(2**64 - 2, 7), (2**64 - 2, 2**64 - 1), (2**63 - 2, 7), (2**32 - 2, 1), (0, 0)],
)
def test_a_counter_that_runs_over(counter):
    counts = [3, 0, 4]

    def step(x):
        return drawn("StatelessRandomUniformV2", "float32", [count_of(x), 3], counter)

    same(step, [rows_like(counts, 2)], counts)


def test_an_algorithm_that_is_not_known_is_drawn_in_full(spans):
    counts = [3, 2]

    def step(x, alg):
        return drawn("StatelessRandomUniformV2", "float32", [count_of(x), 3], alg=alg)

    outcome = same(step, [rows_like(counts, 2), np.int32(1)], counts)
    assert outcome.layouts == ["rows"] and not spans


@given(splits(), st.integers(1, 3), st.integers(0, 3))
@few
def test_draws_of_the_shape_of_a_tensor(counts, columns, seed):
    """Blocks of rows, rows with several elements, rows in another dimension."""
    x = rows_like(counts, columns)

    def step(x):
        both = tf.concat([x, x], 0)
        results = []
        for like in (x, both, tf.reshape(x, [-1]), tf.transpose(x), x[:, None]):
            for draw in (tf.random.stateless_normal, tf.random.stateless_uniform):
                results.append(like * draw(tf.shape(like), [seed, 2]))
                results.append(draw(tf.shape(like), [3, seed]) + like)
        return results

    same(step, [x], counts)


@given(splits(), st.integers(1, 3), st.integers(1, 3))
@few
def test_draws_of_a_multiple_of_the_rows(counts, times, columns):
    x = rows_like(counts, columns)

    def step(x):
        n = count_of(x)
        noise = tf.random.stateless_normal([times * n, columns], [1, 2])
        tiled = tf.tile(x, [times, 1])
        pairs = tf.random.stateless_uniform([n, n], [1, 2])
        return noise, tiled + noise, noise + tiled, tf.reduce_sum(noise, 0), pairs

    outcome = check(step, [x], counts)
    if times == 1:
        assert outcome.layouts == ["rows", "rows", "rows", "partial", "rows"]


@given(splits(), st.integers(1, 3))
@few
def test_draws_of_a_fixed_number_of_rows(counts, columns):
    total = sum(counts)
    x = rows_like(counts, columns)

    def step(x):
        noise = tf.random.stateless_normal([total, columns], [1, 2])
        double = tf.random.stateless_normal([2 * total, columns], [1, 2])
        return x + noise, noise, tf.concat([x, x], 0) * double

    outcome = same(step, [x], counts, rows=total)
    assert outcome.layouts[:2] == ["rows", "rows"]


@given(splits(), st.integers(0, 3))
@few
def test_draws_without_rows_are_replicated(counts, seed):
    def step(x):
        weights = tf.random.stateless_normal([4, 3], [seed, 2])
        key = tf.random.stateless_uniform([2], [seed, 1], None, None, tf.int32)
        single = tf.random.stateless_uniform([], key)
        return weights, single, tf.random.experimental.stateless_split([seed, 1], 3)

    outcome = same(step, [rows_like(counts, 2)], counts)
    assert set(outcome.layouts) == {"replicated"}


@given(splits())
@few
def test_a_seed_of_the_batch(counts):
    """A sum over rows as a seed is exchanged; the first row is not known to be whole."""

    def step(x):
        summed = tf.cast(tf.reduce_sum(tf.round(x), 0), tf.int32)
        return tf.random.stateless_uniform([count_of(x), 3], summed)

    outcome = same(step, [rows_like(counts, 2)], counts)
    assert outcome.layouts == ["rows"]


@given(splits())
@few
def test_draws_with_a_seed_of_the_first_version(counts):
    x, seed = rows_like(counts, 3), [1, 2]

    def step(x):
        shape, raw = tf.shape(x), tf.raw_ops
        return (
            raw.StatelessRandomUniform(shape=shape, seed=seed),
            raw.StatelessRandomNormal(shape=shape, seed=seed),
            raw.StatelessTruncatedNormal(shape=shape, seed=seed),
            raw.StatelessRandomUniformInt(shape=shape, seed=seed, minval=0, maxval=9),
            raw.StatelessRandomUniformFullInt(shape=shape, seed=seed),
            tf.random.stateless_parameterized_truncated_normal(shape, seed),
            tf.random.stateless_binomial(shape, seed, [9.0, 30.0, 2.0], [0.2, 0.5, 0.9]),
            tf.random.stateless_poisson(shape, seed, [0.5, 3.0, 20.0]),
            tf.random.stateless_gamma(shape, seed, [0.5, 1.0, 2.0]),
            tf.random.stateless_gamma(shape, seed, 0.5),
        )

    outcome = same(step, [x], counts)
    assert set(outcome.layouts) == {"rows"} and outcome.exchanges == 0


# --- Draws with parameters that have rows.


@given(splits(), st.integers(1, 3), st.integers(0, 2))
@few
def test_parameters_with_rows_stay_where_they_are(counts, columns, samples):
    x = np.abs(rows_like(counts, columns)) * 9 + 0.1
    more = [samples + 1] * (samples > 0)

    def step(x):
        shape = tf.concat([tf.constant(more, tf.int32), tf.shape(x)], 0)
        chance = tf.sigmoid(x - 5)
        seed = [1, 2]
        return (
            tf.random.stateless_gamma(shape, seed, x),
            tf.random.stateless_poisson(shape, seed, x),
            tf.random.stateless_binomial(shape, seed, x, chance),
            tf.random.stateless_binomial(shape, seed, 20.0, chance[:, :1]),
        )

    outcome = same(step, [x], counts)
    assert set(outcome.layouts) == {"rows"} and outcome.exchanges == 0


def test_large_draws_with_parameters():
    counts = [300, 200, 1]
    x = np.abs(rows_like(counts, 70)) * 9 + 0.1

    def step(x):
        shape, seed = tf.shape(x), [1, 2]
        return (
            tf.random.stateless_gamma(shape, seed, x),
            tf.random.stateless_poisson(shape, seed, x),
            tf.random.stateless_binomial(shape, seed, x, tf.sigmoid(x - 5)),
            tf.random.stateless_categorical(x, 33, seed),
        )

    same(step, [x], counts)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gamma_of_each_dtype(dtype, spans):
    counts = [5, 0, 3]
    x = np.abs(rows_like(counts, 3)) * 3

    def step(x):
        alpha = tf.cast(x, dtype)
        single = tf.constant(0.7, dtype)
        return [
            bits(tf.random.stateless_gamma(tf.shape(x), [1, 2], a, dtype=dtype))
            for a in (alpha, single)
        ]

    same(step, [x], counts)
    assert len(spans) == 2


@given(splits(), st.integers(1, 4), st.integers(0, 5))
@few
def test_categorical_of_rows(counts, classes, samples):
    x = rows_like(counts, classes)

    def step(x):
        return (
            tf.random.stateless_categorical(x, samples, [1, 2]),
            tf.random.stateless_categorical(tf.reshape(x, [-1, 1]), samples, [1, 2]),
        )

    outcome = same(step, [x], counts)
    assert outcome.layouts == ["rows", "rows"] and outcome.exchanges == 0


@given(splits())
@few
def test_categorical_of_blocks_of_rows_falls_back(counts):
    x = rows_like(counts, 3)

    def step(x):
        return tf.random.stateless_categorical(tf.concat([x, x], 0), 2, [1, 2])

    same(step, [x], counts, falls_back=True)


@given(splits())
@few
def test_a_shuffle(counts):
    x = rows_like(counts, 3)

    def step(x):
        shuffle = tf.random.experimental.stateless_shuffle
        return shuffle(x, [1, 2]), shuffle(tf.transpose(x), [1, 2])

    outcome = same(step, [x], counts, falls_back=True)
    assert outcome.layouts == ["rows", "rows"]
    assert outcome.fallen == ["StatelessShuffle"]
