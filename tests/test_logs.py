"""What is reported is what one device reports."""

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
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


def _histories(make_strategy, build, replicas=(1, 2, 4), **arguments):
    found = []
    for n in replicas:
        keras.utils.set_random_seed(0)
        with make_strategy(n).scope():
            model = build()
        found.append(_fit(model, **arguments).history)
    for history in found[1:]:
        comparing.assert_close_logs(found[0], history, 1e-5)
    return found[0]


class ReturnsLoss(distfit.Model):
    """Returns its loss without updating any tracker."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "twice": 2 * loss, "rows": distfit.global_sum(self.n(x))}

    def n(self, x):
        return tf.cast(tf.shape(x)[0], tf.float32)


def test_returned_loss_is_reported_as_the_mean_over_rows(make_strategy):
    """Stock Keras reports 0.0 for the loss, and of the rest the last batch."""
    history = _histories(make_strategy, lambda: _model(ReturnsLoss, loss="mse"))
    stock = _model(distfit.Model, loss="mse")
    assert history["loss"][0] > 0
    np.testing.assert_allclose(history["twice"], 2 * np.array(history["loss"]), 1e-6)
    # Of 44 rows, 42 are in batches of 14 rows and 2 in one of 2.
    assert history["rows"][0] == pytest.approx((42 * 14 + 2 * 2) / 44)
    del stock


class LocalMean(distfit.Model):
    """Returns a mean of its own rows, which no metric tracks."""

    def train_step(self, data):
        x, y = data
        return {"mean": tf.reduce_mean(y), "vector": tf.reduce_mean(x, axis=0)}


def test_log_without_a_metric_is_the_mean_over_all_rows(make_strategy):
    x, y = comparing.regression_data(ROWS)
    for replicas in (1, 2, 4):
        with make_strategy(replicas).scope():
            model = LocalMean()
            model.compile()
        logs = model.fit(x, y, batch_size=BATCH, verbose=0).history
        assert logs["mean"][0] == pytest.approx(y.mean(), rel=1e-5)


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
        replicas=(1, 2, 3, 4),
        validation_data=comparing.regression_data(31, seed=4),
    )
    assert set(history) == {"loss", "mae", "val_loss", "val_mae"}


class Sums(ReturnsLoss):
    """Adds its losses up instead of averaging them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sum = keras.metrics.Sum(name="sum")

    def train_step(self, data):
        logs = super().train_step(data)
        self.sum.update_state(logs["loss"])
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


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_metric_fed_with_means_of_local_rows(make_strategy, replicas):
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
