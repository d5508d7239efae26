"""Reported logs are those of one device."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit

ROWS, BATCH = 44, 14


def _fit(model, **arguments):
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
    data = comparing.regression_data(ROWS)
    return model.fit(*data, **options | arguments)


def _model(cls, **compiled):
    inputs = keras.Input((8,))
    model = cls(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", **compiled)
    return model


REPLICAS = pick([1, 4], [1, 2, 4])


def _histories(make_strategy, build, replicas=REPLICAS, **arguments):
    found = []
    for n in replicas:
        keras.utils.set_random_seed(0)
        with make_strategy(n).scope():
            model = build()
        found.append(_fit(model, **arguments).history)
    for history in found[1:]:
        comparing.assert_close_logs(found[0], history, 1e-5)
    return found[0]


def _as_stock(make_strategy, make_class, replicas=REPLICAS, **arguments):
    """Asserts that logs are those of stock Keras on one device, and returns them."""

    def history(base, strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = _model(make_class(base), loss="mse")
        return _fit(model, **arguments).history

    stock = history(keras.Model, tf.distribute.get_strategy())
    for n in replicas:
        found = history(distfit.Model, make_strategy(n))
        comparing.assert_close_logs(stock, found, 1e-5)
    return stock


def _returns(logs_of):
    """`base -> class` of models whose steps return `logs_of(model, x, y, loss)`."""

    def make(base):
        class Returns(base):
            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_variables)
                self.optimizer.apply(gradients, self.trainable_variables)
                return logs_of(self, x, y, loss)

        return Returns

    return make


def _some_logs(model, x, y, loss):
    rows = tf.shape(x)[0]
    return {"loss": loss, "twice": 2 * loss, "rows": tf.cast(rows, tf.float32)}


def test_returned_tensors_are_reported_as_of_the_last_batch(make_strategy):
    history = _as_stock(make_strategy, _returns(_some_logs))
    assert history["rows"] == [2.0, 2.0]
    np.testing.assert_allclose(history["twice"], 2 * np.array(history["loss"]), 1e-6)


def test_returned_loss_without_a_tracker_is_reported(make_strategy):
    """Stock Keras reports the result of the tracker, which is 0."""
    alone = _returns(lambda model, x, y, loss: {"loss": loss})
    many = _histories(make_strategy, lambda: _model(alone(distfit.Model), loss="mse"))
    stock = _fit(_model(alone(keras.Model), loss="mse")).history
    assert stock["loss"] == [0.0, 0.0]
    keras.utils.set_random_seed(0)
    with make_strategy(1).scope():
        model = _model(_returns(_some_logs)(distfit.Model), loss="mse")
    assert _fit(model).history["loss"] == pytest.approx(many["loss"], rel=1e-6)


LOGS = {
    "mean": lambda model, x, y, loss: {"mean": tf.reduce_mean(y)},
    "maximum": lambda model, x, y, loss: {"largest": tf.reduce_max(model(x))},
    "integer": lambda model, x, y, loss: {"rows": tf.shape(x)[0]},
    "number": lambda model, x, y, loss: {"mean": tf.reduce_mean(y), "constant": 0.5},
    "tracked": lambda model, x, y, loss: {"loss": loss, **model.get_metrics_result()},
}


@pytest.mark.parametrize("name", LOGS)
def test_logs_are_those_of_stock_keras(make_strategy, name):
    _as_stock(make_strategy, _returns(LOGS[name]), pick([4], [2, 4]))


def test_log_of_a_vector(make_strategy):
    """Stock Keras passes it on unchanged."""

    def logs_of(model, x, y, loss):
        return {"vector": tf.reduce_mean(x, axis=0)}

    x, y = comparing.regression_data(ROWS)
    with make_strategy(2).scope():
        model = _model(_returns(logs_of)(distfit.Model), loss="mse")
    logs = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0).history
    np.testing.assert_allclose(logs["vector"][0], x[-2:].mean(0), rtol=1e-5)


class Derived(distfit.Model):
    """Reports a number that is computed from a metric's result."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.squares = keras.metrics.Mean(name="squares")

    def train_step(self, data):
        _, y = data
        self.squares.update_state(tf.square(y))
        return {"rms": tf.sqrt(self.squares.result())}


