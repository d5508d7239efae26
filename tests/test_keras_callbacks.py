"""Keras's callbacks, and those a user writes, act as in stock Keras on one device.

The reference is a plain `keras.Sequential` without a strategy. Models are made once for
every number of replicas, and start each training from the same state.
"""

import contextlib
import csv
import dataclasses
import functools
import re

import comparing
import keras
import numpy as np
import pytest
from breadth import pick
from keras import layers

import distfit

REPLICAS = pick([3], [2, 3, 4])
ROWS, BATCH = 22, 7  # Batches of 7, 7, 7 and 1 rows, which is fewer than replicas.
STEPS = 4
X, Y = comparing.regression_data(ROWS)
VALIDATION = comparing.regression_data(9, seed=3)


@pytest.fixture(autouse=True)
def clean_session():
    """Unlike elsewhere, models and their compiled steps are kept."""
    keras.utils.set_random_seed(0)


def _mlp(base, optimizer):
    model = base(
        [keras.Input((8,)), layers.Dense(3, activation="tanh"), layers.Dense(1)]
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def _embedding(base):
    """Rows of the table that no batch looks up do not change."""
    model = base([keras.Input((8,)), layers.Embedding(ROWS + 1, 2), layers.Flatten()])
    model.add(layers.Dense(1))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


MODELS = {
    "sgd": lambda base: _mlp(base, keras.optimizers.SGD(0.05)),
    "adam": lambda base: _mlp(base, keras.optimizers.Adam(0.02)),
    "schedule": lambda base: _mlp(
        base,
        keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.9)),
    ),
    "ema": lambda base: _mlp(
        base, keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.7)
    ),
    "embedding": _embedding,
}


def _built(strategy, kind):
    keras.utils.set_random_seed(7)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = MODELS[kind](distfit.Sequential if strategy else keras.Sequential)
        model.optimizer.build(model.trainable_variables)
    return model


@functools.cache
def _cached(strategy, kind):
    model = _built(strategy, kind)
    return model, [v.numpy() for v in _variables(model)]


def _variables(model):
    return [*model.variables, *model.optimizer.variables]


def _model(strategy, kind="sgd"):
    """A model in its initial state."""
    model, state = _cached(strategy, kind)
    for variable, value in zip(_variables(model), state, strict=True):
        variable.assign(value)
    if strategy:
        model.steps_per_execution = 1
    return model


@dataclasses.dataclass
class Outcome(comparing.Run):
    epochs: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)
    model: keras.Model | None = None


def _fit(model, strategy, make_callbacks, data=(X, Y), **arguments):
    """Trains with `make_callbacks(notes)`; a note is a label and a dict of numbers."""
    notes: list = []
    options = {"batch_size": BATCH, "epochs": 4, "shuffle": False, "verbose": 0}
    callbacks = make_callbacks(notes)
    history = model.fit(*data, callbacks=callbacks, **options | arguments)
    if strategy:
        comparing.check_replicas_agree(strategy, model)
    steps = {"iterations": int(model.optimizer.iterations)}
    notes.append(("in the end", steps))
    return Outcome(
        history.history, model.get_weights(), None, None, history.epoch, notes, model
    )


def _assert_same(one, other):
    comparing.assert_same(one, other)
    assert one.epochs == other.epochs
    assert [label for label, _ in one.notes] == [label for label, _ in other.notes]
    for (_, a), (_, b) in zip(one.notes, other.notes, strict=True):
        comparing.assert_close_logs(a, b, 1e-5)


def _assert_as_on_one_device(make_strategy, make_callbacks, kind="sgd", **arguments):
    """Returns the results of one device, to check that the callback had an effect."""
    one = _fit(_model(None, kind), None, make_callbacks, **arguments)
    for replicas in REPLICAS:
        strategy = make_strategy(replicas)
        model = _model(strategy, kind)
        _assert_same(one, _fit(model, strategy, make_callbacks, **arguments))
    return one


