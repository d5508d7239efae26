"""The cases that the tests of tf_keras check, on N replicas and against one device.

tf_keras (https://github.com/keras-team/tf-keras, Apache 2.0, by the TensorFlow authors)
compares a strategy with one device in `tf_keras/distribute/`: the tests of correctness
for DNN, image, RNN, embedding and custom training loop models, and those of strategies,
metrics, optimizers and utilities. The same is checked here, in code of our own
and for Keras 3: the reference is a plain `keras.Model` without a strategy, or a number
worked out by hand, and partial batches get no wider tolerance than any other.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit

REPLICAS = pick([3], [2, 3, 4])


@pytest.fixture(autouse=True)
def clean_session():
    """Unlike elsewhere, models and their compiled steps are kept."""
    keras.utils.set_random_seed(0)


@pytest.fixture(params=REPLICAS)
def strategy(request, make_strategy):
    return make_strategy(request.param)


def scope_of(strategy):
    return strategy.scope() if strategy else contextlib.nullcontext()


def bases(strategy):
    """The classes that models derive from, with and without a strategy."""
    library = distfit if strategy else keras
    return library.Model, library.Sequential


@contextlib.contextmanager
def computing_in(policy):
    keras.config.set_dtype_policy(policy)
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_floatx("float32")


# --- Whole flows: load weights, fit, evaluate, predict, and all of it again.


@dataclasses.dataclass
class Case:
    """A model, `rows -> (x, y)`, and the number of replicas to try.

    The last batch of 16 rows has `rows % 16` rows: 1, or 12 where rows are normalized,
    since normalizing leaves nothing of one row, and mostly rounding of few.
    """

    build: Callable
    data: Callable
    replicas: int
    rows: int = 49


def numbers(rows):
    x = np.random.default_rng(rows).uniform(size=(rows, 1)).astype("float32")
    return x, 3 * x


def dense_layers():
    penalty = keras.regularizers.L2(1e-4)
    return [
        layers.Dense(10, activation="relu"),
        layers.Dense(10, activation="relu", kernel_regularizer=penalty),
        layers.Dense(10, activation="relu"),
        layers.Dense(1),
    ]


def sequential(model, sequential):
    return sequential([keras.Input((1,)), *dense_layers()])


def functional(model, sequential):
    inputs = keras.Input((1,))
    x = inputs
    for layer in dense_layers():
        x = layer(x)
    return model(inputs, x)


def subclassed(model, sequential):
    class Subclassed(model):
        def __init__(self):
            super().__init__()
            self.parts = dense_layers()

        def call(self, x):
            for layer in self.parts:
                x = layer(x)
            return x

    made = Subclassed()
    made(keras.KerasTensor((None, 1)))
    return made


def images(rows):
    generator = np.random.default_rng(rows)
    centers = np.random.default_rng(1).normal(size=(10, 12, 12, 3))
    kinds = generator.integers(0, 10, rows)
    noise = generator.normal(scale=0.1, size=(rows, 12, 12, 3))
    return (centers[kinds] + noise).astype("float32"), kinds[:, None]


def cnn(normalize):
    def build(model, sequential):
        image = keras.Input((12, 12, 3))
        penalty = keras.regularizers.L2(1e-4)
        x = layers.Conv2D(4, 3, strides=2, kernel_regularizer=penalty)(image)
        x = normalize(x)
        x = layers.Flatten()(layers.MaxPooling2D()(x))
        return model(image, layers.Dense(10, activation="softmax")(x))

    return build


def two_normalizations(x):
    """Side by side: both need an exchange."""
    return layers.Add()([layers.BatchNormalization()(x) for _ in range(2)])


def words(rows):
    generator = np.random.default_rng(rows)
    kinds = generator.integers(0, 2, (rows, 1))
    tokens = generator.integers(1, 11, (rows, 6)) + 8 * kinds
    lengths = generator.integers(3, 7, (rows, 1))
    return np.where(np.arange(6) >= 6 - lengths, tokens, 0), kinds


def text(encode):
    def build(model, sequential):
        tokens = keras.Input((6,), dtype="int32")
        encoded = encode(layers.Embedding(20, 5)(tokens))
        return model(tokens, layers.Dense(2, activation="softmax")(encoded))

    return build


def time_distributed(x):
    return layers.GlobalAveragePooling1D()(layers.TimeDistributed(layers.Dense(4))(x))


def pairs(rows):
    tokens, kinds = words(2 * rows)
    same = np.where(kinds[:rows] == kinds[rows:], 1.0, -1.0)
    return {"words_b": tokens[rows:], "words_a": tokens[:rows]}, same


def siamese(model, sequential):
    inputs = [keras.Input((6,), dtype="int32", name=f"words_{n}") for n in "ab"]
    initializer = keras.initializers.RandomUniform(0, 1, seed=2)
    embedding = layers.Embedding(20, 5, embeddings_initializer=initializer)
    rows = [layers.GlobalAveragePooling1D()(embedding(x)) for x in inputs]
    return model(inputs, layers.Dot(axes=1, normalize=True)(rows))


def named(rows):
    x, y = comparing.regression_data(rows, features=6)
    kinds = (x[:, :1] > 0).astype("float32")
    return {"z_first": x[:, :2], "a_second": x[:, 2:]}, {"sum": y, "sign": kinds}


def several(model, sequential):
    """Inputs whose order is not that of their names, a shared layer, two outputs."""
    sizes = {"z_first": 2, "a_second": 4}
    inputs = {name: keras.Input((size,), name=name) for name, size in sizes.items()}
    hidden = [layers.Dense(3)(x) for x in inputs.values()]
    shared = layers.Dense(3, activation="tanh")
    joined = layers.Add()([shared(x) for x in hidden])
    sign = layers.Dense(1, activation="sigmoid")(joined)
    return model(inputs, {"sum": layers.Dense(1)(joined), "sign": sign})


CASES = {
    "sequential": Case(sequential, numbers, 2),
    "functional": Case(functional, numbers, 2),
    "subclassed": Case(subclassed, numbers, 3),
    "cnn": Case(cnn(lambda x: x), images, 4),
    "normalized cnn": Case(
        cnn(lambda x: layers.BatchNormalization()(x)), images, 3, rows=44
    ),
    "twice normalized cnn": Case(cnn(two_normalizations), images, 2, rows=44),
    "gru": Case(text(lambda x: layers.GRU(4)(x)), words, 3),
    "lstm": Case(text(lambda x: layers.LSTM(4)(x)), words, 2),
    "embedding": Case(text(lambda x: layers.GlobalAveragePooling1D()(x)), words, 4),
    "time distributed": Case(text(time_distributed), words, 3),
    "siamese": Case(siamese, pairs, 2),
    "several inputs and outputs": Case(several, named, 4),
}
RATE = 0.05
LOSSES: dict = {
    numbers: ("mse", ["mse"]),
    images: ("sparse_categorical_crossentropy", ["sparse_categorical_accuracy"]),
    words: ("sparse_categorical_crossentropy", ["sparse_categorical_accuracy"]),
    pairs: ("mse", ["mse"]),
    named: (
        {"sum": "mse", "sign": "binary_crossentropy"},
        {"sum": ["mae"], "sign": ["accuracy"]},
    ),
}
# Data, and whether each epoch validates, or evaluation comes afterwards.
FLOWS = [
    ("arrays", True),
    ("arrays", False),
    ("dataset", True),
    ("repeated", False),
    ("full batches", True),
]


@functools.cache
def compiled(strategy, name):
    """The model of a case, with the initial weights of another model."""
    case = CASES[name]
    loss, metrics = LOSSES[case.data]
    keras.utils.set_random_seed(11)
    initial = case.build(keras.Model, keras.Sequential).get_weights()
    with scope_of(strategy):
        model = case.build(*bases(strategy))
        model.compile(keras.optimizers.SGD(RATE), loss, metrics=metrics)
        model.optimizer.build(model.trainable_variables)
    return model, initial


def as_inputs(kind, data, steps):
    """Batches of 16 rows as arguments; `steps` names that of the number of steps."""
    if kind == "arrays":
        return {"x": data[0], "y": data[1], "batch_size": 16}
    dataset = tf.data.Dataset.from_tensor_slices(data)
    if kind == "repeated":
        # Batched after repeating: batches span epochs, and only one is partial.
        dataset = dataset.repeat(2).batch(16)
        rows = len(tf.nest.flatten(data)[0])
        return {"x": dataset, steps: rows // 16}
    return {"x": dataset.batch(16, drop_remainder=kind == "full batches")}


def run_flow(strategy, name, kind, validates):
    """Trains twice, at two learning rates; returns the results after each."""
    case = CASES[name]
    model, initial = compiled(strategy, name)
    model.set_weights(initial)
    model.optimizer.iterations.assign(0)
    train, test = case.data(case.rows), case.data(33)
    fit = as_inputs(kind, train, "steps_per_epoch") | {"shuffle": False, "verbose": 0}
    evaluate = as_inputs(kind, test, "steps") | {"verbose": 0}
    if validates:
        validation = (test[0], test[1]) if kind == "arrays" else evaluate["x"]
        fit |= {"validation_data": validation}
    runs = []
    for rate in (RATE, RATE / 2):
        model.optimizer.learning_rate = rate
        history = model.fit(epochs=2, **fit).history
        logs = None if validates else model.evaluate(return_dict=True, **evaluate)
        predicted = model.predict(case.data(10)[0], verbose=0)
        predicted = np.concatenate(tf.nest.flatten(predicted), axis=1)
        runs.append(comparing.Run(history, model.get_weights(), logs, predicted))
    if strategy:
        comparing.check_replicas_agree(strategy, model)
    return runs, int(model.optimizer.iterations)


one_device = functools.cache(functools.partial(run_flow, None))


def assert_flow_as_on_one_device(strategy, name, kind, validates):
    expected, steps = one_device(name, kind, validates)
    found, found_steps = run_flow(strategy, name, kind, validates)
    assert steps == found_steps > 0
    for one, many in zip(expected, found, strict=True):
        comparing.assert_same(one, many)
    assert not np.allclose(expected[0].weights[0], expected[1].weights[0], atol=1e-4)


@pytest.mark.parametrize("replicas", REPLICAS)
@pytest.mark.parametrize("kind, validates", pick(FLOWS[2:4], FLOWS))
def test_dense_model(make_strategy, kind, validates, replicas):
    strategy = make_strategy(replicas)
    assert_flow_as_on_one_device(strategy, "sequential", kind, validates)


# Those without a twin: a normalized cnn convolves, too, siamese words are embedded,
# test_lstm_in_mixed_precision goes through words one by one, and the layers of a
# subclassed model are those of a functional one.
FEW = ["several inputs and outputs"]


@pytest.mark.parametrize("name", pick(FEW, list(CASES)[1:]))
def test_model(make_strategy, name):
    strategy = make_strategy(CASES[name].replicas)
    flows = [("dataset", True), ("arrays", False)]
    for kind, validates in pick(flows[:1], flows):
        assert_flow_as_on_one_device(strategy, name, kind, validates)


# --- Numbers that are worked out by hand.

X = np.array([[0], [1], [2], [3]], "float32")
Y = np.array([[2], [4], [6], [8]], "float32")


def ones_model(strategy, loss="mse", rate=0.0, **compiled):
    """`y = x`."""
    with scope_of(strategy):
        model = bases(strategy)[1](
            [keras.Input((1,)), layers.Dense(1, kernel_initializer="ones")]
        )
        model.compile(keras.optimizers.SGD(rate), loss, **compiled)
    return model


def test_sample_weights(strategy):
    """(4 / 4 + 9 / 2) / 2 and (3 * 16 / 4 + 25) / 2 for two rows each: 10.625."""
    weights = np.array([0.25, 0.5, 0.75, 1], "float32")
    model = ones_model(strategy)
    arguments = {"batch_size": 2, "verbose": 0}
    assert model.evaluate(X, Y, sample_weight=weights, **arguments) == 10.625
    assert model.evaluate(X, Y, **arguments) == 13.5
    for data, expected in (((X, Y, weights), 10.625), ((X, Y), 13.5)):
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(2)
        assert model.evaluate(dataset, verbose=0) == expected


def test_accuracy_of_a_model_that_is_right_or_wrong(strategy):
    x = np.random.default_rng(0).integers(0, 2, (64, 1)).astype("float32")
    model = ones_model(strategy, metrics=["binary_accuracy"])
    data = tf.data.Dataset.from_tensor_slices((x, x)).repeat().batch(5)
    history = model.fit(data, epochs=2, steps_per_epoch=10, verbose=0).history
    assert history["binary_accuracy"] == [1.0, 1.0]
    wrong = tf.data.Dataset.from_tensor_slices((x, 1 - x)).repeat().batch(5)
    assert model.evaluate(data, steps=10, verbose=0) == [0.0, 1.0]
    assert model.evaluate(wrong, steps=10, verbose=0) == [1.0, 0.0]


def test_loss_of_a_model_that_does_not_learn(strategy):
    """|0 - 1| + |1 - 1| + ... + |7 - 1| over 8 rows: 2.75, before and after."""
    with strategy.scope():
        dense = layers.Dense(1, kernel_initializer="zeros", bias_initializer="ones")
        model = distfit.Sequential([keras.Input((3,)), dense])
        model.compile(keras.optimizers.SGD(0.0), "mae", metrics=["mse"])
    targets = np.arange(8, dtype="float32")[:, None]
    data = tf.data.Dataset.from_tensor_slices((np.ones((8, 3)), targets)).batch(4)
    assert model.evaluate(data, verbose=0) == [2.75, 11.5]
    assert model.fit(data, verbose=0).history == {"loss": [2.75], "mse": [11.5]}
    assert model.evaluate(data, verbose=0) == [2.75, 11.5]


class AddsVariable(layers.Layer):
    """`x + v`, where the penalty of v is v."""

    def build(self, shape):
        self.v = self.add_weight(
            shape=(), initializer="ones", regularizer=lambda v: tf.identity(v)
        )

    def call(self, x):
        return x + self.v


def test_regularizer_counts_once(strategy):
    """The loss is x + v + v, its gradient 2, and v goes from 1 to -1."""
    with strategy.scope():
        model = distfit.Sequential([keras.Input((1,)), AddsVariable()])
        model.compile(keras.optimizers.SGD(1.0), lambda y, p: tf.reduce_mean(p))
    for rows in (1, 2, 5):
        model.set_weights([np.array(1.0)])
        ones = np.ones((rows, 1), "float32")
        logs = model.fit(ones, ones, batch_size=rows, verbose=0).history
        assert logs["loss"] == pytest.approx([3.0], rel=1e-6)
        assert model.get_weights() == pytest.approx([-1.0], rel=1e-6)


class Difference(layers.Layer):
    """`3 v1 - 3 v2`, for each row."""

    def build(self, shape):
        self.v1 = self.add_weight(shape=(), initializer="ones")
        self.v2 = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return 3 * self.v1 * x - 3 * self.v2 * x


class OnesForGradients(keras.optimizers.SGD):
    """Replaces the gradients, before the update."""

    def apply(self, grads, trainable_variables=None):
        return super().apply([tf.ones_like(g) for g in grads], trainable_variables)


@pytest.mark.parametrize(
    "make_optimizer, expected",
    [
        # The gradients of |0 - 1| are -3 and 3.
        (lambda: keras.optimizers.SGD(1.0), [4.0, -2.0]),
        (lambda: keras.optimizers.SGD(1.0, clipvalue=2.0), [3.0, -1.0]),
        (lambda: keras.optimizers.SGD(1.0, clipnorm=2.0), [3.0, -1.0]),
        (lambda: OnesForGradients(1.0), [0.0, 0.0]),
    ],
    ids=["plain", "clipvalue", "clipnorm", "custom"],
)
def test_gradients_are_changed_after_they_are_summed(
    strategy, make_optimizer, expected
):
    with strategy.scope():
        model = distfit.Sequential([keras.Input((1,)), Difference()])
        model.compile(make_optimizer(), "mae")
    ones = np.ones((10, 1), "float32")
    model.fit(ones, ones, batch_size=10, verbose=0)
    np.testing.assert_allclose(model.get_weights(), expected, rtol=1e-6)


def test_masked_rows_have_no_loss(strategy):
    """The row that is wrong is masked: the second, alone on its replica."""
    x, y = np.array([[[1], [1]], [[0], [0]]], "float32"), np.ones((2, 2, 1), "float32")
    with strategy.scope():
        model = distfit.Sequential(
            [
                keras.Input((2, 1)),
                layers.Masking(0.0),
                layers.TimeDistributed(layers.Dense(1, kernel_initializer="ones")),
            ]
        )
        model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat(100).batch(10)
    assert model.fit(data, steps_per_epoch=2, verbose=0).history["loss"] == [0.0]


def test_moving_statistics_are_those_of_the_whole_batch(strategy):
    x = np.random.default_rng(0).normal(5.0, 10.0, (50, 3, 4)).astype("float32")
    with strategy.scope():
        normalize = layers.BatchNormalization(momentum=0.0)
        model = distfit.Sequential([keras.Input((3, 4)), normalize])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, x, batch_size=50, verbose=0)
    np.testing.assert_allclose(normalize.moving_mean.numpy(), x.mean((0, 1)), 1e-5)
    np.testing.assert_allclose(normalize.moving_variance.numpy(), x.var((0, 1)), 1e-5)
    predicted = model.predict(x, verbose=0)
    np.testing.assert_allclose(predicted.mean((0, 1)), np.zeros(4), atol=1e-3)
    np.testing.assert_allclose(predicted.std((0, 1)), np.ones(4), atol=1e-3)


METRICS = {
    # Negatives have scores 0.1 and 0.7, positives 0.3 and 0.9.
    "Precision": ({}, 1 / 2),
    "Recall": ({}, 1 / 2),
    "TruePositives": ({}, 1.0),
    "SensitivityAtSpecificity": ({"specificity": 0.9}, 1 / 2),  # Above 0.7.
    "SpecificityAtSensitivity": ({"sensitivity": 0.9}, 1 / 2),  # Below 0.3.
    "PrecisionAtRecall": ({"recall": 0.9}, 2 / 3),
    "RecallAtPrecision": ({"precision": 0.9}, 1 / 2),
    "AUC": ({}, 3 / 4),  # Of four pairs, one is in the wrong order.
    "MeanAbsoluteError": ({}, 0.4),
    "RootMeanSquaredError": ({}, 0.5),
}


def test_metrics_of_classification(make_strategy):
    """They differ on each replica: only sums over all rows give these."""
    strategy = make_strategy(3)
    scores = np.array([[0.1], [0.7], [0.3], [0.9]], "float32")
    labels = np.array([[0], [0], [1], [1]], "float32")
    with strategy.scope():
        made = [
            getattr(keras.metrics, name)(name=name, **arguments)
            for name, (arguments, _) in METRICS.items()
        ]
    model = ones_model(strategy, metrics=made)
    for batch_size in (4, 3):
        logs = model.evaluate(
            scores, labels, batch_size=batch_size, verbose=0, return_dict=True
        )
        for name, (_, expected) in METRICS.items():
            assert logs[name] == pytest.approx(expected, rel=1e-5), name


class Averages(distfit.Model):
    """Updates metrics with rows, weighted rows and a number."""

    def __init__(self):
        super().__init__()
        names = ("rows", "weighted", "number", "outside")
        self.means = {name: keras.metrics.Mean(name=name) for name in names}

    @property
    def metrics(self):
        return list(self.means.values())

    def train_step(self, data):
        rows = tf.cast(data, tf.float32)
        self.means["rows"].update_state(rows)
        self.means["weighted"].update_state(rows, 0.1 * tf.ones_like(rows))
        self.means["number"].update_state(tf.constant(5.0))
        return {name: self.means[name].result() for name in ("rows", "number")}


def test_metrics_of_a_step_of_ones_own(strategy):
    """The mean of 0 to 9 is 4.5, in batches of 2 or 3 rows, and outside a step."""
    with strategy.scope():
        model = Averages()
        model.compile()
    for batch_size in (2, 3):
        data = tf.data.Dataset.range(10).batch(batch_size)
        logs = model.fit(data, verbose=0).history
        assert logs == {"rows": [4.5], "number": [5.0]}
        assert float(model.means["weighted"].result()) == pytest.approx(4.5, rel=1e-6)
    with strategy.scope():
        for number in range(10):
            model.means["outside"].update_state(number)
    assert float(model.means["outside"].result()) == 4.5


def test_dropout_is_on_in_training_alone(strategy):
    with strategy.scope():
        dense = layers.Dense(1, kernel_initializer="ones")
        model = distfit.Sequential([keras.Input((1,)), dense, layers.Dropout(0.9999)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    ones = tf.data.Dataset.from_tensors((np.ones((8, 1)), np.ones((8, 1)))).repeat()
    assert model.fit(ones, steps_per_epoch=5, verbose=0).history["loss"] == [1.0]
    assert model.evaluate(ones, steps=5, verbose=0) == 0.0
    predicted = model.predict(ones.map(lambda x, y: x), steps=5, verbose=0)
    np.testing.assert_array_equal(predicted, np.ones((40, 1)))


# --- Steps and hooks.


class Counts(keras.callbacks.Callback):
    """Records the steps that executions begin and end with."""

    def __init__(self):
        super().__init__()
        self.begins: list = []
        self.ends: list = []

    def begin(self, batch, logs=None):
        self.begins.append(batch)

    def end(self, batch, logs=None):
        self.ends.append(batch)

    on_train_batch_begin = on_test_batch_begin = on_predict_batch_begin = begin
    on_train_batch_end = on_test_batch_end = on_predict_batch_end = end


@pytest.mark.parametrize("known", [True, False])
def test_hooks_of_fused_steps(make_strategy, known):
    """25 batches of 2 rows, whose number is known in advance or not."""
    model = ones_model(make_strategy(3))
    x = np.ones((50, 1), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x)).batch(2)
    if not known:
        data = data.filter(lambda x, y: True)
    endless, quiet = data.repeat(), {"verbose": 0}
    for fused, begins, ends in (
        (10, [0, 10, 20], [9, 19, 24]),
        (5, [0, 5, 10, 15, 20], [4, 9, 14, 19, 24]),
        (500, [0], [24]),
    ):
        model.steps_per_execution = fused
        for run, epochs in (
            (lambda c: model.fit(data, epochs=2, callbacks=c, **quiet), 2),
            (lambda c: model.fit(endless, steps_per_epoch=25, callbacks=c, **quiet), 1),
            (lambda c: model.evaluate(data, callbacks=c, **quiet), 1),
            (lambda c: model.predict(data, callbacks=c, **quiet), 1),
            (lambda c: model.predict(endless, steps=25, callbacks=c, **quiet), 1),
        ):
            counts = Counts()
            run([counts])
            assert counts.begins == epochs * begins and counts.ends == epochs * ends
    assert int(model.optimizer.iterations) == 3 * 3 * 25


def test_validation_between_epochs_equals_evaluation_by_hand(strategy):
    """Bit for bit."""
    data = tf.data.Dataset.from_tensor_slices(numbers(50)).batch(7)
    validation = tf.data.Dataset.from_tensor_slices(numbers(13)).batch(7)
    arguments = {"steps_per_epoch": 4, "verbose": 0}
    model = ones_model(strategy, rate=0.1, metrics=["mae"])
    history = model.fit(
        data, epochs=2, validation_data=validation, validation_steps=1, **arguments
    ).history
    model.set_weights([np.ones((1, 1)), np.zeros(1)])
    by_hand = []
    for half in (data.take(4), data.skip(4)):
        model.fit(half, **arguments)
        by_hand.append(model.evaluate(validation, steps=1, verbose=0))
    assert [list(values) for values in zip(*by_hand, strict=True)] == [
        history["val_loss"],
        history["val_mae"],
    ]


def test_data_of_unknown_length_are_like_any_other(strategy):
    x, y = numbers(50)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    unknown = data.filter(lambda x, y: True)
    found = []
    model = ones_model(strategy, rate=0.1)
    for inputs in (data, unknown):
        model.set_weights([np.ones((1, 1)), np.zeros(1)])
        history = model.fit(inputs, epochs=2, verbose=0).history
        evaluated = model.evaluate(inputs, verbose=0)
        found.append((history, evaluated, model.predict(inputs, verbose=0).tolist()))
    assert found[0] == found[1]
    repeated = model.predict(unknown.repeat(), steps=9, verbose=0)
    expected = found[1][2][:50] + found[1][2][:7]
    assert repeated.tolist() == expected


def test_too_few_batches_for_the_steps_asked_for(strategy):
    """A warning says so, and the existing batches count."""
    x, y = numbers(10)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    model = ones_model(strategy)
    complete = model.evaluate(data, verbose=0)
    for inputs in (data, data.filter(lambda x, y: True)):
        with pytest.warns(UserWarning, match="ran out of data"):
            assert model.evaluate(inputs, steps=9, verbose=0) == complete
        with pytest.warns(UserWarning, match="ran out of data"):
            assert len(model.predict(inputs, steps=9, verbose=0)) == 10


# --- Steps of one's own.


def custom_steps(base):
    class Custom(base):
        """A loss by hand with penalties, a metric beside the compiled one."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss_fn = keras.losses.MeanSquaredError(dtype="float64")
            self.error = keras.metrics.MeanAbsoluteError(name="error")
            self.total = keras.metrics.Mean(name="total")

        @property
        def metrics(self):
            return [self.error, self.total]

        def loss_of(self, data, training):
            x, y = data
            predicted = self(x, training=training)
            loss = self.loss_fn(y, predicted) + sum(self.losses)
            self.error.update_state(y, predicted)
            self.total.update_state(loss)
            return loss

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = self.loss_of(data, training=True)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(
                zip(gradients, self.trainable_variables, strict=True)
            )
            return {m.name: m.result() for m in self.metrics}

        def test_step(self, data):
            self.loss_of(data, training=False)
            return {m.name: m.result() for m in self.metrics}

    return Custom