def test_log_computed_from_a_metric_is_the_latest_of_all_rows(make_strategy):
    x, y = comparing.regression_data(ROWS)
    for replicas in (1, 2, 4):
        with make_strategy(replicas).scope():
            model = Derived()
            model.compile()
        logs = model.fit(x, y, batch_size=BATCH, verbose=0).history
        assert logs["rms"][0] == pytest.approx(np.sqrt((y**2).mean()), rel=1e-5)


class Remembers(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((batch, dict(logs)))


def test_batch_end_logs_are_exact(make_strategy):
    """Stock Keras gives a mean of the replicas' means."""

    def batches(replicas, fused):
        keras.utils.set_random_seed(0)
        with make_strategy(replicas).scope():
            model = _model(distfit.Model, loss="mse", metrics=["mae"])
        model.steps_per_execution = fused
        callback = Remembers()
        _fit(model, epochs=1, callbacks=[callback])
        return callback.seen

    one = batches(1, 1)
    assert [step for step, _ in one] == [0, 1, 2, 3]
    for replicas in (2, 4):
        for (_, a), (_, b) in zip(one, batches(replicas, 1), strict=True):
            comparing.assert_close_logs(a, b, 1e-5)
    fused = batches(2, 3)
    assert [step for step, _ in fused] == [2, 3]
    comparing.assert_close_logs(one[2][1], fused[0][1], 1e-5)


class Forgets(distfit.Model):
    """Lists only one of its two metrics."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.listed = keras.metrics.Mean(name="listed")
        self.forgotten = keras.metrics.Mean(name="forgotten")

    @property
    def metrics(self):
        return [self.listed]

    def train_step(self, data):
        self.listed.update_state(data[1])
        self.forgotten.update_state(data[1])
        return {"listed": self.listed.result()}


def test_metric_that_is_never_reset_is_named(make_strategy):
    for replicas in (1, 2):
        with make_strategy(replicas).scope():
            model = Forgets()
            model.compile()
        with pytest.warns(UserWarning, match="'forgotten' .*never reset"):
            _fit(model)


class IgnoresCompiledMetrics(distfit.Model):
    def train_step(self, data):
        return {"mean": tf.reduce_mean(data[1])}


def test_compiled_metrics_that_the_step_ignores_are_an_error(make_strategy):
    """One device raises; under a strategy stock Keras is silent."""
    for replicas in (1, 2):
        with make_strategy(replicas).scope():
            model = _model(IgnoresCompiledMetrics, metrics=["mae"])
        with pytest.raises(ValueError, match="never updates.*mae"):
            _fit(model)


def test_logs_of_a_step_that_returns_nothing(make_strategy):
    class Silent(distfit.Model):
        def train_step(self, data):
            return None

    with make_strategy(2).scope():
        model = Silent()
        model.compile()
    assert _fit(model).history == {}


def test_default_step_equals_one_device_and_evaluates(make_strategy):
    def build():
        return _model(distfit.Model, loss="mse", metrics=["mae"])

    history = _histories(
        make_strategy,
        build,
        replicas=pick([1, 4], [1, 2, 3, 4]),
        validation_data=comparing.regression_data(31, seed=4),
    )
    assert set(history) == {"loss", "mae", "val_loss", "val_mae"}


class Sums(distfit.Model):
    """Adds its losses up instead of averaging them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sum = keras.metrics.Sum(name="sum")

    def train_step(self, data):
        x, y = data
        loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.sum.update_state(loss)
        return {"sum": self.sum.result()}


def test_any_metric_counts_a_loss_once(make_strategy):
    history = _histories(make_strategy, lambda: _model(Sums, loss="mse"))
    assert history["sum"][0] > 0


def test_batch_logs_that_are_kept_do_not_change(make_strategy):
    kept = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append(logs)
    )
    with make_strategy(2).scope():
        model = _model(distfit.Model, loss="mse")
    _fit(model, epochs=1, callbacks=[callback])
    assert len({logs["loss"] for logs in kept}) == 4


