"""Keras's callbacks act as on one device; logs cost nothing unless they are read."""

import copy
import json
import pickle

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas
from keras import layers

import distfit
from distfit.callbacks import CallbackList, LazyLogs, ProgressBar
from distfit.callbacks.hooks import BATCH_HOOKS, listens


def _fit(strategy, callbacks, epochs=4, **arguments):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = comparing.regression_data(20)
    history = model.fit(
        x,
        y,
        batch_size=7,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        **arguments,
    )
    return model, history


class Reads(keras.callbacks.Callback):
    """Reads the logs in every kind of hook."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_batch_end(self, batch, logs=None):
        self.calls.append(("batch", batch, logs["loss"]))

    def on_test_batch_end(self, batch, logs=None):
        self.calls.append(("test", batch, logs.get("loss")))

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(("epoch", epoch, sorted(logs)))


def test_hooks_that_do_nothing_are_not_called_for_batches():
    stock = keras.callbacks.Callback()
    assert not any(
        listens(stock, hook) for hooks in BATCH_HOOKS.values() for hook in hooks
    )
    assert listens(Reads(), "on_train_batch_end") and listens(
        Reads(), "on_test_batch_end"
    )
    assert not listens(Reads(), "on_train_batch_begin")
    assert not listens(Reads(), "on_predict_batch_end")
    one = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: None)
    assert listens(one, "on_train_batch_begin") and not listens(
        one, "on_train_batch_end"
    )


def test_custom_callbacks_read_what_one_device_reports(make_strategy):
    seen = []
    data = comparing.regression_data(9, seed=3)
    for replicas in (1, 2):
        callback = Reads()
        _fit(make_strategy(replicas), [callback], epochs=1, validation_data=data)
        seen.append(callback.calls)
    one, two = seen
    assert [c[:2] for c in one] == [c[:2] for c in two]
    assert [c[0] for c in one] == ["batch"] * 3 + ["test"] * 2 + ["epoch"]
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-5)


def test_learning_rate_schedules_and_plateaus_act_as_on_one_device(make_strategy):
    rates = []
    for replicas in (1, 2):
        schedule = keras.callbacks.LearningRateScheduler(
            lambda epoch: 0.1 / (epoch + 1)
        )
        model, history = _fit(make_strategy(replicas), [schedule])
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=10)
        _, reduced = _fit(make_strategy(replicas), [plateau])
        rates.append(
            history.history["learning_rate"] + reduced.history["learning_rate"]
        )
        comparing.check_replicas_agree(make_strategy(replicas), model)
    assert rates[0] == pytest.approx(rates[1])
    assert len(set(rates[0])) > 3


def test_stop_training_in_a_batch_stops_at_that_step(make_strategy):
    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

    model, history = _fit(make_strategy(2), [Stops()])
    assert history.epoch == [0]
    assert int(model.optimizer.iterations.numpy()) == 2


def test_nothing_is_read_for_callbacks_without_batch_hooks():
    reads = []
    callbacks = CallbackList([keras.callbacks.EarlyStopping()], add_history=True)
    callbacks.batch_end("train", 0, lambda: reads.append(1) or {"loss": 1.0})
    assert not reads
    of_epochs = distfit.callbacks.ChiefOnly(keras.callbacks.RemoteMonitor())
    chief_only = CallbackList([of_epochs])
    chief_only.batch_end("train", 0, lambda: reads.append(1) or {"loss": 1.0})
    assert not reads and not any(chief_only.may_stop_alone.values())
    listening = CallbackList([Reads()])
    for step in range(3):
        listening.batch_end("train", step, lambda: reads.append(1) or {"loss": 1.0})
    assert len(reads) == 3


def test_lazy_logs_are_read_once_and_behave_like_a_dict():
    reads = []
    logs = LazyLogs(lambda: reads.append(1) or {"loss": 2.0})
    assert not reads
    assert logs["loss"] == 2.0 and logs.get("other") is None and dict(logs)
    logs["extra"] = 1
    assert reads == [1] and len(logs) == 2 and set(logs.copy()) == {"loss", "extra"}


@pytest.mark.parametrize(
    "look",
    [
        dict,
        copy.copy,
        lambda logs: {**logs},
        lambda logs: {} | logs,
        lambda logs: logs | {},
        lambda logs: json.loads(json.dumps(logs)),
        lambda logs: json.loads(json.dumps(logs, indent=1)),
        lambda logs: pickle.loads(pickle.dumps(logs)),
        lambda logs: (lambda **named: named)(**logs),
        lambda logs: {"loss": float("{loss}".format(**logs))},
        lambda logs: dict(zip(logs, logs.values(), strict=True)),
        lambda logs: logs if logs == {"loss": 2.0} else None,
    ],
)
def test_any_look_at_lazy_logs_reads_them(look):
    """C code may bypass the methods of a `dict` subclass."""
    logs = LazyLogs(lambda: {"loss": 2.0})
    assert isinstance(logs, dict) and logs
    assert dict(look(logs)) == {"loss": 2.0}


def test_progress_bar_reads_the_logs_when_it_is_due(capsys):
    now = [0.0]
    reads = []
    bar = ProgressBar(interval=1.0, clock=lambda: now[0])
    bar.set_params({"verbose": 1, "epochs": 1, "steps": 30})
    bar.on_epoch_begin(0)
    for step in range(30):
        now[0] = step / 10
        bar.on_train_batch_end(
            step, LazyLogs(lambda: reads.append(1) or {"loss": float(len(reads))})
        )
    assert len(reads) == 3
    bar.on_epoch_end(0, {"loss": 0.125})
    assert "loss: 0.1250" in capsys.readouterr().out.splitlines()[-1]


def test_progress_bar_shows_the_numbers_of_the_history(make_strategy, capsys):
    keras.utils.set_random_seed(0)
    with make_strategy(2).scope():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
        model.compile("sgd", "mse")
    x, y = comparing.regression_data(20)
    loss = model.fit(x, y, batch_size=7, verbose=1).history["loss"][0]
    assert f"loss: {loss:.4f}" in capsys.readouterr().out.splitlines()[-1]


# Losses that are not finite


def _linear(strategy, cls=keras.Sequential):
    with strategy.scope():
        model = cls([keras.Input((8,)), layers.Dense(1)])
        model.compile("sgd", "mse")
    return model


def _watched(model, y, epochs=1, x=None):
    """Trains in batches of 10 rows with `NonFinite`."""
    x = comparing.regression_data(len(y))[0] if x is None else x
    watching = [distfit.callbacks.NonFinite()]
    data = {"x": x, "y": y, "batch_size": 10, "epochs": epochs, "shuffle": False}
    return distfit.fit(model, **data, verbose=0, callbacks=watching)


@pytest.mark.parametrize("row, replica", [(20, 0), (29, None)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("replicas", numbers_of_replicas([1, 3], [1, 2, 3]))
def test_a_bad_row_is_named_by_its_step_and_replica(
    make_strategy, replicas, value, row, replica
):
    """In a model of any class, with a row of the third batch."""
    y = comparing.regression_data(40)[1]
    y[row] = value
    replica = replicas - 1 if replica is None else replica
    with pytest.raises(FloatingPointError, match=f"at step 3 on replica {replica}[.]"):
        _watched(_linear(make_strategy(replicas)), y)


@pytest.mark.parametrize("fused, where", [(3, " on replica 1"), (4, "")])
def test_fused_steps_are_told_apart(make_strategy, fused, where):
    """The step after the bad one spoils the parts of all replicas."""
    y = comparing.regression_data(60)[1]
    y[29] = np.nan
    model = _linear(make_strategy(2))
    model.steps_per_execution = fused
    with pytest.raises(FloatingPointError, match=f"at step 3{where}[.] Lower"):
        _watched(model, y)


@pytest.mark.parametrize("eagerly", [False, True])
def test_steps_are_counted_within_the_epoch(make_strategy, eagerly):
    """The weights grow until they are too large, in the second epoch."""
    model = _linear(make_strategy(2))
    model.run_eagerly = eagerly
    model.optimizer.learning_rate = 1e8
    y = comparing.regression_data(20)[1]
    with pytest.raises(FloatingPointError, match="at step 2[.] Lower"):
        _watched(model, y, epochs=9)
    assert int(model.optimizer.iterations) == 4


class OwnLosses(keras.Model):
    """Logs plain tensors: a loss, an infinite number, and an integer."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad
        self.layer = layers.Dense(1)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.layer(data[0]) - data[1]))
        variables = self.layer.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss, self.bad: loss * np.inf, "rows": tf.shape(data[0])[0]}


