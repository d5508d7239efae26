"""Sequential, functional and subclassed models live together; stock behaviour stays."""

import contextlib
import gc
import weakref

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit


class Functional(distfit.Model):
    """Called with inputs and outputs."""


class BuildsItself(distfit.Model):
    """Makes its inputs and outputs in its constructor."""

    def __init__(self):
        inputs = keras.Input((8,))
        super().__init__(inputs, layers.Dense(1)(inputs))


class Subclassed(distfit.Model):
    """Has layers and a call."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, activation="relu")
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(x))


class StepBuilds(distfit.Model):
    """Has no call: its layers are built when its step uses them."""

    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(1)
        self.loss_fn = keras.losses.MeanSquaredError()

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_fn(y, self.encoder(x))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


class Base(distfit.Model):
    """A user's own base of functional and subclassed models."""


class FunctionalOfBase(Base):
    pass


class SubclassedOfBase(Base):
    def __init__(self):
        super().__init__()
        self.out = layers.Dense(1)

    def call(self, x):
        return self.out(x)


def _inputs_outputs():
    inputs = keras.Input((8,))
    return inputs, layers.Dense(1)(inputs)


KINDS = {
    "functional": lambda: Functional(*_inputs_outputs()),
    "builds itself": BuildsItself,
    "subclassed": Subclassed,
    "plain": lambda: distfit.Model(*_inputs_outputs()),
    "sequential": lambda: distfit.Sequential([keras.Input((8,)), layers.Dense(1)]),
    "deferred": lambda: distfit.Sequential([layers.Dense(2), layers.Dense(1)]),
    "step builds": StepBuilds,
    "functional of a base": lambda: FunctionalOfBase(*_inputs_outputs()),
    "subclassed of the base": SubclassedOfBase,
}


@pytest.mark.parametrize("order", pick([1], [1, -1]))
def test_kinds_of_models_in_any_order(make_strategy, order):
    """Keras makes the bases of a functional model functional, up to `keras.Model`."""
    for kind, build in list(KINDS.items())[::order]:
        losses = []
        for replicas in (1, 2):
            keras.utils.set_random_seed(0)
            with make_strategy(replicas).scope():
                model = build()
                assert isinstance(model, distfit.Model), kind
                model.compile("sgd", "mse")
            x, y = comparing.regression_data(20)
            history = model.fit(x, y, batch_size=7, shuffle=False, verbose=0)
            losses.append(history.history)
        comparing.assert_close_logs(*losses, 1e-5)
    assert keras.Model in distfit.Model.__mro__
    assert distfit.Model.__bases__ == (keras.Model,)
    assert Base.__bases__ == (distfit.Model,)


def test_without_a_strategy_it_is_a_keras_model():
    model = KINDS["plain"]()
    model.compile("sgd", "mse")
    x, y = comparing.regression_data(20)
    assert len(model.fit(x, y, epochs=2, verbose=0).history["loss"]) == 2


def test_optimizer_keeps_its_identity_and_its_class(make_strategy):
    optimizer = keras.optimizers.Adam(0.5)
    model = KINDS["plain"]()
    model.compile(optimizer, "mse")
    assert model.optimizer is optimizer
    assert type(optimizer) is keras.optimizers.Adam
    optimizer.learning_rate = 0.25
    assert float(model.optimizer.learning_rate) == 0.25


def test_run_eagerly_equals_compiled(make_strategy):
    histories = []
    for replicas, eager in ((1, False), (2, True), (2, False)):
        keras.utils.set_random_seed(0)
        with make_strategy(replicas).scope():
            model = KINDS["functional"]()
            model.compile("adam", "mse", metrics=["mae"], run_eagerly=eager)
        x, y = comparing.regression_data(20)
        history = model.fit(x, y, batch_size=7, epochs=2, shuffle=False, verbose=0)
        histories.append(history.history)
    for history in histories[1:]:
        comparing.assert_close_logs(histories[0], history, 1e-5)


