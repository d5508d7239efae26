"""Non-trainable state is equal on all replicas, and BatchNormalization is global."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit

ROWS, BATCH = 44, 14  # Batches of 14, 14, 14 and 2 rows.


def _normalized(dtype="float32"):
    inputs = keras.Input((8,))
    x = layers.Dense(6, dtype=dtype)(inputs)
    x = layers.BatchNormalization(momentum=0.9, dtype=dtype)(x)
    x = layers.Activation("relu", dtype=dtype)(x)
    return distfit.Model(inputs, layers.Dense(1, dtype=dtype)(x))


def _fit(model, rows=ROWS):
    return model.fit(
        *comparing.regression_data(rows),
        batch_size=BATCH,
        epochs=3,
        shuffle=False,
        verbose=0,
    )


def _evaluated(model):
    x, y = comparing.regression_data(ROWS, seed=1)
    logs = model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True)
    return logs, model.predict(x, batch_size=BATCH, verbose=0)


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3, 4]))
@pytest.mark.parametrize(
    "dtype, rows", pick([("float32", 40)], [("float32", 40), ("float64", ROWS)])
)
def test_batch_normalization_equals_one_device(make_strategy, dtype, rows, replicas):
    """The last batch has 12 rows, or 2: fewer than there are 3 or 4 replicas.

    Two rows normalise to nearly +1 and -1, whatever they are, and the gradient is what
    remains of large numbers that cancel: only double precision shows that it is right.
    """

    def build():
        model = _normalized(dtype)
        loss = keras.losses.MeanSquaredError(dtype=dtype)
        model.compile(keras.optimizers.SGD(0.05), loss, metrics=["mae"])
        return model

    one, many = (
        comparing.run(make_strategy(n), build, lambda m: _fit(m, rows), _evaluated)
        for n in (1, replicas)
    )
    comparing.assert_same(one, many)


def test_masked_batch_normalization_equals_one_device(make_strategy):
    tokens = np.random.default_rng(0).integers(0, 5, (ROWS, 6))

    def build():
        inputs = keras.Input((6,), dtype="int32")
        x = layers.Embedding(5, 4, mask_zero=True)(inputs)
        x = layers.BatchNormalization()(x)
        x = layers.GlobalAveragePooling1D()(x)
        model = distfit.Model(inputs, layers.Dense(1)(x))
        model.compile(keras.optimizers.SGD(0.05), "mse")
        return model

    def fit(model):
        y = tokens.sum(axis=1).astype("float32") / 10
        return model.fit(tokens, y, batch_size=20, epochs=2, shuffle=False, verbose=0)

    one, many = (comparing.run(make_strategy(n), build, fit) for n in (1, 4))
    comparing.assert_same(one, many)


class Codebook(distfit.Model):
    """Keeps a moving mean of its rows, a counter, and the rows it has seen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        options = {"shape": (), "initializer": "zeros", "trainable": False}
        self.mean = self.add_weight(name="mean", **options)
        self.steps = self.add_weight(name="steps", dtype="int64", **options)
        self.seen = self.add_weight(name="seen", **options)

    def train_step(self, data):
        x, _ = data
        self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(x))
        self.steps.assign_add(1)
        rows = tf.cast(tf.shape(x)[0], tf.float32)
        self.seen.assign_add(rows)
        return super().train_step(data)


def _codebook():
    inputs = keras.Input((8,))
    model = Codebook(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3, 4]))
def test_state_from_rows_equals_one_device(make_strategy, replicas):
    one, many = (
        comparing.run(make_strategy(n), _codebook, _fit) for n in (1, replicas)
    )
    comparing.assert_same(one, many)


class RowCounter(layers.Layer):
    """Counts the rows that it sees."""

    def build(self, input_shape):
        self.rows = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="rows"
        )

    def call(self, inputs, training=False):
        if training:
            self.rows.assign(self.rows + tf.cast(tf.shape(inputs)[0], "float32"))
        return inputs


def test_state_computed_from_the_number_of_rows_is_one_device_s(make_strategy):
    strategy = make_strategy(2)
    with strategy.scope():
        inputs = keras.Input((8,))
        model = distfit.Model(inputs, layers.Dense(1)(RowCounter()(inputs)))
        model.compile("sgd", "mse")
    model.fit(*comparing.regression_data(5), batch_size=5, verbose=0)
    comparing.check_replicas_agree(strategy, model)
    assert model.layers[1].rows.numpy() == 5


