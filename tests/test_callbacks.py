"""Keras's callbacks act as on one device; logs cost nothing where nobody reads them."""

import copy
import json
import pickle

import comparing
import keras
import pytest
from keras import layers

import distfit
from distfit.callbacks import CallbackList, LazyLogs, ProgressBar


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
    """Reads the logs in the hook of every kind."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_batch_end(self, batch, logs=None):
        self.calls.append(("batch", batch, logs["loss"]))

    def on_test_batch_end(self, batch, logs=None):
        self.calls.append(("test", batch, logs.get("loss")))

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append(("epoch", epoch, sorted(logs)))


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
    """Code in C may look past the methods of a `dict` that is a subclass."""
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