@pytest.mark.filterwarnings("ignore:Even though the `tf.config")  # About tf.data.
def test_all_functions_run_eagerly_when_tensorflow_is_told_so(make_strategy):
    seen = []

    class Seeing(distfit.Model):
        def train_step(self, data):
            seen.append(tf.executing_eagerly())
            return super().train_step(data)

    with make_strategy(2).scope():
        inputs = keras.Input((8,))
        model = Seeing(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
    x, y = comparing.regression_data(8)
    tf.config.run_functions_eagerly(True)
    try:
        model.fit(x, y, batch_size=4, verbose=0)
        model.predict(x, verbose=0)
        assert seen == [True, True]
    finally:
        tf.config.run_functions_eagerly(False)
    model.fit(x, y, batch_size=4, verbose=0)
    assert not all(seen)


def test_compile_again_takes_effect(make_strategy):
    with make_strategy(2).scope():
        model = KINDS["functional"]()
        model.compile("sgd", "mse")
    x, y = comparing.regression_data(20)
    model.fit(x, y, verbose=0)
    with make_strategy(2).scope():
        model.compile(keras.optimizers.SGD(0.0), "mae")
    before = model.get_weights()
    loss = model.fit(x, y, verbose=0).history["loss"][0]
    assert (model.get_weights()[0] == before[0]).all()
    assert loss == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)


def test_xla_on_one_replica_equals_the_same_without(make_strategy):
    histories = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        with make_strategy(1).scope():
            model = KINDS["functional"]()
            model.compile("adam", "mse", metrics=["mae"], jit_compile=jit_compile)
        x, y = comparing.regression_data(20)
        history = model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
        histories.append(history.history)
    comparing.assert_close_logs(*histories, 1e-5)