class Watches(keras.callbacks.Callback):
    """Records every hook, and the numbers it gets."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes
        for name in dir(self):
            if re.match(r"on_(train|test|epoch|predict)_", name):
                setattr(self, name, functools.partial(self.note, name))

    def note(self, name, step=None, logs=None):
        if isinstance(step, dict):
            step, logs = None, step
        numbers = {k: v for k, v in (logs or {}).items() if k != "outputs"}
        self.notes.append((f"{name} {step}", numbers))


def test_every_hook_is_called_in_order_with_the_numbers_of_one_device(make_strategy):
    one = _assert_as_on_one_device(
        make_strategy,
        lambda notes: [Watches(notes)],
        validation_data=VALIDATION,
        validation_freq=[2, 3],
    )
    labels = [label for label, _ in one.notes]
    assert labels.count("on_train_batch_end 3") == labels.count("on_epoch_end None") + 4
    assert labels.count("on_test_batch_end 1") == 2


@pytest.mark.parametrize("replicas", REPLICAS)
def test_fused_steps_report_the_steps_they_end_at(make_strategy, replicas):
    seen = {}
    for fused in (1, 4, 3):
        model = _model(make_strategy(replicas))
        model.steps_per_execution = fused
        outcome = _fit(model, make_strategy(replicas), lambda n: [Watches(n)])
        seen[fused] = [
            n for n in outcome.notes if n[0].startswith("on_train_batch_end")
        ]
    one = _fit(_model(None), None, lambda n: [Watches(n)])
    single = [n for n in one.notes if n[0].startswith("on_train_batch_end")]
    for fused, ends in ((1, (0, 1, 2, 3)), (4, (3,)), (3, (2, 3))):
        expected = [n for n in single if int(n[0].split()[1]) in ends]
        assert [label for label, _ in seen[fused]] == [label for label, _ in expected]
        for (_, a), (_, b) in zip(expected, seen[fused], strict=True):
            comparing.assert_close_logs(a, b, 1e-5)


def test_hooks_of_evaluate_and_predict(make_strategy):
    def run(strategy):
        notes: list = []
        model = _model(strategy)
        arguments = {"batch_size": 4, "verbose": 0, "callbacks": [Watches(notes)]}
        model.evaluate(X, Y, **arguments)
        model.predict(X, **arguments)
        return notes

    one = run(None)
    assert len(one) == 2 * (2 + 2 * 6)
    for replicas in REPLICAS:
        other = run(make_strategy(replicas))
        assert [label for label, _ in one] == [label for label, _ in other]
        for (_, a), (_, b) in zip(one, other, strict=True):
            comparing.assert_close_logs(a, b, 1e-5)


@pytest.mark.parametrize("fused", [1, 3])
def test_predict_hooks_see_the_outputs_of_the_whole_execution(make_strategy, fused):
    class Keeps(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.outputs = []

        def on_predict_batch_end(self, batch, logs=None):
            self.outputs.append(logs["outputs"])

    keeps = Keeps()
    model = _model(make_strategy(3))
    model.steps_per_execution = fused
    predicted = model.predict(X, batch_size=BATCH, verbose=0, callbacks=[keeps])
    assert [len(o) for o in keeps.outputs] == ([21, 1] if fused == 3 else [7, 7, 7, 1])
    assert all(isinstance(o, np.ndarray) for o in keeps.outputs)
    np.testing.assert_array_equal(np.concatenate(keeps.outputs), predicted)


@pytest.mark.parametrize(
    "make_callback, fewer_rates",
    [
        (lambda: keras.callbacks.LearningRateScheduler(lambda e: 0.05 / (e + 1)), 0),
        (
            lambda: keras.callbacks.ReduceLROnPlateau(
                "val_mae", factor=0.3, patience=1, min_delta=0.5, cooldown=1
            ),
            1,
        ),
    ],
    ids=["scheduler", "plateau"],
)
def test_learning_rates_by_epoch(make_strategy, make_callback, fewer_rates):
    one = _assert_as_on_one_device(
        make_strategy,
        lambda notes: [make_callback()],
        validation_data=VALIDATION,
    )
    assert 4 - fewer_rates >= len(set(one.history["learning_rate"])) > 1


def test_a_schedule_cannot_be_set(make_strategy):
    callback = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)
    for strategy in (None, make_strategy(2)):
        with pytest.raises(TypeError, match="learning rate is not settable"):
            _fit(_model(strategy, "schedule"), strategy, lambda notes: [callback])


class SetsRate(keras.callbacks.Callback):
    """Sets the learning rate for each step, in a hook of the given name."""

    def __init__(self, notes, hook):
        super().__init__()
        self.notes = notes
        setattr(self, hook, self.set)

    def set(self, batch, logs=None):
        rates = self.model.optimizer.learning_rate
        self.notes.append((f"rate at {batch}", {"rate": float(rates)}))
        self.model.optimizer.learning_rate = 0.01 * (batch % 3 + 1)


@pytest.mark.parametrize(
    "hook", pick(["on_batch_end"], ["on_train_batch_begin", "on_batch_end"])
)
def test_learning_rates_by_step(make_strategy, hook):
    one = _assert_as_on_one_device(
        make_strategy, lambda notes: [SetsRate(notes, hook)], kind="adam"
    )
    assert len({numbers["rate"] for _, numbers in one.notes[:-1]}) == 3


def _rising():
    """Rates at which the loss falls first and rises again."""
    return keras.callbacks.LearningRateScheduler(lambda e: [0.01, 0.01, 0.03][e % 3])


STOPS = {
    "restores": {"patience": 1, "restore_best_weights": True},
    "warms up": {"start_from_epoch": 3, "restore_best_weights": True},
    "baseline": {"baseline": 1e-3, "patience": 2, "restore_best_weights": True},
    "last weights": {"patience": 1, "min_delta": 1.0},
}


@pytest.mark.parametrize("name", pick(["warms up", "baseline"], list(STOPS)))
def test_early_stopping(make_strategy, name):
    one = _assert_as_on_one_device(
        make_strategy,
        lambda notes: [
            _rising(),
            keras.callbacks.EarlyStopping(mode="min", **STOPS[name]),
        ],
        validation_data=VALIDATION,
        epochs=9,
    )
    losses = one.history["val_loss"]
    assert 2 <= len(losses) < 9
    assert np.argmin(losses) < len(losses) - 1


@pytest.mark.parametrize("row", pick([9, 21], [7, 9, 10, 12, 13, 21]))
def test_nan_in_one_row_on_any_replica_terminates_at_its_step(make_strategy, row):
    """A step with it spoils what it updates; rows looked up later are intact."""
    y = Y.copy()
    y[row] = np.nan
    tokens = np.repeat(np.arange(ROWS)[:, None], 8, axis=1)
    arguments = {"kind": "embedding", "data": (tokens, y), "epochs": 2}
    one = _assert_as_on_one_device(
        make_strategy, lambda notes: [keras.callbacks.TerminateOnNaN()], **arguments
    )
    assert one.epochs == [0]
    assert one.notes[-1][1]["iterations"] == row // BATCH + 1
    table = one.weights[0]
    assert np.isnan(table[row]).all() and np.isfinite(table[ROWS]).all()


def test_nan_with_an_error_names_the_step_of_one_device(make_strategy):
    y = Y.copy()
    y[12] = np.inf
    for strategy in (None, *map(make_strategy, REPLICAS)):
        with pytest.raises(RuntimeError, match="encountered at batch 1"):
            callback = keras.callbacks.TerminateOnNaN(raise_error=True)
            _fit(_model(strategy), strategy, lambda n, c=callback: [c], data=(X, y))


@pytest.mark.parametrize("swap_on_epoch", pick([True], [False, True]))
def test_swap_of_averaged_weights(make_strategy, swap_on_epoch):
    def callbacks(notes):
        def note(epoch, logs):
            sizes = [float(abs(w).sum()) for w in swap.model.get_weights()]
            notes.append((f"epoch {epoch}", {"sizes": sizes}))

        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
        return [swap, keras.callbacks.LambdaCallback(on_epoch_end=note)]

    arguments = {"kind": "ema", "validation_data": VALIDATION}
    one = _assert_as_on_one_device(make_strategy, callbacks, **arguments)
    plain = _fit(_model(None, "ema"), None, lambda n: [], validation_data=VALIDATION)
    assert abs(one.history["val_loss"][0] - plain.history["val_loss"][0]) > 1e-3
    strategy = make_strategy(3)
    optimizer = _model(strategy, "ema").optimizer
    _fit(_cached(strategy, "ema")[0], strategy, callbacks, validation_data=VALIDATION)
    for variable in optimizer.variables:
        copies = strategy.experimental_local_results(variable.value)
        assert len({c.numpy().tobytes() for c in copies}) == 1


class Stops(keras.callbacks.Callback):
    """Sets `stop_training` in one hook, the second time it is called there."""

    def __init__(self, hook):
        super().__init__()
        self.calls = 0
        setattr(self, hook, self.stop)

    def stop(self, step=None, logs=None):
        self.calls += 1
        self.model.stop_training = self.calls == 2


@pytest.mark.parametrize(
    "hook, epochs, steps",
    [
        ("on_train_batch_begin", 1, 2),
        ("on_train_batch_end", 1, 2),
        ("on_epoch_begin", 2, STEPS + 1),
        ("on_epoch_end", 2, 2 * STEPS),
        ("on_test_end", 2, 2 * STEPS),
    ],
)
def test_stop_training_from_any_hook(make_strategy, hook, epochs, steps):
    one = _assert_as_on_one_device(
        make_strategy, lambda notes: [Stops(hook)], validation_data=VALIDATION
    )
    assert one.epochs == list(range(epochs))
    assert one.notes[-1][1]["iterations"] == steps


def test_stop_evaluating_and_predicting(make_strategy):
    stop = keras.callbacks.LambdaCallback(
        on_test_batch_end=lambda batch, logs: setattr(
            stop.model, "stop_evaluating", batch == 1
        ),
        on_predict_batch_end=lambda batch, logs: setattr(
            stop.model, "stop_predicting", batch == 1
        ),
    )
    arguments = {"batch_size": BATCH, "verbose": 0, "callbacks": [stop]}
    results = []
    for strategy in (None, *map(make_strategy, REPLICAS)):
        model = _model(strategy)
        results.append(model.evaluate(X, Y, **arguments))
        assert len(model.predict(X, **arguments)) == 2 * BATCH
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5)


class UsesModel(keras.callbacks.Callback):
    """Evaluates, predicts and saves in the middle of an epoch and at its end."""

    def __init__(self, notes, path):
        super().__init__()
        self.notes = notes
        self.path = str(path / "latest.weights.h5")

    def on_train_batch_end(self, batch, logs=None):
        self.notes.append((f"step {batch}", dict(logs)))
        if batch == 1:
            self.look()

    def on_epoch_end(self, epoch, logs=None):
        self.look()

    def look(self):
        arguments = {"batch_size": 4, "verbose": 0}
        logs = self.model.evaluate(*VALIDATION, return_dict=True, **arguments)
        predicted = self.model.predict(VALIDATION[0], **arguments)
        self.model.save_weights(self.path)
        self.notes.append(("looked", logs | {"sum": float(predicted.sum())}))


def test_evaluate_predict_and_save_inside_of_hooks(make_strategy, tmp_path):
    """Evaluation resets the metrics of the epoch, as on one device."""
    one = _assert_as_on_one_device(
        make_strategy, lambda notes: [UsesModel(notes, tmp_path)], epochs=2
    )
    assert [label for label, _ in one.notes].count("looked") == 4
    saved = keras.Sequential(
        [keras.Input((8,)), layers.Dense(3, activation="tanh"), layers.Dense(1)]
    )
    saved.load_weights(str(tmp_path / "latest.weights.h5"), skip_mismatch=True)
    for a, b in zip(one.weights, saved.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, pattern",
    [
        ({"save_best_only": True}, "best.weights.h5"),
        ({"save_freq": 3}, "{epoch}-{batch}.weights.h5"),
    ],
    ids=["best", "by steps"],
)
def test_model_checkpoint(make_strategy, tmp_path, arguments, pattern):
    """The same files, which hold the same weights."""
    saved = {}

    def callbacks(folder):
        return lambda notes: [
            _rising(),
            keras.callbacks.ModelCheckpoint(
                folder / pattern, save_weights_only=True, **arguments
            ),
        ]

    for strategy in (None, *map(make_strategy, REPLICAS)):
        replicas = strategy.num_replicas_in_sync if strategy else 0
        folder = tmp_path / str(replicas)
        model = _model(strategy)
        _fit(model, strategy, callbacks(folder), validation_data=VALIDATION, epochs=6)
        saved[replicas] = {}
        for path in sorted(folder.iterdir()):
            model.load_weights(path)
            saved[replicas][path.name] = model.get_weights()
    for other in (saved[n] for n in REPLICAS):
        assert saved[0].keys() == other.keys()
        for name, weights in saved[0].items():
            for a, b in zip(weights, other[name], strict=True):
                np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
    assert len(saved[0]) == (1 if "best" in pattern else 6 * STEPS // 3)


class Interrupts(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("first, then", pick([(2, 3)], [(2, 2), (2, 3), (None, 4)]))
def test_backup_resumes_at_the_epoch(make_strategy, tmp_path, first, then):
    """Adam's moments and step count come back too, on any number of replicas."""
    plain = _fit(_model(None, "adam"), None, lambda notes: [])
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    strategy = first and make_strategy(first)
    with pytest.raises(KeyboardInterrupt):
        _fit(_model(strategy, "adam"), strategy, lambda n: [backup, Interrupts()])
    strategy = make_strategy(then)
    resumed = _fit(_built(strategy, "adam"), strategy, lambda n: [backup])
    assert resumed.epochs == [2, 3]
    assert resumed.notes == plain.notes
    last = {name: values[2:] for name, values in plain.history.items()}
    comparing.assert_close_logs(last, resumed.history, 1e-5)
    for a, b in zip(plain.weights, resumed.weights, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_csv_logger(make_strategy, tmp_path):
    def log(strategy):
        path = tmp_path / "log.csv"
        logger = keras.callbacks.CSVLogger(path)
        model = _model(strategy)
        _fit(model, strategy, lambda notes: [logger], validation_data=VALIDATION)
        with open(path) as file:
            return list(csv.DictReader(file))

    one = log(None)
    assert list(one[0]) == ["epoch", "loss", "mae", "val_loss", "val_mae"]
    for replicas in REPLICAS:
        for a, b in zip(one, log(make_strategy(replicas)), strict=True):
            numbers = ({k: float(v) for k, v in row.items()} for row in (a, b))
            comparing.assert_close_logs(*numbers, 1e-5)


class Summary:
    """Stands in for `tf.summary`, which needs TensorBoard to be installed."""

    def __init__(self):
        self.notes: list = []

    def create_file_writer(self, folder):
        return self

    def as_default(self, step=None):
        return contextlib.nullcontext()

    def record_if(self, condition):
        return contextlib.nullcontext()

    def scalar(self, name, value, step):
        self.notes.append((f"{name} {int(step)}", {"value": float(value)}))

    def histogram(self, name, weight, step):
        which = re.sub(r"_\d+", "", name)  # Names are numbered as models are made.
        size = float(np.abs(weight.numpy()).sum())
        self.notes.append((f"histogram {which} {step}", {"size": size}))

    def flush(self):
        pass

    def close(self):
        pass


class Board(keras.callbacks.TensorBoard):
    summary: Summary = Summary()


@pytest.mark.parametrize("update_freq", ["epoch", 1])
def test_tensorboard(make_strategy, tmp_path, update_freq):
    def callbacks(notes):
        board = Board(
            tmp_path, write_graph=False, update_freq=update_freq, histogram_freq=2
        )
        board.summary = Summary()
        board.summary.notes = notes
        return [board]

    one = _assert_as_on_one_device(make_strategy, callbacks, validation_data=VALIDATION)
    labels = [label for label, _ in one.notes]
    assert {"batch_loss 16", "epoch_mae 3", "epoch_learning_rate 0"} <= set(labels)
    assert sum(label.startswith("histogram") for label in labels) == 2 * 4


def test_progress_bar_of_keras_prints_what_it_prints_on_one_device(
    make_strategy, capsys
):
    def shown(strategy):
        callback = keras.callbacks.ProgbarLogger()
        _fit(_model(strategy), strategy, lambda notes: [callback], verbose=1, epochs=2)
        lines = re.split(r"[\r\n]+", capsys.readouterr().out)
        last = [line for line in lines if "4/4" in line][-1]
        return {k: float(v) for k, v in re.findall(r"(loss|mae): (\S+)", last)}

    one = shown(None)
    assert set(one) == {"loss", "mae"}
    for replicas in REPLICAS:
        assert shown(make_strategy(replicas)) == pytest.approx(one, abs=1.1e-4)


def test_histories_and_lists_that_the_user_brings(make_strategy):
    history = keras.callbacks.History()
    model = _model(make_strategy(2))
    assert model.fit(X, Y, verbose=0, callbacks=history) is history
    notes: list = []
    listed = keras.callbacks.CallbackList(
        [Watches(notes), history], model=model, epochs=1, steps=1, verbose=0
    )
    assert model.fit(X, Y, verbose=0, callbacks=listed) is history
    labels = [label for label, _ in notes]
    assert labels == [
        "on_train_begin None",
        "on_epoch_begin 0",
        "on_train_batch_begin 0",
        "on_train_batch_end 0",
        "on_epoch_end 0",
        "on_train_end None",
    ]
    assert notes[3][1] == notes[4][1]
    assert history.params == {"epochs": 1, "steps": 1, "verbose": 0}


def test_batch_hooks_get_their_logs_by_name(make_strategy):
    seen = []

    class ByName(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, *, logs):
            seen.append(logs)

        def on_train_batch_end(self, batch, *, logs):
            seen.append(dict(logs))

    for strategy in (None, make_strategy(2)):
        _fit(_model(strategy), strategy, lambda notes: [ByName()], epochs=1)
    one, two = seen[: 2 * STEPS], seen[2 * STEPS :]
    assert one[0] == two[0] == {}
    for a, b in zip(one, two, strict=True):
        comparing.assert_close_logs(a, b, 1e-5)