LOOPS: dict = {
    "plain": {},
    "fused": {"steps_per_execution": 2},
    "eager": {"run_eagerly": True},
    "full batches": {"drop_remainder": True, "steps_per_execution": 2},
}


def run_loop(strategy, drop_remainder=False, **compiled):
    """66 rows in batches of 32, so that 2 are left: normalized in double precision."""
    x, y = (a.astype("float64") for a in numbers(66))
    data = tf.data.Dataset.from_tensor_slices((x, y))
    data = data.batch(32, drop_remainder=drop_remainder)

    def build():
        inputs = keras.Input((1,), dtype="float64")
        penalty = keras.regularizers.L2(1e-4)
        x = layers.Dense(6, activation="relu", kernel_regularizer=penalty)(inputs)
        x = layers.BatchNormalization()(x)
        x = layers.Dense(6, activation="relu")(x)
        model = custom_steps(bases(strategy)[0])(inputs, layers.Dense(1)(x))
        if strategy is None:
            compiled.pop("steps_per_execution", None)
        model.compile(keras.optimizers.Adagrad(0.02), **compiled)
        return model

    def evaluated(model):
        steps = 2 if drop_remainder else 3
        assert int(model.optimizer.iterations) == 2 * steps
        logs = model.evaluate(data, verbose=0, return_dict=True)
        return logs, model.predict(x[:5], verbose=0)

    with computing_in("float64"):
        return comparing.run(
            strategy or tf.distribute.get_strategy(),
            build,
            lambda model: model.fit(data, epochs=2, shuffle=False, verbose=0),
            evaluated,
        )


