"""Several workers: what they agree on, and the errors they get when they cannot.

Every worker runs each of these tests; integration/test_on_workers.py starts them.
"""

import contextlib
import csv
import importlib
import io
import pathlib
import random
import sys

import comparing
import guide
import keras
import numpy as np
import pytest
import tensorflow as tf
import test_resuming
from breadth import pick
from keras import layers

import distfit
from distfit.cluster import workers
from distfit.training import data, drivers

pytestmark = pytest.mark.workers


@pytest.fixture
def strategy(make_strategy):
    return make_strategy(2)


@pytest.fixture
def team(strategy):
    return workers.of(strategy)


@pytest.fixture
def local_replicas(strategy, team):
    """The number of replicas of each worker."""
    return strategy.num_replicas_in_sync // team.count


@pytest.fixture
def shared(team, tmp_path):
    """A folder that all workers share."""
    return pathlib.Path(team.from_chief("a folder", str(tmp_path)))


def _model(
    strategy,
    units=4,
    optimizer="adam",
    loss="mse",
    metrics=("mae",),
    convolves=False,
    **more,
):
    with strategy.scope():
        hidden = inputs = keras.Input((8,))
        if convolves:
            hidden = layers.Conv1D(2, 3, activation="relu")(
                layers.Reshape((8, 1))(inputs)
            )
            hidden = layers.Flatten()(hidden)
        hidden = layers.Dense(units, activation="tanh")(hidden)
        model = distfit.Model(inputs, layers.Dense(1)(hidden))
        model.compile(optimizer, loss, metrics=list(metrics), **more)
    return model


def _fit(model, rows=40, **arguments):
    x, y = comparing.regression_data(rows)
    settings = {"batch_size": 8, "verbose": 0, **arguments}
    return model.fit(x, y, **settings).history


# What they agree on.


def test_messages_come_from_each_worker_in_order(team):
    told = team.tell("here", {"I am": team.index, "text": "é" * team.index})
    assert told == [{"I am": i, "text": "é" * i} for i in range(team.count)]
    assert team.gather("here", b"\0" * team.index) == [
        b"\0" * i for i in range(team.count)
    ]
    assert team.from_chief("here", team.index) == 0
    assert team.any("here", team.index == 1) and not team.any("here", False)


def test_large_messages_arrive_as_they_are(team):
    own = np.random.default_rng(team.index).bytes(1_000_001 + team.index)
    told = team.gather("here", own)
    for index, message in enumerate(told):
        assert message == np.random.default_rng(index).bytes(1_000_001 + index)


def test_a_message_may_take_several_exchanges(team, monkeypatch):
    monkeypatch.setattr(workers, "_CHUNK", 1000)
    own = np.random.default_rng(team.index).bytes(4001 * (team.index + 1))
    told = team.gather("here", own if team.index else b"")
    assert told[0] == b""
    assert told[1] == np.random.default_rng(1).bytes(8002)


def test_workers_that_draw_different_numbers_train_one_model(strategy, team):
    keras.utils.set_random_seed(team.index)
    model = _model(strategy)
    history = _fit(model, epochs=3)
    comparing.check_replicas_agree(strategy, model)
    team.check_alike("the test", {"history": history})
    assert history["loss"][-1] < history["loss"][0]


def test_a_program_that_seeds_its_numbers_keeps_them(make_strategy, strategy):
    runs = []
    for chosen in (make_strategy(1), strategy):
        run = comparing.run(chosen, lambda chosen=chosen: _model(chosen), _fit_shuffled)
        runs.append(run)
    comparing.assert_same(*runs)


def _fit_shuffled(model):
    x, y = comparing.regression_data(40)
    return model.fit(x, y, batch_size=8, epochs=3, shuffle=True, verbose=0)


def test_weights_that_differ_become_those_of_the_chief(strategy, team):
    model = _model(strategy)
    model.set_weights([w + team.index for w in model.get_weights()])
    chiefs = team.tell("the test", [w.tolist() for w in model.get_weights()])[0]
    _fit(model, epochs=1, steps_per_epoch=1)
    comparing.check_replicas_agree(strategy, model)
    model.set_weights([w + team.index for w in map(np.asarray, chiefs)])
    x, _ = comparing.regression_data(8)
    predicted = model.predict(x, verbose=0)
    for weight, chiefs_weight in zip(model.get_weights(), chiefs, strict=True):
        np.testing.assert_allclose(weight, chiefs_weight, atol=1e-6)
    assert predicted.shape == (8, 1)