class Counts(distfit.Model):
    """Counts what it sees in variables of every kind, and keeps the last rows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.whole = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.large = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self.queue = tf.Variable(tf.zeros((6, 8)), trainable=False)

    def train_step(self, data):
        x, y = data
        self.whole.assign_add(tf.shape(x, out_type=tf.int64)[0])
        self.large.assign_add(2000.0 * tf.cast(tf.shape(x)[0], tf.float64) + 1e-6)
        self.queue.assign(tf.concat([self.queue, x], 0)[-6:])
        return super().train_step(data)


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [1, 2, 3]))
def test_counts_are_exact_and_queues_hold_the_last_rows(make_strategy, replicas):
    with make_strategy(replicas).scope():
        inputs = keras.Input((8,))
        model = Counts(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
    _fit(model)
    assert int(model.whole.numpy()) == 3 * ROWS
    assert model.large.numpy() == pytest.approx(3 * ROWS * 2000 + 12e-6, abs=1e-8)
    expected = comparing.regression_data(ROWS)[0][-6:]
    np.testing.assert_array_equal(model.queue.numpy(), expected)


COUNTER = keras.Variable(0, dtype="int32", trainable=False)


def test_a_variable_made_outside_the_scope_is_counted_once(make_strategy):
    class CountsOutside(distfit.Model):
        def train_step(self, data):
            COUNTER.assign_add(tf.shape(data[0])[0])
            return super().train_step(data)

    COUNTER.assign(0)
    with make_strategy(3).scope():
        inputs = keras.Input((8,))
        model = CountsOutside(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
    _fit(model)
    assert int(COUNTER.numpy()) == 3 * ROWS


class SumsOfRoundedTerms(keras.Model):
    """Its variable gets a sum whose value depends on the order of the terms."""

    def __init__(self):
        super().__init__()
        self.terms = [
            self.add_weight(shape=(4,), initializer=keras.initializers.Constant(value))
            for value in (1e8, -1e8, 1.0)
        ]
        self.total = self.add_weight(shape=(4,), trainable=False)
        self.built = True

    def train_step(self, data):
        large, other, small = map(tf.convert_to_tensor, self.terms)
        total = large + (other + small)
        self.total.assign(total)
        return {"total": tf.reduce_sum(total), "read": total[0] + 1.0}


def test_replicas_add_in_the_order_that_the_step_has(make_strategy):
    """However TensorFlow orders sums, which may depend on what else reads them."""
    strategy = make_strategy(3)
    with strategy.scope():
        model = SumsOfRoundedTerms()
        model.compile()
    distfit.fit(model, np.zeros((6, 1), "float32"), batch_size=6, verbose=0)
    copies = strategy.experimental_local_results(model.total.value)
    assert [copy.numpy().tolist() for copy in copies] == [[0] * 4] * len(copies)


# Variables made in the first step: as with `tf.function`, the step is traced once more.


class AverageMadeInStep(keras.Model):
    """Keeps a moving average of its kernel, made when it is first needed."""

    average = None

    def train_step(self, data):
        logs = super().train_step(data)
        kernel = tf.convert_to_tensor(self.trainable_variables[0])
        if self.average is None:
            self.average = tf.Variable(0.5 * tf.ones(kernel.shape))
        else:
            self.average.assign(0.9 * self.average + 0.1 * kernel)
        return {**logs, "average": tf.reduce_sum(self.average)}


class ReadsSlots(keras.Model):
    """Reads the optimizer's slots before the update that makes them."""

    def train_step(self, data):
        x, y = data
        slots = [tf.reduce_sum(v) for v in self.optimizer.variables[2:]]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss, "slots": tf.add_n(slots) if slots else tf.constant(0.0)}


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [1, 2, 3]))
@pytest.mark.parametrize("Base", [AverageMadeInStep, ReadsSlots])
def test_what_the_first_step_makes_is_used_by_all(make_strategy, Base, replicas):
    x, y = comparing.regression_data(40)
    options = {"batch_size": 10, "epochs": 2, "shuffle": False, "verbose": 0}

    def build():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8,))
        model = Base(inputs, layers.Dense(1)(inputs))
        model.compile(keras.optimizers.Adam(0.1), "mse")
        return model

    one = build()
    expected = one.fit(x, y, **options).history
    with make_strategy(replicas).scope():
        many = build()
    comparing.assert_close_logs(
        expected, distfit.fit(many, x, y, **options).history, 1e-5
    )
    if Base is AverageMadeInStep:
        assert np.abs(one.average.numpy()).sum() > 0.1
        np.testing.assert_allclose(many.average.numpy(), one.average.numpy(), 1e-5)


def _assert_refused(Base, strategy, match):
    with strategy.scope():
        inputs = keras.Input((8,))
        model = Base(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=match):
        distfit.fit(model, *comparing.regression_data(8), verbose=0)


class MakesVariablesAgain(keras.Model):
    def train_step(self, data):
        tf.Variable(1.0)
        return super().train_step(data)


def test_a_variable_made_anew_each_time_is_refused(make_strategy):
    _assert_refused(
        MakesVariablesAgain,
        make_strategy(2),
        "only when it is traced for the first time",
    )


class MakesOneOfItsData(keras.Model):
    made = None

    def train_step(self, data):
        if self.made is None:
            self.made = tf.Variable(self.value(data[0]))
        return super().train_step(data)


class OfTheBatch(MakesOneOfItsData):
    def value(self, x):
        return tf.reduce_mean(x, 0)


class OfAVariable(MakesOneOfItsData):
    def value(self, x):
        return 2.0 * self.trainable_variables[0]


@pytest.mark.parametrize("Base", [OfTheBatch, OfAVariable])
def test_a_variable_of_what_the_step_computes_is_refused(make_strategy, Base):
    _assert_refused(Base, make_strategy(2), "from the batch or from variables")
