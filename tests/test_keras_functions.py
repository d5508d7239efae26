"""Losses, metrics, optimizers, random numbers, activations and reductions of Keras.

Each in training steps: replicas give the numbers of one device.
`python -m pytest tests/test_keras_functions.py -s -k "table"` prints what fell back,
after the others have run in the same process.
"""

import functools
from collections.abc import Callable

import keras
import numpy as np
import pytest
import steps
import tensorflow as tf
from breadth import pick
from keras import layers, ops

from distfit.training.driver import StepDriver
from distfit.training.shares import Layout

ROWS = 18  # Enough for three steps.
SIZES = (7, 5, 6)


def _numbers(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(ROWS, *shape)).astype("float32")


def _integers(limit: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, limit, (ROWS, *shape), "int32")


X = _numbers(4)
WEIGHTS = np.random.default_rng(3).uniform(0.1, 2.0, ROWS).astype("float32")
SIGNS = np.sign(_numbers(3, seed=2))
CLASSES = _integers(3)
ONE_HOT = np.eye(3, dtype="float32")[CLASSES]
POSITIVE = np.abs(_numbers(3, seed=2)) + 0.1

# What falls back, and why.
_ORDER = "the order of all rows is needed"
_PLACE = "the index of a row among all rows is needed"
_UP_TO = "each row depends on those before it"
_SPARSE = "finds out which rows of a table a sparse gradient has"
FALLS_BACK: dict[str, str] = {
    **dict.fromkeys(("ops.sort", "ops.argsort", "ops.median"), _ORDER),
    **dict.fromkeys(("ops.quantile", "ops.percentile"), _ORDER),
    **dict.fromkeys(("ops.prod", "ops.nanprod"), "its gradient: " + _UP_TO),
    **dict.fromkeys(("ops.argmax", "ops.argmin"), _PLACE),
    **dict.fromkeys(("ops.nanargmax", "ops.nanargmin"), _PLACE),
    **dict.fromkeys(("ops.cumsum", "ops.cumprod"), _UP_TO),
    **dict.fromkeys(("ops.nancumsum", "ops.nancumprod"), _UP_TO),
    **dict.fromkeys(("optimizer Adadelta", "optimizer Adafactor"), _SPARSE),
    **dict.fromkeys(("optimizer Adagrad", "optimizer RMSprop"), _SPARSE),
    **dict.fromkeys(("optimizer ScheduleFreeAdamW", "optimizer centered"), _SPARSE),
    "optimizer LossScaleOptimizer": _SPARSE,
}

_fallen: dict[str, list[str]] = {}


def _assert_same(make_strategy, name: str, build: Callable, arrays, sizes=SIZES[:2]):
    batches = steps.batches_of(arrays, sizes)
    fallen = steps.assert_same(make_strategy, build, batches)
    _fallen[name] = fallen
    assert bool(fallen) == (name in FALLS_BACK), fallen


def _classes_of(module, base: type) -> set[str]:
    things = [v for v in vars(module).values() if isinstance(v, type)]
    return {t.__name__ for t in things if issubclass(t, base) and t is not base}


def _functions_of(module) -> set[str]:
    found = {n for n, v in vars(module).items() if callable(v) and n[0].islower()}
    return found - {"get", "serialize", "deserialize"}


# --- Losses.

LOSSES = {
    **dict.fromkeys(
        ("BinaryCrossentropy", "BinaryFocalCrossentropy", "Tversky", "Dice"),
        ("sigmoid", ONE_HOT),
    ),
    **dict.fromkeys(
        ("CategoricalCrossentropy", "CategoricalFocalCrossentropy", "KLDivergence"),
        ("softmax", ONE_HOT),
    ),
    **dict.fromkeys(("Hinge", "SquaredHinge"), ("tanh", SIGNS)),
    "CategoricalHinge": ("softmax", ONE_HOT),
    "CategoricalGeneralizedCrossEntropy": ("softmax", CLASSES),
    "SparseCategoricalCrossentropy": ("softmax", CLASSES),
    "Circle": (lambda z: ops.normalize(z), CLASSES),
    **dict.fromkeys(
        ("MeanSquaredError", "MeanAbsoluteError", "Huber", "LogCosh"), (None, POSITIVE)
    ),
    "CosineSimilarity": (None, POSITIVE),
    **dict.fromkeys(
        ("MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Poisson"),
        ("softplus", POSITIVE),
    ),
}
_OF_ALL_ROWS = {"Dice", "Tversky", "CTC"}  # They take no sample weights.