class Applies(distfit.Model):
    """Leaves it to the optimizer which variables its gradients are for."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables))
        return {"loss": loss}


def test_the_state_of_an_optimizer_becomes_that_of_the_chief(strategy, team):
    with strategy.scope():
        inputs = keras.Input((8,))
        model = Applies(inputs, layers.Dense(1)(inputs))
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(5 * team.index)
    _fit(model, epochs=1)
    assert model.optimizer.iterations.numpy() == 5
    comparing.check_replicas_agree(strategy, model)
    state = [v.numpy().tolist() for v in model.optimizer.variables]
    team.check_alike("the test", {"state": state})


class _StopsAt(keras.callbacks.Callback):
    def __init__(self, batch):
        super().__init__()
        self.batch, self.seen = batch, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if batch == self.batch:
            self.model.stop_training = True


@pytest.mark.parametrize("fused", [1, 2])
def test_a_worker_that_stops_stops_all_at_the_same_step(strategy, team, fused):
    callback = _StopsAt(3 if team.index == 1 else None)
    model = _model(strategy, steps_per_execution=fused)
    _fit(model, rows=80, epochs=2, callbacks=[callback])
    assert model.optimizer.iterations.numpy() == 4
    assert callback.seen == 4 / fused


def test_a_worker_that_stops_after_an_epoch_stops_all(strategy, team):
    class Stops(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = team.index == 1

    assert len(_fit(_model(strategy), epochs=3, callbacks=[Stops()])["loss"]) == 1


def test_a_stop_from_outside_of_callbacks_stops_all_after_the_epoch(strategy, team):
    class Signals(keras.callbacks.Callback):
        in_step_with_others = True  # As if it did nothing, and another thread did.

        def on_train_batch_begin(self, batch, logs=None):
            self.model.stop_training = batch == 2 and team.index == 1

    model = _model(strategy)
    history = _fit(model, epochs=3, callbacks=[Signals()])
    assert len(history["loss"]) == 3  # The next batch has reset it.
    Signals.on_train_batch_begin = lambda self, batch, logs=None: setattr(
        self.model, "stop_training", batch >= 2 and team.index == 1
    )
    history = _fit(model, epochs=3, callbacks=[Signals()])
    assert len(history["loss"]) == 1
    assert model.optimizer.iterations.numpy() == 20


def test_a_loss_that_is_not_finite_stops_all_at_the_same_step(strategy, team):
    x, y = comparing.regression_data(40)
    y[20] = np.nan  # A row of the third batch.
    model = _model(strategy, optimizer="sgd")
    callbacks = [keras.callbacks.TerminateOnNaN()]
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=callbacks)
    assert model.optimizer.iterations.numpy() == 3


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_train_batch_begin"])
def test_a_learning_rate_that_differs_becomes_that_of_the_chief(strategy, team, hook):
    rates = [0.5, 0.1][team.index]

    def set_rate(*args, **kwargs):
        model.optimizer.learning_rate = rates

    model = _model(strategy, optimizer="sgd")
    callback = keras.callbacks.LambdaCallback(**{hook: set_rate})
    _fit(model, epochs=1, callbacks=[callback], steps_per_epoch=3)
    rate = float(model.optimizer.learning_rate)
    if hook == "on_epoch_begin":
        assert rate == 0.5
        comparing.check_replicas_agree(strategy, model)
    else:  # It was set before the step, and agreed upon after it.
        assert rate == 0.5


# The errors they get.


@pytest.mark.parametrize(
    "name, own, expected",
    [
        ("structure", lambda i: {"units": 4 + i}, "'units': 4, 'use_bias': True} on"),
        ("optimizer", lambda i: {"optimizer": ["sgd", "adam"][i]}, "'class': 'SGD'"),
        ("fused steps", lambda i: {"steps_per_execution": 1 + i}, "1 on worker 0"),
        ("loss", lambda i: {"loss": ["mse", "mae"][i]}, "loss 0: mse on worker 0"),
        (
            "metrics",
            lambda i: {"metrics": ["mae", "mse"][: 1 + i]},
            "metric 2: nothing on worker 0, MeanSquaredError",
        ),
    ],
)
def test_models_that_differ_are_told_so(strategy, team, name, own, expected):
    model = _model(strategy, **own(min(team.index, 1)))
    with pytest.raises(ValueError, match="must run the same program") as error:
        _fit(model)
    assert expected in str(error.value) and "on worker 1" in str(error.value)


@pytest.mark.parametrize(
    "own, expected",
    [
        (lambda i: {"batch_size": 8 + i}, "batch size of the data: 8 on worker 0"),
        (lambda i: {"epochs": 2 + i}, "epochs: 2 on worker 0, 3 on worker 1"),
        (
            lambda i: {"rows": 40 + 8 * i},
            "number of batches of the data: 5 on worker 0",
        ),
        (lambda i: {"initial_epoch": i, "epochs": 2}, "initial_epoch: 0 on worker 0"),
        (lambda i: {"shuffle": i == 0}, "shuffle: True on worker 0, False on worker 1"),
        (
            lambda i: {"validation_data": [comparing.regression_data(8), None][i]},
            "has validation data: True on worker 0, False on worker 1",
        ),
    ],
)
def test_arguments_and_data_that_differ_are_told_so(strategy, team, own, expected):
    model = _model(strategy)
    with pytest.raises(ValueError, match="must run the same program") as error:
        _fit(model, **own(min(team.index, 1)))
    assert expected in str(error.value)
    _fit(model, epochs=1)  # And they can still train.


def test_data_of_the_same_size_that_differ_are_told_so(strategy, team):
    x, y = comparing.regression_data(40, seed=team.index)
    with pytest.raises(ValueError, match="content of the data"):
        _model(strategy).fit(x, y, batch_size=8, verbose=0)


def test_datasets_that_are_read_in_different_order_are_told_so(strategy, team):
    """As when each worker shuffles without a seed, or reads a shard of its own."""
    dataset = tf.data.Dataset.from_tensor_slices(comparing.regression_data(40))
    model = _model(strategy)
    alike = dataset.shuffle(40, seed=1).batch(8)
    assert len(model.fit(alike, epochs=2, verbose=0).history["loss"]) == 2
    different = dataset.shuffle(40, seed=team.index).batch(8)
    for call in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match="first batch of the epoch") as error:
            call(different, verbose=0)
        assert "Shuffle with a seed" in str(error.value)


def test_batches_given_one_by_one_that_differ_are_told_so(strategy, team):
    model = _model(strategy)
    with pytest.raises(ValueError, match="Received: batch: .* on worker 0"):
        model.train_on_batch(*comparing.regression_data(8, seed=team.index))


def test_a_class_of_an_interactive_session_can_be_trained(strategy, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    monkeypatch.setattr(Applies, "__module__", "__main__")
    with strategy.scope():
        inputs = keras.Input((8,))
        model = Applies(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
    assert np.isfinite(_fit(model)["loss"]).all()


def test_code_that_differs_is_told_so(strategy, team, tmp_path, monkeypatch):
    code = "import distfit\n\nclass Theirs(distfit.Model):\n    version = {}\n"
    (tmp_path / "theirs.py").write_text(code.format(min(team.index, 1)))
    monkeypatch.syspath_prepend(tmp_path)
    with strategy.scope():
        inputs = keras.Input((8,))
        outputs = layers.Dense(1)(inputs)
        model = importlib.import_module("theirs").Theirs(inputs, outputs)
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Received: code: keras .* on worker 0, keras"):
        _fit(model)


def test_what_the_chief_calls_alone_is_told_to_all(strategy, team):
    class Evaluates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(*comparing.regression_data(8), verbose=0)

    callbacks = [Evaluates()] if team.is_chief else []
    with pytest.raises(RuntimeError, match="called different methods") as error:
        _fit(_model(strategy), epochs=2, callbacks=callbacks)
    assert "worker 0: evaluate()" in str(error.value)
    assert "worker 1: the end of an epoch in train" in str(error.value)


# Callbacks.


class _Notes(keras.callbacks.Callback):
    """Saves the model, tries calls that need all workers, and records batch logs."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.losses, self.errors = folder, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        (self.folder / f"{epoch}.txt").write_text("written")
        self.model.save(self.folder / "model.keras")
        x, y = comparing.regression_data(8)
        for call in (self.model.evaluate, self.model.train_on_batch):
            with pytest.raises(RuntimeError, match="ChiefOnly") as error:
                call(x, y)
            self.errors.append(str(error.value))