# Dense models train on full batches, too.
@pytest.mark.parametrize("name", pick(["fused"], list(LOOPS)))
def test_custom_loop(make_strategy, name):
    one, many = (run_loop(s, **LOOPS[name]) for s in (None, make_strategy(3)))
    comparing.assert_same(one, many)


def test_forward_pass_in_a_function_of_its_own(strategy):

    def train(strategy):
        model = ones_model(strategy, rate=0.1)
        model.call = tf.function(model.call)
        x, y = numbers(50)
        arguments = {"batch_size": 7, "epochs": 2, "shuffle": False, "verbose": 0}
        return model.fit(x, y, **arguments).history, model.get_weights()

    (one, one_weights), (many, many_weights) = train(None), train(strategy)
    comparing.assert_close_logs(one, many, 1e-5)
    for a, b in zip(one_weights, many_weights, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_checkpoint_continues_on_other_replicas(make_strategy, tmp_path):
    """`tf.train.Checkpoint` keeps weights, Adam's moments and the count of steps."""
    x, y = numbers(50)

    def made(replicas):
        strategy = replicas and make_strategy(replicas)
        keras.utils.set_random_seed(replicas)
        with scope_of(strategy):
            model = sequential(*bases(strategy))
            model.compile(keras.optimizers.Adam(0.02), "mse")
            model.optimizer.build(model.trainable_variables)
            checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        return model, checkpoint

    def fit(model):
        history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history
        return comparing.Run(history, model.get_weights())

    model, checkpoint = made(2)
    fit(model)
    path = checkpoint.save(str(tmp_path / "model"))
    expected = fit(model)
    for replicas in (0, 3):
        other, checkpoint = made(replicas)
        checkpoint.restore(path).assert_existing_objects_matched()
        comparing.assert_same(expected, fit(other))
        assert int(other.optimizer.iterations) == 8


# --- Layers that add losses and metrics.


class Penalizes(layers.Layer):
    """Adds a mean over rows as a loss, and tracks the mean."""

    def __init__(self, name, factor, of_row):
        super().__init__(name=name)
        self.factor = factor
        self.of_row = of_row
        self.mean = keras.metrics.Mean(name=name)

    def call(self, inputs):
        rows = self.of_row(inputs)
        self.add_loss(self.factor * tf.reduce_mean(rows))
        self.mean.update_state(rows)
        return inputs


def penalized(model, sequential):
    """A submodel that is applied to its inputs, to zeros and to ones."""
    part = keras.Sequential(
        [keras.Input((8,)), layers.Dense(6, activation="relu"), layers.Dense(4)]
    )
    inputs = keras.Input((8,))
    scores = part(inputs)
    zero = part(layers.Rescaling(0.0)(inputs))
    one = part(layers.Rescaling(0.0, offset=1.0)(inputs))

    def squares(difference):
        return tf.reduce_sum(tf.square(difference), -1)

    def sizes(difference):
        return tf.reduce_sum(tf.abs(difference), -1)

    l2 = Penalizes("l2", 0.1, squares)(layers.Subtract()([scores, zero]))
    l1 = Penalizes("l1", 0.01, sizes)(layers.Subtract()([scores, one]))
    used = layers.Rescaling(0.0)(layers.Add()([l1, l2]))
    return model(inputs, layers.Add()([scores, used]))


def run_penalized(strategy):
    x, y = comparing.regression_data(50)
    kinds = (y[:, 0] > 0).astype("int32") + 2 * (x[:, 0] > 0)
    losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def build():
        model = penalized(*bases(strategy))
        model.compile(
            keras.optimizers.Adam(0.01),
            losses,
            metrics=[
                keras.metrics.SparseCategoricalCrossentropy(
                    "entropy", from_logits=True
                ),
                "accuracy",
            ],
        )
        return model

    return comparing.run(
        strategy or tf.distribute.get_strategy(),
        build,
        lambda model: model.fit(
            x, kinds, batch_size=12, epochs=2, shuffle=False, verbose=0
        ),
        lambda model: (
            model.evaluate(x, kinds, batch_size=12, verbose=0, return_dict=True),
            model.predict(x, verbose=0),
        ),
    )


def test_losses_and_metrics_that_layers_add(make_strategy):
    one, many = (run_penalized(s) for s in (None, make_strategy(3)))
    comparing.assert_same(one, many)
    logs = many.evaluation
    assert {"entropy", "l1", "l2", "accuracy", "loss"} == set(logs)
    parts = logs["entropy"] + 0.1 * logs["l2"] + 0.01 * logs["l1"]
    assert logs["loss"] == pytest.approx(parts, rel=1e-6)


# --- Mixed precision and models of fixed size.


def test_lstm_in_mixed_precision(make_strategy):
    """Only sums of float16 differ: 11 bits, of gradients near 0.1."""
    tokens, kinds = words(48)

    def run(strategy):
        def build():
            model = text(lambda x: layers.LSTM(4)(x))(*bases(strategy))
            optimizer = keras.optimizers.SGD(0.1)
            model.compile(optimizer, "sparse_categorical_crossentropy")
            return model

        return comparing.run(
            strategy or tf.distribute.get_strategy(),
            build,
            lambda model: model.fit(
                tokens, kinds, batch_size=16, shuffle=False, verbose=0
            ),
        )

    with computing_in("mixed_float16"):
        comparing.assert_same(run(None), run(make_strategy(2)), 1e-3, 1e-3)


def test_inputs_with_a_fixed_batch_size(strategy):
    """Replicas have fewer rows each, and 10 is not divisible by 3 or 4."""
    x, y = comparing.regression_data(30)

    def run(strategy):
        keras.utils.set_random_seed(3)
        with scope_of(strategy):
            inputs = keras.Input((8,), batch_size=10)
            model = bases(strategy)[0](inputs, layers.Dense(1)(inputs))
            model.compile("sgd", "mse", metrics=["mae"])
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(10, True)
        history = model.fit(data, epochs=2, shuffle=False, verbose=0).history
        logs = model.evaluate(data, verbose=0, return_dict=True)
        predicted = model.predict(data, verbose=0)
        return comparing.Run(history, model.get_weights(), logs, predicted)

    comparing.assert_same(run(None), run(strategy))


def test_ragged_predictions(strategy):
    class ToRagged(layers.Layer):
        def call(self, x):
            return tf.RaggedTensor.from_tensor(x, padding=0)

    x = np.array([[1, 0, 0], [2, 3, 0], [4, 5, 6], [0, 0, 0], [7, 0, 8]], "float32")
    with strategy.scope():
        model = distfit.Sequential([ToRagged()])
    predicted = model.predict(x, batch_size=3, verbose=0)
    assert predicted.to_list() == [[1], [2, 3], [4, 5, 6], [], [7, 0, 8]]


def test_sparse_predictions(strategy):
    class ToSparse(layers.Layer):
        def call(self, x):
            return tf.sparse.from_dense(x)

    x = np.eye(5, dtype="float32")
    with strategy.scope():
        model = distfit.Sequential([ToSparse()])
    predicted = model.predict(x, batch_size=3, verbose=0)
    np.testing.assert_array_equal(tf.sparse.to_dense(predicted), x)