def test_validation_steps_validate_the_same_rows_each_epoch(make_strategy):
    with make_strategy(2).scope():
        model = _model(distfit.Model, loss="mse")
        model.compile(keras.optimizers.SGD(0.0), "mse")
    data = tf.data.Dataset.from_tensor_slices(comparing.regression_data(30)).batch(10)
    for validation in (data, data.filter(lambda x, y: True)):
        history = _fit(model, epochs=3, validation_data=validation, validation_steps=1)
        assert len(set(history.history["val_loss"])) == 1


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [2, 3, 4]))
def test_metric_fed_with_means_over_the_batch(make_strategy, replicas):
    """And with a constant; the last of the batches has 1 row."""

    class FedWithScalars(distfit.Model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.error = keras.metrics.Mean(name="error")
            self.rate = keras.metrics.Mean(name="rate")

        def train_step(self, data):
            x, y = data
            self.error.update_state(tf.reduce_mean(tf.abs(y - self(x))))
            self.rate.update_state(0.25)
            return {"error": self.error.result(), "rate": self.rate.result()}

        @property
        def metrics(self):
            return [self.error, self.rate]

    def history(n):
        keras.utils.set_random_seed(1)
        with make_strategy(n).scope():
            inputs = keras.Input((8,))
            model = FedWithScalars(inputs, keras.layers.Dense(1)(inputs))
            model.compile()
        x, y = comparing.regression_data(15)
        return model.fit(x, y, batch_size=7, shuffle=False, verbose=0).history

    comparing.assert_close_logs(history(1), history(replicas), 1e-6)
    assert history(replicas)["rate"] == pytest.approx([0.25])


def _zero_rows(kind, x, y):
    """Batches of 5 rows, of none and of 4."""

    def batches():
        for start, stop in ((0, 5), (5, 5), (5, 9)):
            yield x[start:stop], y[start:stop]

    spec = (tf.TensorSpec([None, 8]), tf.TensorSpec([None, 1]))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    known = tf.data.experimental.assert_cardinality(3)
    return data.apply(known) if kind == "known" else data


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # By stock Keras.
@pytest.mark.parametrize("kind", ["known", "unknown"])
@pytest.mark.parametrize("fused", pick([2], [1, 2]))
def test_batches_without_rows_do_what_they_do_in_stock_keras(
    make_strategy, kind, fused
):
    x, y = comparing.regression_data(9)

    def run(base, strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = _model(base, loss="mse", metrics=["mae"])
        model.steps_per_execution = fused if strategy.num_replicas_in_sync > 1 else 1
        data = _zero_rows(kind, x, y)
        history = model.fit(data, epochs=2, shuffle=False, verbose=0).history
        evaluated = model.evaluate(data, verbose=0)
        predicted = model.predict(data, verbose=0)
        return history, evaluated, predicted, model.get_weights()

    stock = run(keras.Model, tf.distribute.get_strategy())
    for replicas in pick([3], [1, 2, 3]):
        many = run(distfit.Model, make_strategy(replicas))
        comparing.assert_close_logs(stock[0], many[0], 1e-5)
        np.testing.assert_allclose(many[1], stock[1], rtol=1e-5)
        np.testing.assert_allclose(many[2], stock[2], rtol=1e-5, atol=1e-6)
        for a, b in zip(stock[3], many[3], strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)


class ReturnsVariables(keras.Model):
    def train_step(self, data):
        logs = super().train_step(data)
        norm = tf.norm(self.trainable_variables[0])
        return {**logs, "rate": self.optimizer.learning_rate, "norm": norm}


class ChangesVariables(keras.callbacks.Callback):
    """After each batch, before anybody reads its logs."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.01 * (batch + 1)
        weight = self.model.trainable_variables[0]
        weight.assign(0.5 * weight)


@pytest.mark.parametrize("replicas", [1, 2])
def test_logs_have_the_values_that_variables_had_in_the_step(make_strategy, replicas):
    x, y = comparing.regression_data(24)

    def history(fit, strategy):
        keras.utils.set_random_seed(0)
        with comparing.scope_of(strategy):
            inputs = keras.Input((8,))
            model = ReturnsVariables(inputs, layers.Dense(1)(inputs))
            model.compile(keras.optimizers.SGD(0.02), "mse")
        options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
        return fit(model, x, y, callbacks=[ChangesVariables()], **options).history

    one = history(keras.Model.fit, None)
    many = history(distfit.fit, make_strategy(replicas))
    comparing.assert_close_logs(one, many, 1e-5)