def test_chief_only_calls_a_callback_on_the_chief(strategy, team, shared):
    notes = _Notes(shared)
    model = _model(strategy)
    _fit(model, epochs=2, callbacks=[distfit.callbacks.ChiefOnly(notes)])
    team.tell("the test")
    assert sorted(p.name for p in shared.iterdir()) == ["0.txt", "1.txt", "model.keras"]
    if not team.is_chief:
        assert notes.losses == [] and notes.model is None
        return
    assert len(notes.losses) == 10
    assert "(evaluate())" in notes.errors[0]
    assert "(train_on_batch())" in notes.errors[1]
    saved = keras.saving.load_model(shared / "model.keras")
    for own, other in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(own, other)


def test_what_the_chief_draws_alone_changes_no_order_of_rows(strategy, team):
    class Draws(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            np.random.normal(size=3)
            random.random()
            tf.random.normal([3])

    class Shuffled(keras.utils.PyDataset):
        rows = np.arange(40, dtype="float32")

        def __len__(self):
            return 5

        def __getitem__(self, index):
            x = self.rows[8 * index : 8 * index + 8, None]
            return np.tile(x, 8), x

        def on_epoch_end(self):
            self.rows = np.random.permutation(self.rows)

    class Sums(distfit.Model):
        def __init__(self):
            super().__init__()
            self.total = keras.metrics.Sum(name="total")

        def train_step(self, data):
            self.total.update_state(data[1])
            return {"total": self.total.result()}

    with strategy.scope():
        model = Sums()
        model.compile()
    callbacks = [distfit.callbacks.ChiefOnly(Draws())]
    history = model.fit(Shuffled(), epochs=4, verbose=0, callbacks=callbacks).history
    assert history["total"] == [sum(range(40))] * 4


def test_logs_that_one_worker_reads_are_those_of_all(strategy, team):
    seen = []

    def keep(batch, logs):
        seen.append(logs["loss"])

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=keep)
    _fit(_model(strategy), callbacks=[callback] if team.index == 1 else [])
    told = team.tell("the test", seen)
    assert len(told[1]) == 5 and told[0] == []