# Like these, but for a function of each element.
_OF_ELEMENTS = {
    *("Hinge", "MeanAbsoluteError", "MeanAbsolutePercentageError", "LogCosh"),
    *("MeanSquaredLogarithmicError", "Poisson", "BinaryFocalCrossentropy"),
}
_FEW_LOSSES = [name for name in LOSSES if name not in _OF_ELEMENTS]


@pytest.mark.parametrize("name", pick(_FEW_LOSSES, list(LOSSES)))
def test_loss(make_strategy, name):
    activation, y = LOSSES[name]

    def build():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation)])
        model.compile("sgd", getattr(keras.losses, name)())
        return model

    data = (X, y) if name in _OF_ALL_ROWS else (X, y, WEIGHTS)
    _assert_same(make_strategy, name, build, data)


def test_loss_ctc(make_strategy):
    def build():
        model = keras.Sequential(
            [keras.Input((6, 3)), layers.Dense(4, activation="softmax")]
        )
        model.compile("sgd", keras.losses.CTC())
        return model

    _assert_same(make_strategy, "CTC", build, (_numbers(6, 3), 1 + _integers(3, 2)))


def test_all_losses_are_here():
    assert _classes_of(keras.losses, keras.losses.Loss) == {*LOSSES, "CTC"}


# --- Metrics.


def _many(*names: str, **options) -> dict:
    def make(name):
        return getattr(keras.metrics, name)(name=name.lower(), **options)

    return {name: functools.partial(make, name) for name in names}


BINARY = {
    **_many("Accuracy", "AUC", "BinaryAccuracy", "BinaryCrossentropy", "Precision"),
    **_many("Recall", "FalseNegatives", "FalsePositives", "TrueNegatives"),
    **_many("TruePositives", "BinaryIoU"),
    **_many("PrecisionAtRecall", recall=0.5),
    **_many("RecallAtPrecision", precision=0.5),
    **_many("SensitivityAtSpecificity", specificity=0.5),
    **_many("SpecificityAtSensitivity", sensitivity=0.5),
}
CATEGORICAL = {
    **_many("CategoricalAccuracy", "CategoricalCrossentropy", "CategoricalHinge"),
    **_many("KLDivergence", "F1Score", "FBetaScore"),
    **_many("TopKCategoricalAccuracy", k=2),
    **_many("OneHotIoU", num_classes=3, target_class_ids=[0, 2]),
    **_many("OneHotMeanIoU", num_classes=3),
}
SPARSE = {
    **_many("SparseCategoricalAccuracy", "SparseCategoricalCrossentropy"),
    **_many("SparseTopKCategoricalAccuracy", k=2),
    **_many("IoU", num_classes=3, target_class_ids=[0], sparse_y_pred=False),
    **_many("MeanIoU", num_classes=3, sparse_y_pred=False),
}
REGRESSION = {
    **_many("MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredError"),
    **_many("MeanSquaredLogarithmicError", "RootMeanSquaredError", "LogCoshError"),
    **_many("Poisson", "CosineSimilarity", "R2Score", "PearsonCorrelation"),
    **_many("ConcordanceCorrelation"),
}
SIGNED = _many("Hinge", "SquaredHinge")
METRICS = {
    "binary": (BINARY, "sigmoid", ONE_HOT),
    "categorical": (CATEGORICAL, "softmax", ONE_HOT),
    "sparse": (SPARSE, "softmax", CLASSES),
    "regression": (REGRESSION, "softplus", POSITIVE),
    "signed": (SIGNED, "tanh", SIGNS),
}
# Keras makes weights integers; BinaryIoU takes one for each element.
_UNWEIGHTED = {"BinaryIoU", "IoU", "MeanIoU", "OneHotIoU", "OneHotMeanIoU"}


