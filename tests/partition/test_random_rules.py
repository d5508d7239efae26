"""Random draws on several replicas are those of one device, bit for bit."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import examples, pick
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import by_rows, check, compiled_step, partitioned, splits

from distfit.partition.rules import random

few = settings(deadline=None, max_examples=examples(3, 6))
slow = settings(deadline=None, max_examples=examples(2, 5))  # Large graphs.

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


def drawn(name, dtype, shape, counter=(5, 7), alg=3, key=(99,)):
    dtype = tf.as_dtype(dtype)
    key = tf.convert_to_tensor(key, tf.uint64)
    counter = counter if tf.is_tensor(counter) else np.array(counter, np.uint64)
    given = dict(shape=shape, key=key, counter=counter, alg=alg)
    operation = getattr(tf.raw_ops, name)
    if name == "StatelessRandomUniformIntV2":
        low, high = tf.constant(-3, dtype), tf.constant(1000, dtype)
        return bits(operation(**given, minval=low, maxval=high))
    return bits(operation(**given, dtype=dtype))


def same(function, arrays, counts, **options):
    """Bit for bit, so the one device computes a graph as well."""
    return check(function, arrays, counts, eagerly=False, rtol=0, atol=0, **options)


@pytest.mark.parametrize("name,dtype", DRAWS)
@given(splits(), st.integers(1, 5), st.sampled_from([1, 3]))
@slow
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
    found = []
    stock = random._in_spans

    def recorded(*given, **more):
        found.append(1)
        return stock(*given, **more)

    monkeypatch.setattr(random, "_in_spans", recorded)
    return found


def test_a_replica_draws_its_own_rows_alone(spans):
    counts = [3, 2]
    same(lambda x: drawn(*DRAWS[2], [count_of(x), 3]), [rows_like(counts, 2)], counts)
    assert spans


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
@slow
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
@slow
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
    if total not in (1, columns):  # Else the size does not identify the rows.
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


@by_rows(few)
def test_a_seed_of_the_batch(counts):
    """A sum over rows, as a seed, is exchanged."""

    def step(x):
        summed = tf.cast(tf.reduce_sum(tf.round(x), 0), tf.int32)
        return tf.random.stateless_uniform([count_of(x), 3], summed)

    outcome = same(step, [rows_like(counts, 2)], counts)
    assert outcome.layouts == ["rows"]


@by_rows(few)
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
            tf.random.stateless_binomial(
                shape, seed, [9.0, 30.0, 2.0], [0.2, 0.5, 0.9]
            ),
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
            tf.random.stateless_binomial(shape, seed, 20.0, chance),
        )

    outcome = same(step, [x], counts)
    if not more:  # Outputs stay cut only by their first dimension.
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
    assert outcome.layouts[0] == "rows"


@by_rows(few)
def test_categorical_of_blocks_of_rows_falls_back(counts):
    x = rows_like(counts, 3)

    def step(x):
        return tf.random.stateless_categorical(tf.concat([x, x], 0), 2, [1, 2])

    same(step, [x], counts, falls_back=True)


@by_rows(few)
def test_a_shuffle(counts):
    """All rows of the batch are available; those of computed tensors are not."""
    x, shuffle = rows_like(counts, 3), tf.random.experimental.stateless_shuffle
    outcome = same(lambda x: shuffle(x, [1, 2]), [x], counts)
    assert outcome.layouts == ["rows"]
    same(lambda x: shuffle(tf.transpose(x), [1, 2]), [x], counts)
    outcome = same(lambda x: shuffle(x * 2, [1, 2]), [x], counts, falls_back=True)
    assert outcome.fallen == ["StatelessShuffle"]


# --- Draws with a state.


@by_rows(few)
def test_seeded_draws_with_a_state(counts):
    x = np.abs(rows_like(counts, 3)) + 0.5

    def step(x):
        shape, short = tf.shape(x), [count_of(x)]
        return (
            tf.random.normal(shape, seed=1),
            tf.random.uniform(shape, seed=2) * x,
            tf.random.uniform(short, 0, 9, tf.int32, seed=3),
            tf.random.truncated_normal(shape, seed=4),
            tf.random.gamma(short, [0.5, 2.0], seed=5),
            tf.random.poisson(short, [0.5, 20.0], seed=6),
            tf.nn.dropout(x, 0.5, seed=7),
        )

    outcome = same(step, [x], counts)
    assert set(outcome.layouts) == {"rows"}


@by_rows(few)
def test_seeded_draws_of_rows_need_them_whole(counts):
    x = rows_like(counts, 3)

    def step(x):
        x = tf.abs(x) + 0.5
        return (
            tf.random.categorical(x, 4, seed=1),
            tf.random.shuffle(x, seed=2),
            tf.random.poisson([2], x, seed=3),
        )

    outcome = same(step, [x], counts, falls_back=True)
    assert outcome.layouts == ["rows", "rows", "replicated"]


@by_rows(few)
def test_draws_without_rows_keep_their_state(counts):
    def step(x):
        a = tf.random.normal([3], seed=1)
        b = tf.random.normal([3], seed=1)
        return a, b, tf.random.uniform([], seed=2)

    same(step, [rows_like(counts, 2)], counts)


def test_an_unseeded_draw_is_the_same_for_all():
    """And does not change NumPy's generator, on which the user's data may depend."""

    def step(x):
        noise = tf.raw_ops.RandomStandardNormal(shape=[4], dtype=tf.float32)
        rows = tf.raw_ops.RandomUniform(shape=[count_of(x)], dtype=tf.float32)
        # Each replica has its own copy of the noise.
        total = tf.reduce_sum(x * 0 + noise[:1]) / tf.cast(tf.size(x), tf.float32)
        return total, noise, rows

    before = np.random.get_state()[1].copy()
    outcomes = [partitioned(step, [rows_like([3, 2], 2)], [3, 2]) for _ in range(2)]
    (total, noise, rows), again = (o.results for o in outcomes)
    np.testing.assert_allclose(total, noise[0], rtol=1e-5)
    assert len(set(rows)) == 5
    assert not np.array_equal(noise, again[1])
    np.testing.assert_array_equal(before, np.random.get_state()[1])


# --- Generators.


def of_generator(generator, x):
    shape = tf.shape(x)
    return (
        generator.normal(shape),
        generator.uniform(shape),
        generator.truncated_normal([3]),
        generator.uniform([count_of(x)], 0, 9, tf.int32),
        generator.uniform_full_int(shape, tf.uint32),
        generator.binomial(shape, [9.0, 30.0, 2.0], [0.2, 0.5, 0.9]),
        generator.make_seeds(2),
        generator.normal([2]),
    )


@by_rows(slow)
def test_a_generator_outside_of_the_scope(counts):
    generator = tf.random.Generator.from_seed(1)

    def step(x):
        generator.reset_from_seed(1)
        generator.skip(3)
        return of_generator(generator, x)

    outcome = same(step, [rows_like(counts, 3)], counts)
    assert outcome.layouts[0] == "rows"


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_generator_of_the_scope(replicas):
    """Copies of its state stay alike, and the stream is that of one device."""
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    with strategy.scope():
        generator = tf.random.Generator.from_seed(1)
    alone = tf.random.Generator.from_seed(1)
    x = rows_like([5], 3)
    expected = [list(of_generator(alone, tf.constant(x))) for _ in range(3)]

    run = compiled_step(lambda x: of_generator(generator, x), x, strategy)
    for want in expected:
        for got, value in zip(run(), want, strict=True):
            np.testing.assert_array_equal(got, value)
    for copy in generator.state.values:
        np.testing.assert_array_equal(copy, alone.state)
    assert "skip" not in vars(generator)
    with strategy.scope():  # The generator's own methods are restored.
        assert len(strategy.experimental_local_results(generator.skip(1))) == replicas


# --- Keras.


def noise_layers():
    layers = keras.layers
    return [
        layers.Dropout(0.4, seed=1),
        layers.Dropout(0.4, noise_shape=(None, 1, 2), seed=2),
        layers.GaussianNoise(0.5, seed=3),
        layers.GaussianDropout(0.4, seed=4),
        layers.AlphaDropout(0.4, seed=5),
        layers.SpatialDropout1D(0.4, seed=6),
    ]


@by_rows(slow)
def test_layers_that_draw(counts):
    layers = noise_layers()
    states = [(layer.seed_generator.state, i + 1) for i, layer in enumerate(layers)]
    for layer in layers:
        layer.build((None, 3, 2))

    def step(x):
        for state, seed in states:
            state.assign([seed, 0])
        return [layer(x, training=True) for layer in layers]

    outcome = same(step, [rows_like(counts, 3, 2)], counts)
    assert set(outcome.layouts) == {"rows"}


@pytest.mark.parametrize("kind", ["int", "generator"])
@by_rows(slow)
def test_draws_of_keras(kind, counts):
    draws = keras.random
    generator = keras.random.SeedGenerator(7)

    def step(x):
        generator.state.assign([7, 0])
        seed = 7 if kind == "int" else generator
        shape = keras.ops.shape(x)
        return (
            draws.normal(shape, seed=seed),
            draws.uniform(tf.shape(x), seed=seed) + x,
            draws.randint(shape, 0, 9, seed=seed),
            draws.truncated_normal(shape, seed=seed),
            draws.gamma(shape, 0.4, seed=seed),
            draws.beta(shape, 0.4, 0.7, seed=seed),
            draws.binomial(shape, 9.0, 0.4, seed=seed),
            draws.dropout(x, 0.4, seed=seed),
            draws.categorical(x, 4, seed=seed),
            draws.normal((4,), seed=seed),
        )

    outcome = same(step, [rows_like(counts, 3)], counts)
    assert outcome.layouts == ["rows"] * 9 + ["replicated"]


@by_rows(few)
def test_a_shuffle_of_keras(counts):
    step = lambda x: keras.random.shuffle(x * 2, seed=3)  # noqa: E731
    same(step, [rows_like(counts, 3)], counts, falls_back=None)


# --- In loops, branches, and compiled by XLA.


@by_rows(slow)
def test_draws_in_loops_and_branches(counts):
    x = rows_like(counts, 3)

    def step(x):
        def body(i, total):
            noise = tf.random.stateless_normal(tf.shape(x), [i, 2])
            return i + 1, total + noise * x + tf.random.normal([3], seed=1)

        _, total = tf.while_loop(lambda i, _: i < 3, body, [0, x])
        return total, tf.cond(
            tf.reduce_sum(x) > 0,
            lambda: tf.random.stateless_uniform([count_of(x), 3], [1, 2]),
            lambda: tf.random.stateless_uniform([count_of(x), 3], [2, 2]),
        )

    check(step, [x], counts, eagerly=False)


# By default numbers of 16 and of 64 bits.
@pytest.mark.parametrize("name,dtype", pick(DRAWS[5::6], DRAWS[2::3]))
def test_a_draw_that_xla_compiles(name, dtype):
    """XLA draws other numbers than the kernels, in another order."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
    x = rows_like([7], 2)

    def step(x, key, counter):
        shapes = [[count_of(x), n] for n in (5, 2, 1)]
        return [drawn(name, dtype, shape, counter, key=key) for shape in shapes]

    key, counter = np.array([99], np.uint64), np.array([5, 7], np.uint64)
    variables = [tf.Variable(key), tf.Variable(counter)]
    one = tf.function(step, autograph=False, jit_compile=True)
    run = compiled_step(lambda x: step(x, *variables), x, strategy, jit=True)
    for got, want in zip(run(), one(x, key, counter), strict=True):
        np.testing.assert_array_equal(got, want)
