"""Operations on elements, in every layout, on replicas with any number of rows."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import examples, pick
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rules import by_rows, check, splits

few = settings(deadline=None, max_examples=examples(2, 5))
# For tests in which every example holds all operations of a kind.
broad = settings(
    deadline=None, max_examples=examples(1, 2), phases=[Phase.explicit, Phase.generate]
)
RAW = tf.raw_ops

LAYOUTS = {
    "rows": lambda x: x,
    "rows of the last dimension": tf.transpose,
    "blocks": lambda x: tf.concat([x, x * 0.5], 0),
    "inner": lambda x: tf.reshape(x, [-1]),
    "partial": lambda x: tf.reduce_mean(x, 0),
    "replicated": lambda x: tf.constant([0.25, 0.5, 0.75]),
}

# For arguments between 0.1 and 0.9.
UNARY = {
    name: getattr(RAW, name)
    for name in (
        *("Abs", "Acos", "Asin", "Asinh", "Atan", "Atanh", "BesselI0e", "BesselI1e"),
        *("Ceil", "Cos", "Cosh", "Digamma", "Erf", "Erfc", "Erfinv", "Exp", "Expm1"),
        *("Floor", "Inv", "IsFinite", "IsInf", "IsNan", "Lgamma", "Log", "Log1p"),
        *("Ndtri", "Neg", "OnesLike", "Reciprocal", "Rint", "Round", "Rsqrt"),
        *("Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Tan", "Tanh"),
        *("ZerosLike", "BesselI0", "BesselI1", "BesselJ0", "BesselJ1", "BesselK0"),
        *("BesselK0e", "BesselK1", "BesselK1e", "BesselY0", "BesselY1", "Dawsn"),
        *("Expint", "FresnelCos", "FresnelSin", "Spence"),
    )
}
FEATURES = {
    name: getattr(RAW, name)
    for name in ("Elu", "LeakyRelu", "Relu", "Relu6", "Selu", "Softplus", "Softsign")
}
OTHER_UNARY = [
    lambda v: RAW.Acosh(x=v + 1.5),
    lambda v: tf.cast(v * 9, tf.int32),
    lambda v: tf.cast(v, tf.float16),
    lambda v: tf.identity(v) + tf.stop_gradient(v),
    lambda v: RAW.PreventGradient(input=v),
    lambda v: RAW.Snapshot(input=v),
    lambda v: tf.debugging.check_numerics(v, "not finite"),
    lambda v: tf.bitwise.invert(tf.cast(v * 9, tf.int32)),
    lambda v: RAW.PopulationCount(x=tf.cast(v * 9, tf.int32)),
    lambda v: tf.logical_not(v > 0.5),
    lambda v: tf.cast(tf.strings.length(tf.strings.as_string(v, 2)), tf.int32),
    lambda v: RAW.Bucketize(input=v, boundaries=[0.2, 0.5]),
    lambda v: tf.quantization.fake_quant_with_min_max_args(v, 0, 1),
]
NARY = {
    name: getattr(RAW, name)
    for name in (
        *("Add", "AddV2", "Atan2", "Div", "DivNoNan", "Equal", "FloorDiv", "FloorMod"),
        *("Greater", "GreaterEqual", "Igamma", "Igammac", "Less", "LessEqual"),
        *("Maximum", "Minimum", "Mul", "MulNoNan", "NotEqual", "Pow"),
        *("RealDiv", "SquaredDifference", "Sub", "Xdivy", "Xlog1py", "Xlogy"),
        *("IgammaGradA",),
    )
}
OTHER_NARY = [
    tf.math.nextafter,
    lambda a, b: tf.add_n([a + 0 * b, b + 0 * a, a + b]),
    lambda a, b: tf.clip_by_value(a + b, 0.3, 0.6),
    lambda a, b: tf.math.betainc(a + 0 * b, b + 0 * a, 0.5 + 0 * (a + b)),
    lambda a, b: tf.abs(tf.complex(a + 0 * b, b + 0 * a)),
    lambda a, b: tf.math.polygamma(tf.round(a) + 1 + 0 * b, b + 0 * a),
    lambda a, b: tf.math.zeta(a + 1.5, b),
    lambda a, b: tf.where(a > b, a, b),
    lambda a, b: tf.where(a > 0.5, b, 0.0),
    lambda a, b: tf.where(True, a, b),
    lambda a, b: tf.logical_and(a > 0.3, b > 0.4),
    lambda a, b: tf.logical_or(a > 0.3, b > 0.4),
    lambda a, b: tf.bitwise.bitwise_and(_int(a), _int(b)),
    lambda a, b: tf.bitwise.bitwise_or(_int(a), _int(b)),
    lambda a, b: tf.bitwise.bitwise_xor(_int(a), _int(b)),
    lambda a, b: tf.bitwise.left_shift(_int(a), _int(b) % 3),
    lambda a, b: tf.bitwise.right_shift(_int(a), _int(b) % 3),
    lambda a, b: RAW.Mod(x=_int(a), y=_int(b)),
    lambda a, b: tf.truncatediv(_int(a), _int(b)),
    lambda a, b: RAW.TruncateMod(x=_int(a), y=_int(b)),
    lambda a, b: RAW.ApproximateEqual(x=a + 0 * b, y=b + 0 * a, tolerance=0.2),
]
GRADIENTS = [
    tf.nn.elu,
    lambda v: 1 / v,
    tf.nn.leaky_relu,
    tf.nn.relu6,
    tf.nn.relu,
    tf.math.rsqrt,
    tf.nn.selu,
    tf.sigmoid,
    tf.nn.softplus,
    tf.nn.softsign,
    tf.sqrt,
    tf.tanh,
    tf.nn.gelu,
    lambda v: tf.raw_ops.Inv(x=v),
    lambda v: tf.quantization.fake_quant_with_min_max_args(v, 0, 1),
]


def _int(value):
    return tf.cast(value * 9, tf.int32) + 1


def batch(counts, *shape, seed=0):
    """Numbers between 0.1 and 0.9, for the rows of all replicas."""
    random = np.random.default_rng(seed)
    return random.uniform(0.1, 0.9, (sum(counts), *shape)).astype("float32")


@pytest.mark.parametrize("kind", LAYOUTS)
@by_rows(broad)
def test_unary_operations_equal_one_device(kind, counts):
    def every(x):
        value = LAYOUTS[kind](x)
        results = [operation(x=value) for operation in UNARY.values()]
        results += [operation(features=value) for operation in FEATURES.values()]
        if kind != "partial":  # The bits of a sum depend on the order of addition.
            results.append(tf.bitcast(value, tf.int32))
        return results + [operation(value) for operation in OTHER_UNARY]

    outcome = check(every, [batch(counts, 3)], counts)
    at_zero = list(UNARY).index("ZerosLike")
    assert outcome.layouts[at_zero] in ("rows", "replicated")


def gradient(function, *values):
    with tf.GradientTape() as tape:
        tape.watch(values)
        result = function(*values)
        loss = tf.reduce_sum(result * tf.cast(tf.cos(result), result.dtype))
    return tape.gradient(loss, values, unconnected_gradients="zero")


@pytest.mark.parametrize("kind", LAYOUTS)
@by_rows(broad)
def test_gradients_of_unary_operations_equal_one_device(kind, counts):
    def every(x):
        return [gradient(lambda x, f=f: f(LAYOUTS[kind](x)), x) for f in GRADIENTS]

    check(every, [batch(counts, 3)], counts)


# Pairs that broadcast, of a batch [rows, 3] and numbers of one row.
PAIRS = {
    "rows, rows": lambda x: (x, 1 - x),
    "rows, partial": lambda x: (x, tf.reduce_mean(x, 0)),
    "partial, rows": lambda x: (tf.reduce_mean(x, 0), x),
    "partial, partial": lambda x: (tf.reduce_mean(x, 0), tf.reduce_mean(1 - x, 0)),
    "partial, replicated": lambda x: (tf.reduce_mean(x, 0), tf.constant([[0.3]])),
    "replicated, partial": lambda x: (tf.constant(0.4), tf.reduce_mean(x, 0)),
    "rows, replicated": lambda x: (x, tf.constant([0.2, 0.4, 0.7])),
    "scalar, rows": lambda x: (tf.constant(0.6), tf.transpose(x)),
    "columns, rows": lambda x: (x[:, :1], x),
    "pairs": lambda x: (x[:, None], x[None]),
    "pairs of scalars": lambda x: (x[None, :, 0], x[:, None, 0]),
    "pairs, transposed": lambda x: (x[:, 0][:, None], tf.transpose(x)[:1]),
    "range, rows": lambda x: (x[:, 0], _range_of(x)),
    "blocks": lambda x: (tf.concat([x, 1 - x], 0), tf.tile(x, [2, 1])),
    "blocks, whole": lambda x: (tf.concat([x, 1 - x], 0), tf.reduce_max(x, 0)),
    "inner": lambda x: (tf.reshape(x, [-1]), tf.reshape(1 - x, [-1])),
    "inner, range": lambda x: (tf.reshape(x, [-1]), _range_of(tf.reshape(x, [-1]))),
}


def _range_of(value):
    size = tf.shape(value)[0]
    return (tf.cast(tf.range(size), tf.float32) + 1) / tf.cast(size + 1, tf.float32)


@pytest.mark.parametrize("kind", PAIRS)
@broad
@given(splits(4))
def test_nary_operations_equal_one_device(kind, counts):
    def every(x):
        a, b = PAIRS[kind](x)
        results = [op(x=a, y=b) for n, op in NARY.items() if n[:2] != "Ig"]
        results += [op(a=a, x=b) for n, op in NARY.items() if n[:2] == "Ig"]
        return results + [operation(a, b) for operation in OTHER_NARY]

    check(every, [batch(counts, 3)], counts)


@pytest.mark.parametrize("kind", PAIRS)
@broad
@given(splits(4))
def test_gradients_of_nary_operations_equal_one_device(kind, counts):
    functions = [
        *(tf.add, tf.divide, tf.pow, tf.maximum),
        *pick([], [tf.multiply, tf.atan2, tf.subtract]),
        *pick([], [tf.math.squared_difference, tf.math.divide_no_nan]),
        lambda a, b: tf.where(a > b, a * a, b),
        lambda a, b: tf.add_n([a + b, a * b]),
    ]

    def every(x):
        return [
            gradient(lambda x, f=f: f(*PAIRS[kind](x)), x)
            + gradient(f, *PAIRS[kind](x))
            for f in functions
        ]

    check(every, [batch(counts, 3)], counts)


LINEAR = [
    *(lambda t, scale: -t, lambda t, scale: t * scale, lambda t, scale: t / 3.0),
    *(lambda t, scale: tf.cast(t, tf.float64), lambda t, scale: t - 2 * t),
    *(lambda t, scale: tf.where(scale > 1.5, t, 1.0), lambda t, s: tf.add_n([t, t])),
    *(lambda t, scale: tf.math.real(tf.complex(t, t)), lambda t, scale: t[0] + 1.0),
    *(lambda t, scale: tf.stack([t, scale]), lambda t, scale: tf.concat([t, t], 0)),
    *(lambda t, scale: tf.pad(t, [[1, 0]]), lambda t, scale: tf.reduce_sum(t)),
    *(lambda t, scale: tf.reshape(t, [3, 1]), lambda t, scale: tf.tile(t, [2])),
    *(lambda t, scale: t[::-1], lambda t, scale: t * (1.0 / tf.cast(3, t.dtype))),
    *(lambda t, scale: tf.broadcast_to(t, [2, 3]), lambda t, scale: tf.cumsum(t)),
]


@pytest.mark.parametrize("place", range(len(LINEAR)))
def test_linear_operations_keep_a_sum_a_sum(place):
    scale = [1.0, 2.0, 3.0]
    function = lambda x: LINEAR[place](tf.reduce_sum(x, 0), tf.constant(scale))  # noqa: E731
    outcome = check(function, [batch([2, 3], 3)], [2, 3])
    assert outcome.layouts == ["partial"]
    assert outcome.exchanges == 0


@by_rows(few)
def test_a_sum_times_infinity(counts):
    """On a replica that has nothing to count, the part of the sum is zero."""
    infinite = tf.constant([np.inf, 1.0, -np.inf])

    def function(x):
        total = tf.reduce_sum(tf.cast(x > 0.7, tf.float32), 0)
        large = tf.exp(100.0 * tf.reduce_max(tf.abs(x)) + 100.0)
        return [
            *(total * infinite, total * tf.math.log([0.0, 0.5, 1.0]), total * large),
            *(tf.linalg.matvec(infinite[None], total), total / (1.0 / infinite)),
            tf.einsum("a,b->ab", total, infinite),
        ]

    check(function, [batch(counts, 3)], counts)


def test_the_mean_by_hand_is_a_sum():
    def function(x):
        count = tf.cast(tf.shape(x)[0], tf.float32)
        total = tf.reduce_sum(x, 0)
        return [total / count, total * (1.0 / count), total * count, -total * 0.5]

    outcome = check(function, [batch([2, 3], 3)], [2, 3])
    assert set(outcome.layouts) == {"partial"}
    assert outcome.exchanges == 0


@by_rows(few)
def test_sums_of_integers_are_not_split_where_that_changes_them(counts):
    numbers = np.random.default_rng(0).integers(-9, 9, (sum(counts), 3)).astype("int32")

    def function(x):
        total = tf.reduce_sum(x, 0)
        return [
            *(total // 2, total * 3, total % 5, tf.cast(total, tf.float32) / 7),
            *(total > 0, tf.truncatediv(total, 2), tf.cast(total, tf.int8)),
            *(total / 3, tf.reduce_mean(total), -total, tf.cast(total, tf.bool)),
        ]

    check(function, [numbers], counts)


def test_parts_beyond_the_range_of_a_smaller_dtype():
    x = np.array([[60000.0], [-60000.0], [60000.0], [-59999.0]], "float32")
    check(lambda x: tf.cast(tf.reduce_sum(x, 0), tf.float16), [x[[0, 2, 1, 3]]], [2, 2])


@by_rows(few)
def test_complex_numbers(counts):
    def function(x):
        z = tf.complex(x, 1 - x)
        total = tf.reduce_sum(z, 0)
        return [
            *(tf.math.real(z), tf.math.imag(total), tf.math.conj(total), tf.abs(z)),
            *(tf.math.angle(z), total / 2, tf.reduce_mean(z, 0), z * total, total * 1j),
        ]

    check(function, [batch(counts, 3)], counts)


@given(splits(), st.booleans())
@few
def test_compat_where(counts, by_row):
    def function(x):
        condition = x[:, 0] > 0.5 if by_row else x > 0.5
        return [
            RAW.Select(condition=condition, x=x, y=-x),
            RAW.Select(condition=True, x=x, y=-x),
        ]

    check(function, [batch(counts, 3)], counts)


@given(splits(), st.sampled_from(["NHWC", "NCHW"]))
@few
def test_bias_add_and_its_gradient(counts, data_format):
    x = batch(counts, 3, 2, 3)

    def function(x):
        bias = tf.constant([0.1, 0.2, 0.3])
        moved = tf.transpose(x, [2, 3, 0, 1])  # Rows beside the channels.
        add = lambda v, b: tf.nn.bias_add(v, b, data_format=data_format)  # noqa: E731
        results = [add(x, bias), gradient(add, x, bias)]
        return results + ([add(moved, bias)] if data_format == "NHWC" else [])

    check(function, [x], counts)


@by_rows(few)
def test_cross_entropies(counts):
    def function(x, labels):
        onehot = tf.one_hot(labels, 3)
        sparse = tf.nn.sparse_softmax_cross_entropy_with_logits
        weight = tf.reduce_mean(x, 0)
        return [
            tf.nn.softmax_cross_entropy_with_logits(onehot, x),
            sparse(labels, x),
            gradient(lambda x: tf.nn.softmax_cross_entropy_with_logits(onehot, x), x),
            gradient(lambda x: sparse(labels, x), x),
            # Every row has the same logits or labels.
            sparse(labels, tf.zeros_like(x) + weight),
            tf.nn.softmax_cross_entropy_with_logits(tf.zeros_like(x) + weight, x),
        ]

    labels = np.random.default_rng(1).integers(0, 3, sum(counts)).astype("int32")
    check(function, [batch(counts, 3), labels], counts)


@given(splits(), st.integers(1, 5))
@few
def test_a_size_that_equals_the_rows_by_chance(counts, size):
    """A constant with as many rows as the batch, or one, where rows are open."""
    total = sum(counts)

    def function(x):
        return [x + tf.ones([total, 3]), x * tf.ones([1, 3]), x - tf.zeros([total, 1])]

    check(function, [batch(counts, 3)], counts, falls_back=None)
    check(function, [batch(counts, 3)], counts, rows=total)


@pytest.mark.parametrize("counts", [[1, 0], [0, 1, 0], [0, 0, 1]])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_batch_of_one_row_broadcasts(counts, rows):
    def function(x):
        many = tf.reshape(tf.range(12.0), [4, 3])
        results = [
            *(x + many, x[:, None] - x[None], many * x, tf.where(x > 0.5, many, x)),
            tf.reduce_mean(x + many, 0),
        ]
        return results + [gradient(lambda x: x * many + x[:, None] * x[None], x)]

    outcome = check(function, [batch(counts, 3)], counts, falls_back=None, rows=rows)
    assert outcome.results[0].shape == (4, 3)


@given(splits(4))
@few
def test_features_as_many_as_rows(counts):
    n = sum(counts)
    for rows in (None, n):
        check(
            lambda x: [
                *(x + tf.transpose(x), x - tf.reduce_mean(x, 0), x * x[:, :1]),
                *(x - tf.reduce_mean(x, 1, keepdims=True), x + x[:, 0]),
                gradient(lambda x: x * tf.transpose(x) + x[:, 0] * x[0:, 1 - 1 : 1], x),
            ],
            [batch(counts, n)],
            counts,
            rows=rows,
            falls_back=None,  # Open rows are not known to equal n.
        )


@pytest.mark.parametrize(
    "name",
    [
        *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh"),
        *("leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu"),
        *(
            "relu6",
            "selu",
            "sigmoid",
            "silu",
            "softmax",
            "softplus",
            "softsign",
            "soft_shrink",
        ),
        *("hard_shrink", "squareplus", "sparse_plus", "tanh", "tanh_shrink", "glu"),
        *("sparse_sigmoid", "exponential", "threshold"),
    ],
)
def test_activations_of_keras_are_partitioned(name):
    activation = getattr(keras.activations, name)
    function = activation if name != "threshold" else lambda x: activation(x, 0.5, 0.1)
    x = batch([2, 0, 1], 4)
    outcome = check(lambda x: [function(x), gradient(function, x)], [x], [2, 0, 1])
    assert outcome.layouts[0] == "rows"