# Without weights by default those that take none.
@pytest.mark.parametrize(
    "kind, weighted",
    [
        *((kind, True) for kind in METRICS),
        *((kind, False) for kind in pick(["categorical"], list(METRICS))),
    ],
)
def test_metrics(make_strategy, kind, weighted):
    makers, activation, y = METRICS[kind]

    def build():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation)])
        left_out = _UNWEIGHTED if weighted else ()
        metrics = [make() for name, make in makers.items() if name not in left_out]
        given = {"weighted_metrics" if weighted else "metrics": metrics}
        model.compile("sgd", "mse" if y.ndim > 1 else None, **given)
        if y.ndim == 1:
            model.compile("sgd", "sparse_categorical_crossentropy", **given)
        return model

    data = (X, y, WEIGHTS) if weighted else (X, y)
    name = f"metrics: {kind}{', weighted' if weighted else ''}"
    _assert_same(make_strategy, name, build, data)


class Tracking(keras.Model):
    """Feeds metrics of plain values by hand."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)
        self.mean, self.sum = keras.metrics.Mean("mean"), keras.metrics.Sum("sum")
        self.wrapper = keras.metrics.MeanMetricWrapper(
            lambda y, p: ops.mean(ops.abs(y - p), axis=-1), name="wrapper"
        )

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            errors = tf.square(y - self.dense(x))
            loss = tf.reduce_mean(errors)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        self.mean.update_state(errors)
        self.mean.update_state(loss, sample_weight=3.0)
        self.sum.update_state(errors)
        self.wrapper.update_state(y, self.dense(x))
        return {m.name: m.result() for m in self.metrics}


def test_metrics_of_values(make_strategy):
    def build():
        model = Tracking()
        model.compile("sgd")
        return model

    _assert_same(make_strategy, "metrics: of values", build, (X, POSITIVE))


def test_all_metrics_are_here():
    here = {name for makers, *_ in METRICS.values() for name in makers}
    by_hand = {"Mean", "Sum", "MeanMetricWrapper"}
    assert _classes_of(keras.metrics, keras.metrics.Metric) == here | by_hand


# --- Optimizers: three steps, with a sparse gradient of an embedding.

RATE = {"learning_rate": 0.01}
OPTIMIZERS = {
    **{
        name: lambda name=name: getattr(keras.optimizers, name)(**RATE)
        for name in (
            *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl"),
            *("Lamb", "Lion", "Muon", "Nadam", "RMSprop", "SGD", "ScheduleFreeAdamW"),
        )
    },
    "LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=8.0
    ),
}
VARIANTS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "centered": lambda: keras.optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    "clipnorm": lambda: keras.optimizers.Adam(0.01, clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.05),
    "weight_decay": lambda: keras.optimizers.SGD(0.1, weight_decay=0.1),
    "average": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    ),
}
_ABSTRACT = {"MultiOptimizer", "OptimizerMap"}


# The others equal one device in test_optimizers.py, which trains by `fit`.
# Others are like one of these in what they do with gradients and slots.
FEW = ["Adafactor", "Adam", "Lamb", "Muon", "ScheduleFreeAdamW"]


@pytest.mark.parametrize("name", pick(FEW, [*OPTIMIZERS, *VARIANTS]))
def test_optimizer(make_strategy, name):
    def build():
        model = keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                layers.Embedding(8, 4),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        model.compile({**OPTIMIZERS, **VARIANTS}[name](), "mse")
        # Built in a step, ScheduleFreeAdamW loses its initial values in Keras.
        model.optimizer.build(model.trainable_variables)
        return model

    data = (_integers(6, 5), POSITIVE)
    _assert_same(make_strategy, f"optimizer {name}", build, data, SIZES)


def test_values_that_an_optimizer_is_built_with_reach_all_replicas(make_strategy):
    with make_strategy(3).scope():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        model.compile(keras.optimizers.ScheduleFreeAdamW(0.01), "mse")
    StepDriver(model, model.train_step, Layout(steps.spec_of((X, POSITIVE))), False)
    for moment, weight in zip(
        model.optimizer._momentums, model.trainable_variables, strict=True
    ):
        for copy in make_strategy(3).experimental_local_results(moment.value):
            np.testing.assert_array_equal(copy, weight)


def test_all_optimizers_are_here():
    found = _classes_of(keras.optimizers, keras.optimizers.Optimizer)
    assert found - _ABSTRACT == set(OPTIMIZERS)


# --- Functions of a batch that weights have scaled.


class Computing(keras.Model):
    """Trains a scale of its inputs by the outputs of a function.

    Args:
        function: Takes the model and a batch, returns tensors.
        shape: The shape of a row.
    """

    def __init__(self, function: Callable, shape: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.scale = self.add_weight(shape=shape, initializer="ones", name="scale")
        self.seeds = keras.random.SeedGenerator(3)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self.function(self, x * self.scale)
            numbers = [self.weighted(output, y) for output in outputs]
            loss = tf.add_n(numbers)
        gradient = tape.gradient(loss, self.scale.value)
        if gradient is not None:
            self.optimizer.apply([gradient], [self.scale])
        return {f"raw_{i}": number for i, number in enumerate(numbers)}

    def weighted(self, output, y):
        """A mean with different weights of rows."""
        output = tf.cast(output, tf.float32)
        if output.shape.rank and output.shape[0] == y.shape[0]:  # None in a graph.
            ones = [1] * (output.shape.rank - 1)
            output = output * tf.reshape(y, [-1, *ones])
        elif output.shape.rank:
            count = float(output.shape[0])
            output = tf.tensordot(tf.range(count), output, 1)
        return tf.reduce_mean(output)


def _assert_computes(make_strategy, name: str, function: Callable, x=X):
    def build():
        model = Computing(function, x.shape[1:])
        model.compile(keras.optimizers.SGD(0.1))
        return model

    _assert_same(make_strategy, name, build, (x, WEIGHTS))


def test_activations(make_strategy):
    names = sorted(_functions_of(keras.activations))
    arguments = {"threshold": (0.1, 0.0)}

    def function(model, x):
        return [
            getattr(keras.activations, name)(x, *arguments.get(name, ()))
            for name in names
        ]

    assert {"relu", "softmax", "gelu", "glu"} <= set(names)
    _assert_computes(make_strategy, "activations", function)


RANDOM = {
    "beta": lambda seed, n: keras.random.beta((n, 3), 0.5, 2.0, seed=seed),
    "binomial": lambda seed, n: keras.random.binomial((n, 3), 9.0, 0.3, seed=seed),
    "gamma": lambda seed, n: keras.random.gamma((n, 3), 0.7, seed=seed),
    "normal": lambda seed, n: keras.random.normal((n, 3), seed=seed),
    "randint": lambda seed, n: keras.random.randint((n, 3), 0, 9, seed=seed),
    "truncated_normal": lambda seed, n: keras.random.truncated_normal(
        (n, 3), seed=seed
    ),
    "uniform": lambda seed, n: keras.random.uniform((n, 3), seed=seed),
}
OF_ROWS = {
    "categorical": lambda seed, x: keras.random.categorical(x, 5, seed=seed),
    "dropout": lambda seed, x: keras.random.dropout(x, 0.4, seed=seed),
    "shuffle": lambda seed, x: keras.random.shuffle(x, seed=seed),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers(make_strategy, name):
    def function(model, x):
        drawn = RANDOM[name](model.seeds, ops.shape(x)[0])
        first = RANDOM[name](model.seeds, 2)
        return [tf.cast(drawn, tf.float32) * x[:, :3], first]

    _assert_computes(make_strategy, f"random {name}", function)


@pytest.mark.parametrize("name", OF_ROWS)
def test_random_of_rows(make_strategy, name):
    def function(model, x):
        return [OF_ROWS[name](model.seeds, x)]

    _assert_computes(make_strategy, f"random {name}", function)


def test_all_random_functions_are_here():
    assert _functions_of(keras.random) == {*RANDOM, *OF_ROWS}


# The last stands for those within rows.
_AXES = pick([None, 0, (0, 2), -1], [None, 0, 1, (0, 2), -1])


def _along_axes(name: str, axes=tuple(_AXES), **options) -> Callable:
    def function(model, x):
        reduce = getattr(ops, name)
        return [reduce(x, axis=axis, **options) for axis in axes]

    return function


_ONE_AXIS = {"axes": (0, 1, -1)}
REDUCTIONS = {
    **{
        name: _along_axes(name)
        for name in (
            *("sum", "mean", "prod", "max", "min", "amax", "amin", "std", "var"),
            *("logsumexp", "count_nonzero", "nansum", "nanmean", "nanmax", "nanmin"),
            *("nanprod", "nanstd", "nanvar", "ptp"),
        )
    },
    **{
        name: _along_axes(name, **_ONE_AXIS)
        for name in (
            *("argmax", "argmin", "nanargmax", "nanargmin", "cumsum", "cumprod"),
            *("nancumsum", "nancumprod", "sort", "argsort", "median"),
        )
    },
    "any": lambda model, x: [ops.any(x > 2.0, axis=a) for a in (None, 0, 1)],
    "all": lambda model, x: [ops.all(x > -2.0, axis=a) for a in (None, 0, 1)],
    "average": lambda model, x: [
        ops.average(x, axis=1),
        tf.ensure_shape(
            ops.average(x, axis=2, weights=tf.constant([0.2, 0.8])), [None, 3]
        ),
        ops.average(x, axis=0),
    ],
    "moments": lambda model, x: [*ops.moments(x, axes=[0]), *ops.moments(x, axes=[1])],
    "norm": lambda model, x: [ops.norm(x, axis=a) for a in (0, 1, (1, 2), (0, 2))],
    "quantile": lambda model, x: [ops.quantile(x, 0.3, axis=a) for a in (0, 1)],
    "percentile": lambda model, x: [ops.percentile(x, 30, axis=a) for a in (0, 1)],
    "segment_sum": lambda model, x: [ops.segment_sum(x, _segments(x), 3)],
    "segment_max": lambda model, x: [ops.segment_max(x, _segments(x), 3)],
    "segment_min": lambda model, x: [ops.segment_min(x, _segments(x), 3)],
    "segment_prod": lambda model, x: [ops.segment_prod(x, _segments(x), 3)],
    "bincount": lambda model, x: [
        tf.ensure_shape(tf.math.bincount(_segments(x), minlength=3, maxlength=3), [3])
    ],
    "trapezoid": lambda model, x: [ops.trapezoid(x, axis=1)],
    "top_k": lambda model, x: [*ops.top_k(x, 2)],
    "tensordot": lambda model, x: [
        ops.tensordot(x, x, axes=[[0], [0]]),
        ops.tensordot(x, x, axes=[[1, 2], [1, 2]])[:, :1],
    ],
}


def _segments(x):
    """The segment of each row: every third row has the same."""
    return ops.arange(ops.shape(x)[0]) % 3


# Each has a twin that is the same to a rule, such as "sum", "quantile" or "nanstd".
_TWINS = {
    *("amax", "amin", "min", "argmin", "argsort", "var", "percentile", "segment_min"),
    *("cumprod", "nancumsum", "nancumprod", "nanargmax", "nanargmin"),
    *("nansum", "nanmean", "nanmax", "nanmin", "nanprod", "nanvar", "std"),
    *("any", "average", "ptp", "segment_prod", "max", "prod", "count_nonzero"),
}
_FEW_REDUCTIONS = [name for name in REDUCTIONS if name not in _TWINS]


@pytest.mark.parametrize("name", pick(_FEW_REDUCTIONS, list(REDUCTIONS)))
def test_reduction(make_strategy, name):
    function = REDUCTIONS[name]
    _assert_computes(make_strategy, f"ops.{name}", function, _numbers(3, 2))


def test_table_of_what_fell_back():
    for name, fallen in _fallen.items():
        if fallen:
            print(f"{name:45} {', '.join(fallen)}: {FALLS_BACK.get(name)}")