class _Board(keras.callbacks.TensorBoard):
    """Records what it would write with TensorBoard installed, and where."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.notes, self.written_to = [], set()

    @property
    def summary(self):
        return self

    def create_file_writer(self, folder):
        self.written_to.add(folder)
        return self

    def scalar(self, name, value, step):
        self.notes.append([name, float(value)])

    def as_default(self, step=None):
        return contextlib.nullcontext()

    def record_if(self, condition):
        return contextlib.nullcontext()

    def close(self):
        self.flushed = True

    flush = close


def test_callbacks_of_keras_write_on_the_chief(strategy, team, shared):
    paths = [shared / "{epoch}.keras", shared / "log.csv", shared / "board"]
    board = _Board(paths[2], update_freq=2)
    callbacks = [
        keras.callbacks.ModelCheckpoint(paths[0]),
        keras.callbacks.ModelCheckpoint(shared / "steps.keras", save_freq=3),
        keras.callbacks.CSVLogger(paths[1]),
        board,
    ]
    model = _model(strategy)
    history = _fit(model, epochs=2, callbacks=callbacks)
    team.tell("the test")
    names = {"1.keras", "2.keras", "steps.keras", "log.csv"}
    assert {path.name for path in shared.iterdir()} == names
    folder = str(shared / "board" / "train")
    assert (board.written_to == {folder}) == team.is_chief
    assert (folder in board.written_to) == team.is_chief
    assert all(written == board.notes for written in team.tell("the test", board.notes))
    assert "batch_loss" in {name for name, _ in board.notes}
    lines = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert [float(line["loss"]) for line in lines] == pytest.approx(history["loss"])
    loaded = keras.saving.load_model(shared / "2.keras")
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert callbacks[0].filepath == str(paths[0])  # As it was before.


@pytest.mark.parametrize(
    "of_all, steps",
    pick([(False, 3)], [(True, None), (False, None), (False, 3)]),
)
def test_a_backup_resumes_on_all_workers(
    strategy, team, shared, tmp_path, of_all, steps
):
    """Also where only the chief can see its folder, with gradients half accumulated."""
    folder = (shared if of_all else tmp_path) / "backup"
    x, y = comparing.regression_data(40)

    def fit(model, epochs, callbacks):
        arguments = {"batch_size": 8, "verbose": 0, "shuffle": False}
        return model.fit(x, y, epochs=epochs, callbacks=callbacks, **arguments).history

    def make():
        with strategy.scope():
            adam = keras.optimizers.Adam(gradient_accumulation_steps=steps)
        return _model(strategy, optimizer=adam)

    whole = make()
    expected = fit(whole, 3, [])
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    first = make()
    first.set_weights(whole.get_weights())
    started = first.get_weights()
    backup = keras.callbacks.BackupAndRestore(str(folder), delete_checkpoint=False)
    fit(first, 2, [backup])
    second = make()
    resumed = fit(second, 3, [keras.callbacks.BackupAndRestore(str(folder))])
    assert len(resumed["loss"]) == 1
    comparing.check_replicas_agree(strategy, second)
    again = make()
    again.set_weights(started)
    assert fit(again, 3, [])["loss"][2] == pytest.approx(resumed["loss"][0], rel=1e-5)
    for one, other in zip(again.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert len(expected["loss"]) == 3


def test_early_stopping_restores_the_best_weights_on_all(strategy, team):
    class Worsens(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.01 if epoch == 0 else 30.0

    stopping = keras.callbacks.EarlyStopping("loss", restore_best_weights=True)
    model = _model(strategy, optimizer="sgd")
    history = _fit(model, epochs=5, callbacks=[Worsens(), stopping])
    team.check_alike("the test", {"history": history})
    comparing.check_replicas_agree(strategy, model)
    assert len(history["loss"]) < 5 and stopping.best_epoch == 0


def test_a_progress_bar_is_shown_by_the_chief(strategy, team, capsys):
    _fit(_model(strategy), verbose=1 if team.is_chief else 0)
    shown = capsys.readouterr().out
    assert ("5/5" in shown and "mae" in shown) if team.is_chief else shown == ""


def test_evaluate_and_predict_show_their_progress_too(strategy, team, capsys):
    x, y = comparing.regression_data(24)
    model = _model(strategy)
    for steps, call in ((3, model.evaluate), (3, model.predict)):
        call(*((x, y) if call == model.evaluate else (x,)), batch_size=8, verbose=1)
        shown = capsys.readouterr().out
        assert (f"{steps}/{steps}" in shown) if team.is_chief else shown == ""


def test_plateaus_and_rare_validation_are_those_of_one_device(make_strategy, strategy):
    x, y = comparing.regression_data(40)
    found = []
    for chosen in (make_strategy(1), strategy):
        keras.utils.set_random_seed(3)
        model = _model(chosen, optimizer="sgd")
        plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1)
        history = model.fit(
            *(x, y),
            batch_size=8,
            epochs=6,
            verbose=0,
            shuffle=False,
            callbacks=[plateau],
            validation_data=(x[:11], y[:11]),
            validation_freq=4,
        ).history
        found.append(history)
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-5, err_msg=name)
    assert found[0]["learning_rate"][-1] < found[0]["learning_rate"][0]
    assert len(found[0]["val_loss"]) == 1


def _batches(model):
    arrays = comparing.regression_data(40)
    return data.make_batches(model.distribute_strategy, *arrays, batch_size=8)


def _exchanges_of_a_step(model):
    driver = drivers.step_driver(model, "train", _batches(model))
    x, y = comparing.regression_data(16)
    iterator = iter(tf.data.Dataset.from_tensor_slices((x, y)).batch(8))
    step = driver._run_next.__wrapped__.get_concrete_function(iterator)
    return sum(
        op.type.startswith("CollectiveReduce") for op in step.graph.get_operations()
    )


@pytest.mark.parametrize("own_step", [False, True])
def test_a_step_has_one_exchange(strategy, local_replicas, own_step):
    model = _model(strategy)
    if own_step:
        with strategy.scope():
            model = guide.mlp(guide.classes(distfit.Model).CustomStep)
            model.compile("adam", "mse", metrics=["mae"])
    _fit(model)
    assert _exchanges_of_a_step(model) == local_replicas


# Inputs and outputs.


class _Returns(distfit.Model):
    """Predicts its input, in several forms."""

    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        numbers = tf.cast(x[:, 0], tf.int32)
        return {
            "same": x,
            "text": tf.strings.as_string(numbers),
            "ragged": tf.RaggedTensor.from_row_lengths(
                tf.repeat(numbers, numbers % 3), numbers % 3
            ),
        }


# With 4, the last batch has one row.
@pytest.mark.parametrize("batch_size", pick([4], [1, 4, 7, 21]))
def test_predict_gives_every_worker_all_rows_in_order(strategy, batch_size):
    x = np.arange(21, dtype="float32")[:, None]
    with strategy.scope():
        model = _Returns()
    batch_size = min(batch_size, len(x))
    predicted = model.predict(x, batch_size=batch_size, verbose=0)
    np.testing.assert_array_equal(predicted["same"], x)
    assert predicted["text"].tolist() == [str(i).encode() for i in range(21)]
    assert predicted["ragged"].to_list() == [[i] * (i % 3) for i in range(21)]


def test_outputs_of_one_batch_and_in_hooks_are_those_of_all(strategy):
    x = np.arange(10, dtype="float32")[:, None]
    with strategy.scope():
        model = _Returns()
    np.testing.assert_array_equal(model.predict_on_batch(x)["same"], x)
    seen = []

    def keep(batch, logs):
        seen.append(logs["outputs"]["same"])

    callback = keras.callbacks.LambdaCallback(on_predict_batch_end=keep)
    model.predict(x, batch_size=5, verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(np.concatenate(seen), x)


def test_on_batch_methods_equal_one_device(make_strategy, strategy):
    x, y = comparing.regression_data(11)
    found = []
    for chosen in (make_strategy(1), strategy):
        keras.utils.set_random_seed(3)
        model = _model(chosen)
        logs = [model.train_on_batch(x, y) for _ in range(3)]
        found.append([*logs, model.test_on_batch(x, y)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


# Eager steps of workers are in test_cases.py and test_data.py, too.
@pytest.mark.parametrize(
    "settings",
    pick([{"jit_compile": True}], [{"run_eagerly": True}, {"jit_compile": True}]),
)
def test_eager_and_xla_steps_equal_one_device(make_strategy, strategy, settings):
    runs = []
    for chosen in (make_strategy(1), strategy):

        def build(chosen=chosen):
            return _model(chosen, **settings)

        runs.append(comparing.run(chosen, build, _fit_shuffled))
    comparing.assert_same(*runs)


def test_dropout_is_that_of_one_device(make_strategy, strategy):
    class Drops(distfit.Model):
        def __init__(self):
            super().__init__()
            self.drop = layers.Dropout(0.5)

        def predict_step(self, data):
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            return self.drop(x, training=True)

    dropped = []
    for chosen in (make_strategy(1), strategy):
        keras.utils.set_random_seed(3)
        with chosen.scope():
            model = Drops()
        x = np.ones((4, 64), "float32")
        dropped.append(model.predict(x, batch_size=4, verbose=0))
    np.testing.assert_array_equal(*dropped)
    assert 0.3 < (dropped[0] > 0).mean() < 0.7


# Shards: files on disk, of unequal length.


def _write_shards(folder, team):
    """Files of 11, 3 and 5 rows: for two workers, 16 rows and 3 rows."""
    x, y = comparing.regression_data(19)
    paths = [str(folder / f"{i}.tfrecord") for i in range(3)]
    if team.is_chief:
        parts = (range(11), range(11, 14), range(14, 19))
        for path, rows in zip(paths, parts, strict=True):
            with tf.io.TFRecordWriter(path) as writer:
                for row in rows:
                    joined = np.concatenate([x[row], y[row]])
                    writer.write(tf.io.serialize_tensor(joined).numpy())
    team.tell("the test has written its files")
    return x, y, paths


def _dataset_fn(paths, batch_size):
    def parse(text):
        joined = tf.ensure_shape(tf.io.parse_tensor(text, tf.float32), (9,))
        return joined[:8], joined[8:]

    def dataset_fn(context):
        files = tf.data.Dataset.from_tensor_slices(paths)
        files = files.shard(context.num_input_pipelines, context.input_pipeline_id)
        rows = files.interleave(tf.data.TFRecordDataset, cycle_length=1).map(parse)
        return rows.batch(context.get_per_replica_batch_size(batch_size))

    return dataset_fn


def _batches_of_shards(count, batch_size):
    """The rows of each global batch, by hand."""
    rows = [range(11), range(11, 14), range(14, 19)]
    own = [sum((list(r) for r in rows[i::count]), []) for i in range(count)]
    size = batch_size // count
    steps = max(-(-len(rows) // size) for rows in own)
    return [
        [row for rows in own for row in rows[step * size : (step + 1) * size]]
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    "fused, convolves", pick([(3, True)], [(1, False), (4, False), (3, True)])
)
def test_shards_of_unequal_length_train_every_row_once(
    make_strategy, strategy, team, shared, fused, convolves
):
    x, y, paths = _write_shards(shared, team)
    batch_size = 2 * strategy.num_replicas_in_sync
    batches = _batches_of_shards(team.count, batch_size)

    def by_hand():
        for rows in batches:
            yield x[rows], y[rows]

    spec = (tf.TensorSpec([None, 8]), tf.TensorSpec([None, 1]))
    dataset = tf.data.Dataset.from_generator(by_hand, output_signature=spec)
    runs = []
    for chosen, rows_of in (
        (make_strategy(1), dataset),
        (strategy, _dataset_fn(paths, batch_size)),
    ):

        def build(chosen=chosen):
            return _model(chosen, convolves=convolves, steps_per_execution=fused)

        def fit(model, rows_of=rows_of):
            return model.fit(rows_of, epochs=3, validation_data=rows_of, verbose=0)

        def then(model, rows_of=rows_of):
            evaluation = model.evaluate(rows_of, return_dict=True, verbose=0)
            return evaluation, model.predict(rows_of, verbose=0)

        runs.append(comparing.run(chosen, build, fit, then))
    comparing.assert_same(*runs)
    assert len(runs[1].predictions) == 19


def test_a_worker_without_any_rows_takes_part(strategy, local_replicas):
    x, y = comparing.regression_data(6)

    def dataset_fn(context):
        rows = 6 if context.input_pipeline_id == 0 else 0
        return tf.data.Dataset.from_tensor_slices((x[:rows], y[:rows])).batch(2)

    model = _model(strategy)
    history = model.fit(dataset_fn, epochs=2, verbose=0).history
    assert model.optimizer.iterations.numpy() == 2 * -(-3 // local_replicas)
    assert np.isfinite(history["loss"]).all()
    comparing.check_replicas_agree(strategy, model)
    assert len(model.predict(dataset_fn, verbose=0)) == 6


def test_rows_that_stand_in_count_for_nothing_and_are_read_once(
    strategy, local_replicas
):
    x, y = comparing.regression_data(48)
    opened = []

    def rows(own):
        opened.append(own)
        yield from zip(x[own], y[own], strict=True)

    def dataset_fn(context):
        own = slice(0, 40) if context.input_pipeline_id == 0 else slice(40, 48)
        spec = (tf.TensorSpec([8]), tf.TensorSpec([1]))
        dataset = tf.data.Dataset.from_generator(
            lambda: rows(own), output_signature=spec
        )
        return dataset.batch(4)

    class Spread(distfit.Model):
        def __init__(self):
            super().__init__()
            self.latest = self.add_weight(shape=(), trainable=False, name="latest")

        def train_step(self, data):
            x, _ = data
            rows = tf.cast(tf.shape(x)[0], tf.float32)
            spread = tf.reduce_sum(tf.square(x - tf.reduce_mean(x, 0))) / (rows - 1)
            self.latest.assign(spread)
            return {"spread": spread}

    with strategy.scope():
        model = Spread()
        model.compile()
    history = model.fit(dataset_fn, epochs=1, verbose=0).history
    last = x[40 - 4 * local_replicas : 40]  # Only the first worker has them.
    latest = last.var(axis=0, ddof=1).sum()
    assert history["spread"][0] == pytest.approx(latest, rel=1e-5)
    assert model.latest.numpy() == pytest.approx(latest, rel=1e-5)
    assert len(opened) <= 2


def test_shards_of_python_rows_in_the_style_of_array_record(strategy, team):
    """A source with `len()` and `[i]`, of which each worker reads its own rows."""
    x, y = comparing.regression_data(13)
    source = list(zip(x, y, strict=True))

    def dataset_fn(context):
        own = range(context.input_pipeline_id, len(source), context.num_input_pipelines)
        spec = (tf.TensorSpec([8]), tf.TensorSpec([1]))
        rows = tf.data.Dataset.from_generator(
            lambda: (source[i] for i in own), output_signature=spec
        )
        return rows.batch(context.get_per_replica_batch_size(4))

    model = _model(strategy)
    keras.utils.set_random_seed(0)
    evaluation = model.evaluate(dataset_fn, return_dict=True, verbose=0)
    predicted = model.predict(x, verbose=0)
    assert evaluation["mae"] == pytest.approx(np.abs(predicted - y).mean(), rel=1e-5)


def test_steps_per_epoch_of_shards_go_on_where_they_stopped(
    strategy, team, local_replicas
):
    rows = 4 * local_replicas  # of a worker in an epoch

    def dataset_fn(context):
        first = 100 * context.input_pipeline_id
        numbers = tf.data.Dataset.range(first, first + 3 * rows, output_type=tf.float32)
        return numbers.map(lambda n: (tf.fill([8], n), tf.fill([1], n))).batch(2)

    class Remembers(distfit.Model):
        def __init__(self):
            super().__init__()
            self.seen = []
            self.total = keras.metrics.Sum(name="total")

        def train_step(self, data):
            x, _ = data
            self.total.update_state(x[:, 0])
            return {"total": self.total.result()}

    with strategy.scope():
        model = Remembers()
        model.compile()
    history = model.fit(dataset_fn, steps_per_epoch=2, epochs=3, verbose=0).history
    starts = [100 * i for i in range(team.count)]
    expected = [
        sum(s + n for s in starts for n in range(rows * epoch, rows * epoch + rows))
        for epoch in range(3)
    ]
    assert history["total"] == expected


@pytest.mark.parametrize("fused", pick([4], [1, 4]))
def test_exchanges_of_rows_equal_one_device(make_strategy, strategy, fused):
    """Gathered rows and sparse gradients, of which a last batch of 5 rows has fewer."""

    class Gathers(distfit.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                pairs = y_pred - tf.transpose(y_pred)
                loss = tf.reduce_mean(tf.square(y - y_pred))
                loss += 0.1 * tf.reduce_mean(tf.square(pairs))
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    def build():
        inputs = keras.Input((3,), dtype="int32")
        words = layers.Embedding(20, 4)(inputs)
        model = Gathers(inputs, layers.Dense(1)(layers.Flatten()(words)))
        model.compile("adam", steps_per_execution=fused)
        return model

    generator = np.random.default_rng(0)
    x = generator.integers(0, 20, (37, 3))
    y = generator.normal(size=(37, 1)).astype("float32")

    def fit(model):
        return model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)

    runs = [
        comparing.run(chosen, build, fit) for chosen in (make_strategy(1), strategy)
    ]
    comparing.assert_same(*runs)


def test_gradients_of_different_types_are_summed(make_strategy, strategy):
    """They cannot share a buffer."""

    def build(chosen):
        inputs = keras.Input((8,))
        half = layers.Dense(4, dtype="float64")(inputs)
        model = distfit.Model(inputs, layers.Dense(1)(half))
        model.compile("sgd", "mse")
        return model

    runs = [
        comparing.run(chosen, lambda chosen=chosen: build(chosen), _fit_shuffled)
        for chosen in (make_strategy(1), strategy)
    ]
    comparing.assert_same(*runs)


def test_main_program_and_workers_are_of_this_python(team):
    assert len(set(team.tell("the test", sys.version))) == 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("name", ["shards in parts", "pydataset in parts", "generator"])
def test_each_worker_goes_on_where_it_was(strategy, team, shared, name):
    """With shards each reads rows of its own; the chief alone writes and reads."""
    given = test_resuming.READ[name]
    folder = shared / str(team.index)  # Those of others than the chief stay empty.
    whole = test_resuming.seen(strategy, folder / "whole", given)
    for stop in pick([5], [2, 5]):
        before = test_resuming.seen(strategy, folder / str(stop), given, stop)
        resume = {"resume_from": folder / str(stop)}
        rest = test_resuming.seen(strategy, folder / str(stop), given, **resume)
        assert before + rest == whole
    assert (folder / "whole").exists() == team.is_chief


def test_eager_steps_go_on_on_all_workers(strategy, shared):
    def fit(folder, **arguments):
        given = test_resuming.unknown
        return test_resuming.eagerly(strategy, folder, "lazy", given, **arguments)

    whole = fit(shared / "whole")
    with pytest.raises(test_resuming.StopsError):
        fit(shared / "stopped", stop=5)
    rest = fit(shared / "stopped", resume_from=shared / "stopped")
    test_resuming.assert_same_bits(whole, rest)