def _own_losses(strategy, bad):
    with strategy.scope():
        model = OwnLosses(bad)
        model.layer.build((None, 8))
        model.compile("sgd")
    return model


def test_every_loss_is_looked_at(make_strategy):
    y = comparing.regression_data(20)[1]
    with pytest.raises(FloatingPointError, match="at step 1[.]"):
        _watched(_own_losses(make_strategy(2), "g_loss"), y)


def test_other_logs_may_be_infinite_where_there_is_a_loss(make_strategy):
    y = comparing.regression_data(20)[1]
    history = _watched(_own_losses(make_strategy(2), "largest"), y).history
    assert np.isinf(history["largest"][0]) and np.isfinite(history["loss"][0])


def test_the_watch_changes_no_number(make_strategy):
    x, y = comparing.regression_data(45)
    seen = []
    for callbacks in ([], [distfit.callbacks.NonFinite()]):
        keras.utils.set_random_seed(0)
        model = _linear(make_strategy(2), distfit.Sequential)
        data = {"batch_size": 10, "epochs": 2, "shuffle": False, "verbose": 0}
        history = model.fit(x, y, callbacks=callbacks, **data).history
        seen.append([history["loss"], *(w.tolist() for w in model.get_weights())])
    assert seen[0] == seen[1]


# Numbers


def test_callbacks_take_step_counts_and_learning_rates_for_numbers(make_strategy):
    """Also where replicas have copies, and without changing the class of Keras."""
    before = dict(vars(keras.Variable))
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            optimizer = self.model.optimizer
            seen.append((int(optimizer.iterations), float(optimizer.learning_rate)))

    _fit(make_strategy(2), [Looks()], epochs=1)
    assert [step for step, _ in seen] == [1, 2, 3]
    assert [rate for _, rate in seen] == pytest.approx([0.1] * 3)
    assert dict(vars(keras.Variable)) == before