def _of_keras(kind):
    """A compiled model of a class of Keras, or of a user's own."""

    class UsersOwn(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(4, activation="relu")
            self.out = layers.Dense(1)

        def call(self, x):
            return self.out(self.hidden(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                spread = tf.reduce_mean(tf.abs(y_pred - tf.transpose(y_pred)))
                loss = tf.reduce_mean(tf.square(y - y_pred)) + 0.1 * spread
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            self.compute_metrics(x, y, y_pred)
            return {**self.get_metrics_result(), "spread": spread}

    kinds = {
        "functional": lambda: keras.Model(*_inputs_outputs()),
        "sequential": lambda: keras.Sequential([layers.Dense(2), layers.Dense(1)]),
        "subclassed": UsersOwn,
    }
    model = kinds[kind]()
    model.compile("adam", "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [1, 2, 3]))
@pytest.mark.parametrize(
    "kind", pick(["subclassed"], ["functional", "sequential", "subclassed"])
)
def test_functions_train_any_model_of_keras(make_strategy, kind, replicas):
    """As its own methods do on one device."""
    x, y = comparing.regression_data(23)
    given = {"batch_size": 7, "verbose": 0}

    def run(library, strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = _of_keras(kind)
        history = library.fit(
            model, x, y, epochs=2, shuffle=False, validation_split=0.2, **given
        )
        logs = library.evaluate(model, x, y, return_dict=True, **given)
        predicted = library.predict(model, x, **given)
        return comparing.Run(history.history, model.get_weights(), logs, predicted)

    stock = run(keras.Model, tf.distribute.get_strategy())
    comparing.assert_same(stock, run(distfit, make_strategy(replicas)))


def test_evaluate_returns_what_the_method_of_keras_does(make_strategy):
    x, y = comparing.regression_data(10)
    model = _of_keras("functional")
    stock = model.evaluate(x, y, verbose=0)
    assert distfit.evaluate(model, x, y, verbose=0) == pytest.approx(stock, rel=1e-6)


def test_a_model_of_keras_keeps_its_own_methods(make_strategy):
    with make_strategy(2).scope():
        model = _of_keras("functional")
    x, y = comparing.regression_data(10)
    distfit.fit(model, x, y, verbose=0)
    assert type(model).fit is type(keras.Model(*_inputs_outputs())).fit
    assert "fit" not in vars(model) and "train_step" not in vars(model)
    assert not isinstance(model, distfit.Model)


def test_an_unbuilt_part_is_built_by_the_step(make_strategy):
    """Its `call` does not take the batch."""

    def build():
        model = StepBuilds()
        model.compile(keras.optimizers.Adam(0.1))
        return model

    def fit(model):
        data = comparing.regression_data(23)
        return model.fit(*data, batch_size=7, epochs=2, shuffle=False, verbose=0)

    one, three = (comparing.run(make_strategy(n), build, fit) for n in (1, 3))
    comparing.assert_same(one, three)
    assert len(one.weights) == 2


def test_an_optimizer_held_by_a_layer(make_strategy):
    class Holds(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)
            self.optimizer = keras.optimizers.Adam(0.05, clipnorm=0.1)

        def call(self, x):
            return self.dense(x)

    class Delegates(distfit.Model):
        def __init__(self):
            super().__init__()
            self.part = Holds()

        def call(self, x):
            return self.part(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(y - self(x)))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.part.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    def build():
        model = Delegates()
        model.compile()
        return model

    def fit(model):
        data = comparing.regression_data(23)
        return model.fit(*data, batch_size=7, epochs=2, shuffle=False, verbose=0)

    one, two = (comparing.run(make_strategy(n), build, fit) for n in (1, 2))
    comparing.assert_same(one, two)
    assert one.history["loss"][0] != one.history["loss"][1]


class LoopsOverRows(distfit.Model):
    """Uses the number of rows as a Python number."""

    def train_step(self, data):
        x, y = data
        rows = x.shape[0]
        assert isinstance(rows, int)
        weights = tf.constant([[1.0 / (1 + row)] for row in range(rows)])
        with tf.GradientTape() as tape:
            errors = tf.reshape(y - self(x), (rows, 1))
            loss = tf.reduce_sum(weights * tf.square(errors)) / rows
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        first = sum(x[row, 0] for row in range(rows))
        return {"loss": loss, "first": first}


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3]))
def test_static_number_of_rows(make_strategy, replicas):
    def build():
        model = LoopsOverRows(*_inputs_outputs())
        model.compile("sgd")
        return model

    def fit(model):
        data = tf.data.Dataset.from_tensor_slices(comparing.regression_data(23))
        data = data.batch(5, drop_remainder=True)
        return model.fit(data, epochs=2, shuffle=False, verbose=0)

    one, many = (comparing.run(make_strategy(n), build, fit) for n in (1, replicas))
    comparing.assert_same(one, many)


class Scaled(keras.Model):
    scale = 1.0

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.scale * tf.reduce_mean(tf.square(self(x) - y))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_steps_are_traced_anew_where_functions_are_made_anew(make_strategy):
    """As in stock Keras, after a change of what a step reads while it is traced."""
    with make_strategy(2).scope():
        inputs = keras.Input((8,))
        model = Scaled(inputs, layers.Dense(1)(inputs))
        model.compile(keras.optimizers.SGD(0.0))
    data = comparing.regression_data(8)
    (before,) = distfit.fit(model, *data, verbose=0).history["loss"]
    model.scale = 3.0
    model.make_train_function(force=True)
    (after,) = distfit.fit(model, *data, verbose=0).history["loss"]
    np.testing.assert_allclose(after, 3 * before, rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_nothing_keeps_a_model_that_was_trained(make_strategy, replicas):
    """Of the many models that a process may try, only those still in use are kept."""
    strategy = make_strategy(replicas)
    with strategy.scope():
        inputs = keras.Input((8,))
        model = keras.Model(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
    data = comparing.regression_data(8)
    distfit.fit(model, *data, validation_data=data, verbose=0)
    distfit.predict(model, data[0], verbose=0)
    held = weakref.ref(model)
    del inputs, model
    keras.backend.clear_session()
    gc.collect()
    assert held() is None


def test_calls_within_a_scope_do_what_they_do_outside(make_strategy):
    x = np.random.default_rng(0).normal(size=(44, 5)).astype("float32")
    y = x.sum(1, keepdims=True)

    def everything(strategy, scope) -> list:
        keras.utils.set_random_seed(3)
        with strategy.scope():
            model = distfit.Sequential(
                [
                    layers.Dense(8, activation="relu"),
                    layers.Dropout(0.3),
                    layers.BatchNormalization(),
                    layers.Dense(1),
                ]
            )
            momentum = keras.optimizers.SGD(0.1, momentum=0.9)
            model.compile(momentum, "mse", metrics=["mae"])
        quiet = {"batch_size": 16, "verbose": 0}
        with scope:
            history = model.fit(x, y, epochs=3, validation_data=(x, y), **quiet).history
            found = [
                *(history[name] for name in sorted(history)),
                model.evaluate(x, y, **quiet),
                model.predict(x, **quiet),
                model.train_on_batch(x, y),
                model.test_on_batch(x, y),
                model.predict_on_batch(x),
            ]
        comparing.check_replicas_agree(strategy, model)
        return [*found, *model.get_weights()]

    strategy = make_strategy(2)
    expected = everything(strategy, contextlib.nullcontext())
    for scope in (strategy.scope(), make_strategy(1).scope()):
        for one, other in zip(everything(strategy, scope), expected, strict=True):
            np.testing.assert_array_equal(one, other)
