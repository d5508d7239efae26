"""A training that goes on after a stop ends with the bits of one without a stop."""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import examples, numbers_of_replicas, only_exhaustive, pick
from keras import layers

import distfit
from distfit.callbacks import Checkpoint, states
from distfit.cluster import workers
from distfit.training import checkpoint, global_batches, passes, resuming
from distfit.training.global_batches import GlobalBatches
from distfit.training.passes import passes_of

ROWS, BATCH, EPOCHS = 23, 7, 3  # Four batches an epoch, the last of two rows.


class StopsError(Exception):
    pass


class StopsAt(keras.callbacks.Callback):
    """Raises an error after so many steps, when all that was due is saved."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def get_state(self):
        return {}

    def set_state(self, state):
        pass

    def on_train_batch_begin(self, batch, logs=None):
        if self.left == 0:
            raise StopsError
        self.left -= 1

    def on_epoch_end(self, epoch, logs=None):
        pass


class Asks(StopsAt):
    """Asks a Checkpoint to stop, as a signal handler does, after so many steps."""

    def __init__(self, step, checkpoints):
        super().__init__(step)
        self.checkpoints = checkpoints

    def on_train_batch_begin(self, batch, logs=None):
        if self.left == 0:
            self.checkpoints.request_stop(143)
        self.left -= 1


def build():
    """Dropout, unseeded noise, BatchNormalization, averaged weights."""
    model = distfit.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.GaussianNoise(0.1, seed=3),
            layers.Dense(1),
        ]
    )
    optimizer = keras.optimizers.Adam(0.01, use_ema=True, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 4)).astype("float32")
    return x, x.sum(1, keepdims=True)


def arrays():
    x, y = data()
    return {"x": x, "y": y, "batch_size": BATCH}


def shuffled():
    dataset = tf.data.Dataset.from_tensor_slices(data())
    return {"x": dataset.shuffle(ROWS, seed=1).batch(BATCH)}


def unknown():
    return {"x": shuffled()["x"].filter(lambda x, y: True)}


def repeated():
    return {"x": shuffled()["x"].repeat(), "steps_per_epoch": 3}


INPUTS = {f.__name__: f for f in (arrays, shuffled, unknown, repeated)}


def train(strategy, folder, given, stop=-1, callbacks=(), **arguments):
    keras.utils.set_random_seed(5)
    with strategy.scope():
        model = build()
    callbacks = [
        StopsAt(stop),
        keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=1.0),
        *([Checkpoint(folder, every=["1steps", "1epoch"])] if folder else []),
        *callbacks,
    ]
    options = {"epochs": EPOCHS, "verbose": 0, **given(), **arguments}
    history = distfit.fit(model, callbacks=callbacks, **options)
    return model, history


def assert_same_bits(one, other):
    for a, b in zip(one[0].variables, other[0].variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    pairs = zip(one[0].optimizer.variables, other[0].optimizer.variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert one[1].history == other[1].history
    assert one[1].epoch == other[1].epoch


# Others here go on with arrays and with datasets of a known length.
@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [1, 2, 3]))
@pytest.mark.parametrize("name", pick(["unknown"], list(INPUTS)))
def test_a_stopped_training_goes_on_bit_for_bit(
    make_strategy, tmp_path, name, replicas
):
    strategy = make_strategy(replicas)

    def given():
        return INPUTS[name]() | {"validation_data": data()}

    whole = train(strategy, tmp_path / "whole", given)
    for stop in pick([6], [1, 4, 6]):
        folder = tmp_path / str(stop)
        with pytest.raises(StopsError):
            train(strategy, folder, given, stop)
        rest = train(strategy, folder, given, resume_from=folder)
        assert_same_bits(whole, rest)


def test_other_numbers_of_replicas_go_on_to_the_same_numbers(make_strategy, tmp_path):
    """Also parts of sums, which are summed: metrics, accumulated gradients."""
    whole = train(make_strategy(2), tmp_path / "whole", arrays)
    folder = tmp_path / "two"
    with pytest.raises(StopsError):
        train(make_strategy(3), folder, arrays, 6)
    rest = train(make_strategy(2), folder, arrays, resume_from=folder)
    one, other = (comparing.Run(h.history, m.get_weights()) for m, h in (whole, rest))
    comparing.assert_same(one, other)


@pytest.fixture(scope="module")
def stopped(make_strategy, tmp_path_factory):
    """A folder of checkpoints of a training that was stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(StopsError):
        train(make_strategy(1), folder, arrays, 6)
    return folder


@pytest.fixture(scope="module")
def whole(make_strategy, tmp_path_factory):
    return train(make_strategy(1), tmp_path_factory.mktemp("whole"), arrays)


def test_a_finished_training_is_left_as_it_is(make_strategy, whole, tmp_path):
    train(make_strategy(1), tmp_path, arrays)
    again = train(make_strategy(1), tmp_path, arrays, resume_from=tmp_path)
    assert_same_bits(whole, again)
    more = train(make_strategy(1), tmp_path, arrays, resume_from=tmp_path, epochs=5)
    longer = train(make_strategy(1), tmp_path / "longer", arrays, epochs=5)
    assert_same_bits(longer, more)


def test_an_empty_folder_starts_anew(make_strategy, whole, tmp_path):
    first = train(make_strategy(1), tmp_path, arrays, resume_from=tmp_path)
    assert_same_bits(whole, first)


def _truncate(path):
    (path / "tensors.index").write_bytes(b"")


def _flip(path):
    file = path / "tensors.data-00000-of-00001"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _change(path, **changed):
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


DAMAGES = {
    "truncated": (_truncate, "tensors.index was changed: it has 0 bytes"),
    "one bit flipped": (_flip, "tensors.data-00000-of-00001 was changed"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "No such file"),
    "no tensors": (lambda p: (p / "tensors.index").unlink(), "No such file"),
    "not JSON": (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
    "foreign": (lambda p: (p / "manifest.json").write_text("[]"), "not a manifest"),
    "manifest changed": (lambda p: _change(p, epoch=9), "manifest.json was changed"),
    "newer format": (
        lambda p: _change(p, format=checkpoint.FORMAT + 1),
        f"the format {checkpoint.FORMAT + 1}; this distfit",
    ),
}


@pytest.fixture
def damaged(stopped, tmp_path):
    """`damaged(name)`: a folder whose latest checkpoint has that damage."""

    def make(name):
        folder = tmp_path / "damaged"
        shutil.copytree(stopped, folder)
        *_, latest = checkpoint.steps(folder)
        DAMAGES[name][0](folder / f"step-{latest}")
        return folder

    return make


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    make_strategy, damaged, caplog, name
):
    folder = damaged(name)
    *_, earlier, _ = checkpoint.steps(folder)
    found = resuming.load(workers.of(make_strategy(1)), folder)
    assert DAMAGES[name][1] in caplog.text
    assert found.path == folder / f"step-{earlier}"


@pytest.mark.parametrize("name", pick(["one bit flipped"], list(DAMAGES)))
def test_a_training_goes_on_from_before_a_damaged_checkpoint(
    make_strategy, damaged, whole, caplog, capsys, name
):
    caplog.set_level("INFO", "distfit")
    message, folder = DAMAGES[name][1], damaged(name)
    rest = train(make_strategy(1), folder, arrays, resume_from=folder)
    assert message in caplog.text
    assert f"Going on from {folder}/step-5: epoch 2, step 2." in caplog.text
    assert capsys.readouterr().out == ""
    assert_same_bits(whole, rest)


@pytest.mark.parametrize("later", [0, 3], ids=["at this step", "later"])
def test_a_checkpoint_of_another_version_is_put_aside(tmp_path, later):
    for step in (1, 2, 2 + later):
        checkpoint.write(tmp_path, step, {"a": np.ones(2)}, {})
    theirs = checkpoint.path_of(tmp_path, 2 + later)
    _change(theirs, format=checkpoint.FORMAT + 1)
    content = (theirs / "manifest.json").read_bytes()
    checkpoint.write(tmp_path, 2, {"a": np.ones(2)}, {})
    checkpoint.prune(tmp_path, 2, latest=2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    aside = tmp_path / f"step-{2 + later}.0.of-another-version"
    assert (aside / "manifest.json").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 3


def test_folders_of_damaged_checkpoints_alone_are_refused(
    make_strategy, stopped, tmp_path
):
    shutil.copytree(stopped, tmp_path / "damaged")
    for step in checkpoint.steps(tmp_path / "damaged"):
        _flip(tmp_path / "damaged" / f"step-{step}")
    with pytest.raises(ValueError, match="No checkpoint can be used. Received: .*step"):
        train(make_strategy(1), tmp_path, arrays, resume_from=tmp_path / "damaged")


OTHERS = {
    "data": ({"batch_size": 5}, "batch size of the data is 5 and was 7"),
    "validation": ({"validation_data": data()}, "validation data"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_training_is_refused(
    make_strategy, stopped, tmp_path, name
):
    arguments, message = OTHERS[name]
    with pytest.raises(ValueError, match=f"of another training. Received: .*{message}"):
        train(make_strategy(1), tmp_path, arrays, resume_from=stopped, **arguments)


class Halves(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that does not tell its settings."""

    def __call__(self, step):
        return 0.1 / (1.0 + tf.cast(step, tf.float32))


def cosine(rate):
    return keras.optimizers.schedules.CosineDecay(rate, 9)


@pytest.mark.parametrize(
    "one, other, message",
    [
        ((Halves(),), (cosine(0.1),), "'schedule': "),
        ((cosine(0.1),), (cosine(0.2),), "learning_rate': 0.2"),
        *pick(
            [],
            [
                ((cosine(0.1),), (0.1,), "'schedule': "),
                ((0.1,), (0.1, 0.5), "'momentum': 0.5"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("inner", pick([True], [False, True]))
def test_a_checkpoint_of_another_schedule_is_refused(
    make_strategy, tmp_path, one, other, message, inner
):
    def fit(settings):
        with make_strategy(1).scope():
            model = distfit.Sequential([keras.Input((4,)), layers.Dense(1)])
            sgd = keras.optimizers.SGD(*settings)
            scaled = keras.optimizers.LossScaleOptimizer(sgd) if inner else sgd
            model.compile(scaled, "mse")
        callbacks = [Checkpoint(tmp_path)]
        model.fit(*data(), verbose=0, callbacks=callbacks, resume_from=tmp_path)

    fit(one)
    with pytest.raises(ValueError, match=f"of another training. .*{message}"):
        fit(other)


@pytest.mark.parametrize(
    "layer, arguments, message",
    [
        (layers.Dropout(0.5), {}, "'rate': 0.5"),
        (layers.Dropout(0.3), {"shuffle": False}, "shuffle of the data is False"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    make_strategy, tmp_path, layer, arguments, message
):
    def fit(layer, **arguments):
        with make_strategy(1).scope():
            model = distfit.Sequential([keras.Input((4,)), layer, layers.Dense(1)])
            model.compile("sgd", "mse")
        arguments |= {"callbacks": [Checkpoint(tmp_path)], "resume_from": tmp_path}
        model.fit(*data(), verbose=0, **arguments)

    fit(layers.Dropout(0.3))
    with pytest.raises(ValueError, match=f"of another training. .*{message}"):
        fit(layer, **arguments)


def test_a_learning_rate_that_is_not_used_is_named(make_strategy, tmp_path):
    def fit(model, **arguments):
        callbacks = [
            Checkpoint(tmp_path),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.fit(
                *data(),
                verbose=0,
                callbacks=callbacks,
                resume_from=tmp_path,
                **arguments,
            )

    def made(rate):
        with make_strategy(2).scope():
            model = distfit.Sequential([keras.Input((4,)), layers.Dense(1)])
            model.compile(keras.optimizers.SGD(rate), "mse")
        return model

    model = made(0.5)
    fit(model)  # 0.25
    fit(model, epochs=2)  # 0.125
    fit(made(0.5), epochs=3)  # As at the start.
    model = made(0.4)
    message = "is that of the checkpoint: 0.0625. Received: a model with 0.4"
    with pytest.raises(UserWarning, match=message):
        fit(model, epochs=4)


def test_data_in_another_order_are_refused(make_strategy, tmp_path):
    numbers = itertools.count()

    def given():
        dataset = tf.data.Dataset.from_tensor_slices(data())
        return {"x": dataset.shuffle(ROWS, seed=next(numbers)).batch(BATCH)}

    with pytest.raises(StopsError):
        train(make_strategy(1), tmp_path, given, 2)
    with pytest.raises(ValueError, match="come in another order"):
        train(make_strategy(1), tmp_path, given, resume_from=tmp_path)


def test_the_latest_are_kept_and_nothing_unfinished(make_strategy, tmp_path):
    train(make_strategy(1), tmp_path, arrays)
    assert checkpoint.steps(tmp_path) == [10, 11, 12]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("step", pick([5], [0, 5, 11]))
def test_a_training_that_is_asked_to_stop_saves_and_goes_on(
    make_strategy, whole, tmp_path, step
):
    """Nothing was due: what it goes on from is what it saved when it was asked."""
    checkpoints = Checkpoint(tmp_path, every="1000steps")
    with pytest.raises(SystemExit) as end:
        callbacks = [Asks(step, checkpoints), checkpoints]
        train(make_strategy(1), None, arrays, callbacks=callbacks)
    assert end.value.code == 143
    assert [p.name for p in tmp_path.iterdir()] == [f"step-{step + 1}"]
    again = Checkpoint(tmp_path)
    callbacks = [Asks(-1, again), again]
    resumed = train(
        make_strategy(1), None, arrays, callbacks=callbacks, resume_from=tmp_path
    )
    assert_same_bits(resumed, whole)


class AsksInValidation(StopsAt):
    """Acts before a step of the validation of the second epoch."""

    def __init__(self, act=None):
        super().__init__(-1)
        self.act, self.epoch = act, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_test_batch_begin(self, batch, logs=None):
        if self.act and (self.epoch, batch) == (1, 2):
            self.act()


def in_validation(strategy, folder, given, act=None, every="1000steps", **arguments):
    checkpoints = Checkpoint(folder, every=every)
    acts = AsksInValidation(act and (lambda: act(checkpoints)))
    callbacks = [acts, *arguments.pop("more", []), checkpoints]
    held_out = {"validation_data": data(), "validation_batch_size": 4}
    arguments = held_out | arguments
    return train(strategy, None, given, callbacks=callbacks, **arguments)


def later(checkpoints):
    """So that what is due by the time is due."""
    checkpoints._last_time -= 100


@pytest.mark.parametrize("replicas", numbers_of_replicas([2], [1, 2, 3]))
@pytest.mark.parametrize(
    "name, stops",
    pick([("unknown", False)], list(itertools.product(INPUTS, [False, True]))),
)
def test_a_training_that_is_asked_to_stop_in_validation_goes_on_before_it(
    make_strategy, tmp_path, name, replicas, stops
):
    """Metrics and draws of the validation are those of one from its beginning."""
    strategy, given = make_strategy(replicas), INPUTS[name]

    def run(name, act=None, stop=6, **arguments):
        more = [Stops(stop)] if stops else []
        folder = tmp_path / name
        return in_validation(strategy, folder, given, act, more=more, **arguments)

    whole = run("whole")
    with pytest.raises(SystemExit):
        run("stopped", Checkpoint.request_stop)
    folder = tmp_path / "stopped"
    (step,) = checkpoint.steps(folder)
    assert step == (6 if stops or name == "repeated" else 8)
    assert_same_bits(run("stopped", stop=-1, resume_from=folder), whole)


def test_the_best_are_kept_where_steps_end_with_the_epoch(make_strategy, tmp_path):
    """Whatever the validation does between the last step and the end of the epoch."""
    saves = Checkpoint(
        tmp_path, every=["4steps", "90s"], monitor="val_loss", mode="max"
    )
    due = AsksInValidation(lambda: later(saves))
    given = {"validation_data": data(), "validation_batch_size": 4}
    train(make_strategy(1), None, arrays, callbacks=[due, saves], **given)
    manifests = [manifest for _, manifest in checkpoint.manifests(tmp_path)]
    assert [m["epoch"] for m in manifests] == [3, 2, 1]
    assert all("val_loss" in m["logs"] for m in manifests)


def test_a_save_that_is_due_in_validation_is_not_the_end_of_the_epoch(
    make_strategy, tmp_path
):
    strategy = make_strategy(2)

    def fails(checkpoints):
        later(checkpoints)
        steps.append(checkpoints.saved_step)

    steps: list[int | None] = []
    arguments = {"every": "90s", "epochs": 2}
    whole = in_validation(strategy, tmp_path, arrays, fails, **arguments)
    assert steps == [None] and checkpoint.steps(tmp_path) == [8]
    manifest = checkpoint.read_manifest(tmp_path / "step-8")
    assert (manifest["epoch"], manifest["step of the epoch"]) == (2, 0)
    more = in_validation(strategy, tmp_path, arrays, epochs=3, resume_from=tmp_path)
    assert more[1].history["val_loss"][:2] == whole[1].history["val_loss"]


def test_the_end_is_saved_so_that_more_epochs_can_follow(
    make_strategy, whole, tmp_path
):
    checkpoints = Checkpoint(tmp_path, every="3steps")
    train(make_strategy(1), None, arrays, callbacks=[checkpoints], epochs=1)
    assert sorted(checkpoint.steps(tmp_path)) == [3, 4]
    more = train(make_strategy(1), tmp_path, arrays, resume_from=tmp_path)
    assert_same_bits(more, whole)


def test_the_best_are_kept_beside_the_latest_two(make_strategy, tmp_path):
    losses = iter([0.5, 0.2, float("nan"), 0.4, 0.3, 0.6, 0.7])

    class Log(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["noted"] = next(losses)

    options = {"every": ["2steps", "1epoch"], "keep": 2, "monitor": "noted"}
    kept = Checkpoint(tmp_path, **options)
    train(make_strategy(1), None, arrays, callbacks=[Log(), kept], epochs=7)
    assert checkpoint.steps(tmp_path) == [8, 20, 26, 28]
    best = checkpoint.Best("noted", "max", 1)
    assert best.steps(tmp_path) == [28]


def test_a_monitored_name_that_an_epoch_does_not_log_is_named(make_strategy, tmp_path):
    kept = Checkpoint(tmp_path, monitor="val_loss")
    with pytest.warns(UserWarning, match="monitor='val_loss', logs of loss, mae"):
        train(make_strategy(1), None, arrays, callbacks=[kept])
    assert checkpoint.steps(tmp_path) == [8, 12]


class Stops(StopsAt):
    """Stops the training of its own after so many steps, as TerminateOnNaN does."""

    def on_train_batch_begin(self, batch, logs=None):
        self.left -= 1

    def on_train_batch_end(self, batch, logs=None):
        if self.left == 0:
            self.model.stop_training = True


@pytest.mark.parametrize("replicas", numbers_of_replicas([2], [1, 2, 3]))
def test_a_stop_in_an_epoch_is_part_of_a_checkpoint(make_strategy, tmp_path, replicas):
    """The training is killed in the validation that follows."""
    strategy = make_strategy(replicas)

    class Dies(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise StopsError

    def run(folder, *more, **arguments):
        given = {"validation_data": data(), "callbacks": [Stops(6), *more]}
        return train(strategy, folder, arrays, **given, **arguments)

    whole = run(tmp_path / "whole", keras.callbacks.Callback())
    with pytest.raises(StopsError):
        run(tmp_path / "killed", Dies(), validation_freq=[2])
    shutil.copytree(tmp_path / "killed", tmp_path / "again")
    callback = type("Dies", (keras.callbacks.Callback,), {})()
    rest = run(
        tmp_path / "again",
        callback,
        validation_freq=[2],
        resume_from=tmp_path / "again",
    )
    assert len(rest[1].epoch) == len(whole[1].epoch) == 2
    for a, b in zip(rest[0].variables, whole[0].variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_checkpoints_of_another_training_are_not_overwritten_by_one_that_goes_on(
    make_strategy, stopped, tmp_path
):
    train(make_strategy(1), tmp_path, arrays)
    before = checkpoint.steps(tmp_path)
    with pytest.raises(ValueError, match="checkpoints of another training"):
        train(make_strategy(1), tmp_path, arrays, resume_from=stopped)
    assert checkpoint.steps(tmp_path) == before


DISK = """
import pathlib, resource, signal, sys, time, numpy as np, keras, distfit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Fill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 5:
            while not pathlib.Path(on_error, "step-4").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        print(on_error, "step", batch, flush=True)
model = distfit.Sequential([keras.Input((4,)), keras.layers.Dense(300)])
model.compile("adam", "mse")
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for on_error in ("warn", "raise"):  # The last ends the process.
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saves = distfit.callbacks.Checkpoint(on_error, every="2steps", on_error=on_error)
    model.fit(np.ones((40, 4)), np.ones((40, 300)), batch_size=2, verbose=0,
              callbacks=[saves, Fill()])
    print(on_error, "ended after", saves.latest, flush=True)
"""


@pytest.mark.integration
def test_a_full_disk_stops_the_training_at_the_next_step_and_harms_nothing(tmp_path):
    """The system refuses to write any file beyond 2000 bytes."""
    run = subprocess.run(
        [sys.executable, "-c", DISK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert "warn step 19" in run.stdout and "warn ended after warn/step-4" in run.stdout
    assert "raise step 5" in run.stdout and "raise step 19" not in run.stdout
    warned, raised = run.stderr.split("Traceback", 1)
    for on_error, text in (("warn", warned), ("raise", raised)):
        cause = f"File too large: '{on_error}/step-6'"
        assert f"A checkpoint could not be written: {cause}. Received: " in text
        found = checkpoint.steps(tmp_path / on_error)
        assert found[-1] == 4 and len(found) == 2
        for step in found:
            checkpoint.read(tmp_path / on_error / f"step-{step}")
        assert not list((tmp_path / on_error).glob(".unfinished*"))


@pytest.mark.parametrize("every", ["", "0steps", "5", "step", "1 week"])
def test_when_to_save_must_be_clear(every, tmp_path):
    with pytest.raises(ValueError, match="Received: every="):
        Checkpoint(tmp_path, every)


def test_one_checkpoint_is_not_enough(tmp_path):
    with pytest.raises(ValueError, match="Received: keep=1"):
        Checkpoint(tmp_path, keep=1)


def test_a_folder_that_cannot_be_written_stops_the_training(make_strategy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="A checkpoint could not be written"):
        train(make_strategy(1), tmp_path / "file", arrays)


def test_draws_that_count_themselves_are_named(make_strategy, tmp_path):
    class Draws(distfit.Model):
        def train_step(self, data):
            return {"noise": tf.reduce_mean(tf.random.normal(tf.shape(data[0])))}

    def fit(model, folder, **options):
        with make_strategy(2).scope():
            model = model()
            model.compile(**options)
        model.fit(**arrays(), verbose=0, callbacks=[Checkpoint(folder)])

    with pytest.warns(UserWarning, match="draws their first numbers again.*normal"):
        fit(Draws, tmp_path / "compiled")
    fit(Draws, tmp_path / "eager", run_eagerly=True)  # TensorFlow's generator seeds it.

    class Seeded(distfit.Model):
        def train_step(self, data):
            return {"noise": tf.random.normal([], seed=3)}

    with pytest.warns(UserWarning, match="Received: RandomStandardNormal in an eager"):
        fit(Seeded, tmp_path / "seeded", run_eagerly=True)


def divided():
    return arrays() | {"steps_per_epoch": 2}  # A pass ends with every second epoch.


# Arrays go on from the end of an epoch where more epochs follow.
@pytest.mark.parametrize("given", pick([unknown], [divided, arrays, unknown]))
def test_going_on_from_the_end_of_an_epoch(make_strategy, tmp_path, given):
    """Nothing is left to read of the pass; logs of the epoch are there already."""
    whole = train(make_strategy(1), tmp_path / "whole", given)
    for epochs in pick([2], [1, 2]):
        folder = tmp_path / str(epochs)
        train(make_strategy(1), folder, given, epochs=epochs)
        rest = train(make_strategy(1), folder, given, resume_from=folder)
        assert_same_bits(whole, rest)


def test_going_on_without_saving_again(make_strategy, tmp_path, capsys):
    whole = train(make_strategy(1), tmp_path / "whole", shuffled)
    folder = tmp_path / "stopped"
    with pytest.raises(StopsError):
        train(make_strategy(1), folder, shuffled, 6)
    rest = train(make_strategy(1), None, shuffled, resume_from=folder, verbose=2)
    assert_same_bits(whole, rest)
    place = f"Going on from {folder}/step-6: epoch 2, step 3.\n"
    assert capsys.readouterr().out.startswith(f"{place}Epoch 2/3\n")


def test_fused_steps_go_on_where_an_execution_ended(make_strategy, tmp_path):
    def fused(folder, stop=-1, **arguments):
        keras.utils.set_random_seed(5)
        with make_strategy(2).scope():
            model = build()
        model.steps_per_execution = 3
        callbacks = [StopsAt(stop), Checkpoint(folder, "3steps")]
        options = {**shuffled(), "epochs": 3, "verbose": 0, **arguments}
        return model, model.fit(callbacks=callbacks, **options)

    whole = fused(tmp_path / "whole")
    with pytest.raises(StopsError):
        fused(tmp_path / "fused", 3)
    rest = fused(tmp_path / "fused", resume_from=tmp_path / "fused")
    assert_same_bits(whole, rest)


def test_arrays_are_shuffled_alike_without_a_seed(make_strategy, tmp_path):
    """TensorFlow draws a new order in every process unless it is seeded."""
    from tensorflow.python.eager import context

    rows = []

    class Watches(distfit.Model):
        def train_step(self, data):
            return {"rows": data}

    def fit(stop, **arguments):
        context.context()._seed = None
        vars(context.context()).pop("_rng", None)  # As in a new process.
        with make_strategy(1).scope():
            model = Watches()
            model.compile()
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: rows.extend(logs["rows"])
        )
        callbacks = [StopsAt(stop), note, Checkpoint(tmp_path, "1steps")]
        x = np.arange(20, dtype="float32")
        model.fit(x, batch_size=4, verbose=0, callbacks=callbacks, **arguments)

    with pytest.raises(StopsError):
        fit(2)
    fit(-1, resume_from=tmp_path)
    assert sorted(map(float, rows)) == list(range(20))


def test_the_log_file_of_keras_has_every_epoch_once(make_strategy, tmp_path):
    def fit(name, stop=-1, **arguments):
        keras.utils.set_random_seed(5)
        with make_strategy(1).scope():
            model = build()
        log = keras.callbacks.CSVLogger(str(tmp_path / f"{name}.csv"))
        callbacks = [StopsAt(stop), log, Checkpoint(tmp_path / name, "1epoch")]
        try:
            model.fit(**arrays(), epochs=3, verbose=0, callbacks=callbacks, **arguments)
        finally:
            log.csv_file.close()  # Keras closes it at the end of a training alone.

    fit("whole")
    with pytest.raises(StopsError):
        fit("stopped", 9)
    fit("stopped", resume_from=tmp_path / "stopped")
    one, other = ((tmp_path / f"{n}.csv").read_text() for n in ("whole", "stopped"))
    assert one == other and one.count("\n") == 4


class Batches(keras.utils.PyDataset):
    """Draws from every generator, in batches and between epochs; its order changes."""

    def __init__(self, length: int | None = 4, **options):
        super().__init__(**options)
        self.length = length
        self.offset, self.rng = 0, np.random.default_rng(7)
        self.python, self.legacy = random.Random(8), np.random.RandomState(9)

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, index):
        x, y = data()
        rows = (np.arange(BATCH) + index * BATCH + self.offset) % ROWS
        noise = np.random.normal() + self.rng.normal() + self.legacy.normal()
        x = x[rows] + noise + random.random() + self.python.random()
        return x.astype("float32"), y[rows]

    def on_epoch_begin(self):
        self.offset += int(self.rng.integers(ROWS))

    def on_epoch_end(self):
        self.offset += np.random.randint(ROWS) + random.randrange(ROWS)


class Plain(Batches):
    """Draws nothing in its batches, which several threads may read."""

    def __getitem__(self, index):
        x, y = data()
        rows = (np.arange(BATCH) + index * BATCH + self.offset) % ROWS
        return x[rows], y[rows]


def generator(batches=100):
    rng = np.random.default_rng(3)
    for index in range(batches):
        x, y = data()
        noise = rng.normal() + np.random.normal() + random.random()
        yield (x[index % 9 :][:BATCH] + noise).astype("float32"), y[index % 9 :][:BATCH]


def sharded(context):
    """Other rows, and another number of them, for each worker."""
    dataset = tf.data.Dataset.from_tensor_slices(data())
    dataset = dataset.shard(context.num_input_pipelines, context.input_pipeline_id)
    return dataset.shuffle(ROWS, seed=1).batch(3)


READ = {
    "pydataset": lambda: {"x": Batches()},
    "pydataset in parts": lambda: {"x": Batches(), "steps_per_epoch": 3},
    "pydataset in order": lambda: {"x": Batches(), "shuffle": False},
    "endless pydataset": lambda: {
        "x": Batches(None),
        "steps_per_epoch": 3,
        "shuffle": False,
    },
    "threads": lambda: {"x": Plain(workers=2), "steps_per_epoch": 3},
    "generator": lambda: {"x": generator(), "steps_per_epoch": 4},
    "generator once": lambda: {"x": generator(7)},
    "shards": lambda: {"x": sharded},
    "shards in parts": lambda: {"x": sharded, "steps_per_epoch": 2},
    "unknown": lambda: unknown(),
    "validated by a pydataset": lambda: {"x": Batches(), "validation_data": Batches()},
    "validated by a part": lambda: {
        "x": generator(),
        "steps_per_epoch": 3,
        "validation_data": Batches(),
        "validation_steps": 2,
    },
    "validated by a generator": lambda: {
        "x": Batches(),
        "validation_data": generator(),
        "validation_steps": 2,
    },
    "validated by shards": lambda: {"x": Batches(), "validation_data": sharded},
}


def _shuffled(seed=1):
    return tf.data.Dataset.from_tensor_slices(data()).shuffle(ROWS, seed=seed)


def _augmented():
    noise = layers.GaussianNoise(0.1, seed=2)
    return _shuffled().map(lambda x, y: (noise(x, training=True), y))


def _drawn():
    noise = tf.random.Generator.from_seed(3)
    return _shuffled().map(lambda x, y: (x + noise.normal([4]), y))


# Pipelines of which a pass depends on how far the ones before it were read.
DEPENDENT = {
    "shuffled in each repetition": lambda: _shuffled().repeat(2),
    "an order in a cache": lambda: _shuffled().cache(),
    "two shuffled parts": lambda: _shuffled().concatenate(_shuffled(2)),
    "augmented by a layer": _augmented,
    "with numbers drawn": _drawn,
}
INDEPENDENT = {
    "plain": lambda: tf.data.Dataset.from_tensor_slices(data()),
    "shuffled": _shuffled,
    "cached, then shuffled": lambda: INDEPENDENT["plain"]().cache().shuffle(9, seed=1),
    "repeated": lambda: INDEPENDENT["plain"]().repeat(2).map(lambda x, y: (2 * x, y)),
}


def _batched(make):
    return lambda: {"x": make().batch(BATCH)}


READ |= {name: _batched(make) for name, make in DEPENDENT.items()}


@pytest.mark.parametrize("name", DEPENDENT)
def test_pipelines_with_a_memory_are_known_as_such(name):
    assert not passes_of(DEPENDENT[name]()).independent


@pytest.mark.parametrize("name", INDEPENDENT)
def test_pipelines_without_a_memory_are_not_read_again(name):
    found = passes_of(INDEPENDENT[name]())
    assert found.independent and found.alike == ("shuffled" not in name)


class Sees(distfit.Model):
    """Returns what it sees as logs: rows in their order."""

    def train_step(self, batch):
        return {"x": batch[0], "y": batch[1]}

    def test_step(self, batch):
        return {"sum": tf.reduce_sum(batch[0]) + tf.reduce_sum(batch[1] ** 2)}


class Draws(keras.callbacks.Callback):
    """Draws from global generators between epochs, as the program may."""

    def on_epoch_begin(self, epoch, logs=None):
        np.random.random(), random.random()

    def on_epoch_end(self, epoch, logs=None):
        np.random.random(), random.random()


def seen(strategy, folder, given, stop=-1, epochs=3, fused=1, **arguments):
    """What each step and validation has seen, in their order."""
    keras.utils.set_random_seed(5)
    with strategy.scope():
        model = Sees()
    model.compile(steps_per_execution=fused)
    found = []

    def note(logs):
        found.append({name: np.array(value).tolist() for name, value in logs.items()})

    callbacks = [
        StopsAt(stop),
        Draws(),
        keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: note(logs),
            on_test_end=lambda logs: note(logs),
            on_epoch_end=lambda epoch, logs: note({"epoch": epoch}),
        ),
        Checkpoint(folder, ["1steps", "1epoch"]),
    ]
    options = {"epochs": epochs, "verbose": 0, **given(), **arguments}
    try:
        distfit.fit(model, callbacks=callbacks, **options)
    except StopsError:
        pass
    return found


# The others are parts of these, or pipelines, which test_pipelines.py goes through.
FEW_READ = [
    *("pydataset in parts", "threads", "generator"),
    *("augmented by a layer", "validated by shards"),
]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("replicas", numbers_of_replicas([2], [1, 2, 3]))
@pytest.mark.parametrize("name", pick(FEW_READ, list(READ)))
def test_data_go_on_with_the_batch_after_the_last(
    make_strategy, tmp_path, name, replicas
):
    strategy, given = make_strategy(replicas), READ[name]
    whole = seen(strategy, tmp_path / "whole", given)
    for stop in pick([4, 7], [2, 3, 4, 6, 7]):
        folder = tmp_path / str(stop)
        before = seen(strategy, folder, given, stop)
        rest = seen(strategy, folder, given, resume_from=folder)
        assert before + rest == whole


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    "name", pick(["unknown"], ["pydataset in parts", "generator", "unknown"])
)
def test_data_go_on_after_fused_steps(make_strategy, tmp_path, name):
    """Which read a batch ahead, and stop in the middle of an execution."""
    strategy, given = make_strategy(3), READ[name]
    whole = seen(strategy, tmp_path / "whole", given, fused=2)
    folder = tmp_path / "stopped"
    before = seen(strategy, folder, given, 3, fused=2)
    assert before + seen(strategy, folder, given, resume_from=folder, fused=2) == whole


def _moved_on():
    started = generator()
    next(started)
    return {"x": started, "steps_per_epoch": 4}


CHANGED = {
    "a generator that was begun": ("generator", _moved_on, "in another order"),
    "a shorter generator": (
        "generator",
        lambda: {"x": generator(5), "steps_per_epoch": 4},
        "shorter than before",
    ),
    "another PyDataset": (
        "pydataset",
        lambda: {"x": Plain()},
        "in another order",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_data_that_are_not_the_same_are_refused(make_strategy, tmp_path, name):
    before, after, message = CHANGED[name]
    seen(make_strategy(1), tmp_path, READ[before], 6)
    with pytest.raises(ValueError, match=message):
        seen(make_strategy(1), tmp_path, after, resume_from=tmp_path)


def test_batches_that_depend_on_more_than_generators_are_noticed(
    make_strategy, tmp_path
):
    class Counts(Plain):
        calls = 0

        def __getitem__(self, index):
            self.calls += 1
            x, y = super().__getitem__(index)
            return x + self.calls, y

    def given():
        return {"x": Counts()}

    seen(make_strategy(1), tmp_path, given, 6)
    with pytest.raises(ValueError, match="differs from that of the checkpoint"):
        seen(make_strategy(1), tmp_path, given, resume_from=tmp_path)


def test_shards_are_those_of_as_many_replicas(make_strategy, tmp_path):
    seen(make_strategy(2), tmp_path, READ["shards"], 3)
    with pytest.raises(ValueError, match=r"replicas of the data is \[1, 3\] and was"):
        seen(make_strategy(3), tmp_path, READ["shards"], resume_from=tmp_path)


def test_only_what_is_needed_is_read_again(make_strategy, tmp_path):
    """Of a PyDataset one batch, whatever the epoch: the last before the place."""
    calls = []

    class Notes(Plain):
        def __getitem__(self, index):
            calls.append(index)
            return super().__getitem__(index)

    def given():
        return {"x": Notes(60), "steps_per_epoch": 20, "shuffle": False}

    seen(make_strategy(1), tmp_path, given, 45, epochs=3)
    calls.clear()
    rest = seen(make_strategy(1), tmp_path, given, resume_from=tmp_path, epochs=3)
    assert len(rest) == 16 and calls == [0, 1, 0, 1, *range(44, 60)]


def _lines(paths):
    """Shuffled rows of text files, which are read one after the other, endlessly."""

    def row(line):
        x = tf.strings.to_number(line)
        return tf.stack([x, x + 1]), x[None]

    files = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
    rows = files.interleave(tf.data.TextLineDataset, cycle_length=1).map(row)
    batches = rows.repeat().shuffle(3, seed=1).batch(4).prefetch(2)
    return {"x": batches, "steps_per_epoch": 3}


def test_a_dataset_is_not_read_up_to_its_place(
    make_strategy, tmp_path, caplog, monkeypatch
):
    """It goes on though a file that it has read is gone."""
    paths = [tmp_path / f"{n}.txt" for n in range(3)]
    for number, path in enumerate(paths):
        path.write_text("".join(f"{number * 10 + row}\n" for row in range(10)))
    strategy, given, folder = (
        make_strategy(2),
        lambda: _lines(paths),
        tmp_path / "stopped",
    )
    whole = seen(strategy, tmp_path / "whole", given)
    before = seen(strategy, folder, given, 4)
    shutil.copytree(folder, tmp_path / "copy")
    paths[1].rename(tmp_path / "away")
    rest = seen(strategy, folder, given, resume_from=folder, epochs=2)
    assert whole[: len(before + rest)] == before + rest and not caplog.records
    monkeypatch.setattr(GlobalBatches, "_went_to", lambda *_: False)
    with pytest.raises(tf.errors.NotFoundError):
        seen(strategy, folder, given, resume_from=tmp_path / "copy", epochs=2)


def test_buffers_that_are_too_large_are_read_again(
    make_strategy, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(global_batches, "_LARGEST_PLACE", ROWS * 5 * 4)
    strategy, given = make_strategy(2), shuffled
    whole = seen(strategy, tmp_path / "whole", given)
    assert "buffers of the data are too large" in caplog.text
    before = seen(strategy, tmp_path / "stopped", given, 4)
    stopped = seen(
        strategy, tmp_path / "stopped", given, resume_from=tmp_path / "stopped"
    )
    assert before + stopped == whole


def test_the_place_of_another_pipeline_is_read_up_to(make_strategy, tmp_path, caplog):
    def in_other_parts():
        return {"x": shuffled()["x"].map(lambda x, y: (x + 0, y))}

    strategy, folder = make_strategy(2), tmp_path / "stopped"
    whole = seen(strategy, tmp_path / "whole", shuffled)
    before = seen(strategy, folder, shuffled, 7)
    rest = seen(strategy, folder, in_other_parts, resume_from=folder)
    assert before + rest == whole
    assert "the checkpoint has that of another pipeline" in caplog.text


def test_large_tensors_are_not_written_out(monkeypatch):
    """To find out how passes are related: it would take longer than to read them."""
    monkeypatch.setattr(passes, "_LARGEST_GRAPH", 10)
    assert passes_of(INDEPENDENT["plain"]()) == passes.Passes(False, False, False)


def test_notes_of_batches_are_few(make_strategy, tmp_path):
    """However long a pass is."""
    data = GlobalBatches(Batches(1000), shuffle=False)
    data.take_notes()
    data.start_epoch()
    for step in range(1, 901):
        data.iterator().get_next()
        data.ran(step)
    assert len(data._reader._pass.notes) <= 101


class Lazy(distfit.Model):
    """Makes its variables in its first step, and draws from wherever it can."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="relu")
        self.drop = layers.Dropout(0.4)
        self.last = {"out": layers.Dense(1)}
        self.generator = tf.random.Generator.from_seed(3)
        self.optimizers = [keras.optimizers.Adam(0.02, use_ema=True)]

    def call(self, x, training=False):
        return self.last["out"](self.drop(self.hidden(x), training=training))

    def train_step(self, batch):
        x, y = batch
        x += keras.random.normal(tf.shape(x)) * 0.1
        x += self.generator.normal(tf.shape(x)) * 0.1
        x += tf.random.normal(tf.shape(x)) * np.random.random() * 0.1
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        held_by_nobody.assign_add(loss)
        weights = self.trainable_variables
        gradients = tape.gradient(loss, weights)
        self.optimizers[0].apply(gradients, weights)
        return {"loss": loss, "sum": held_by_nobody + 0.0}


held_by_nobody: tf.Variable


def eagerly(strategy, folder, name, given, stop=-1, run_eagerly=True, **arguments):
    global held_by_nobody
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    with strategy.scope():
        held_by_nobody = tf.Variable(0.0)
        model = build() if name == "of Keras" else Lazy()
        optimizer = model.optimizer if name == "of Keras" else "sgd"
        metrics = ["mae", "accuracy"] if name == "of Keras" else None
        model.compile(optimizer, "mse", metrics=metrics, run_eagerly=run_eagerly)
    callbacks = [StopsAt(stop), Checkpoint(folder, every=["1steps", "1epoch"])]
    options = {"epochs": EPOCHS, "verbose": 0, **given(), **arguments}
    return model, model.fit(callbacks=callbacks, **options)


@pytest.mark.parametrize("replicas", numbers_of_replicas([3], [1, 2, 3]))
@only_exhaustive  # test_workers.py has one by default.
@pytest.mark.parametrize("name", pick(["lazy"], ["of Keras", "lazy"]))
def test_eager_steps_go_on_bit_for_bit(
    make_strategy, tmp_path, monkeypatch, name, replicas
):
    strategy = make_strategy(replicas)
    of_keras = name == "of Keras"
    if not of_keras:  # Then all do, whatever the model says.
        monkeypatch.setattr(tf.config, "functions_run_eagerly", lambda: True)

    def given():
        return arrays() | {"validation_data": data()} if of_keras else unknown()

    def fit(folder, stop=-1, **arguments):
        arguments |= {"run_eagerly": of_keras}
        return eagerly(strategy, folder, name, given, stop, **arguments)

    whole = fit(tmp_path / "whole")
    for stop in pick([6], [4, 6]):
        folder = tmp_path / str(stop)
        with pytest.raises(StopsError):
            fit(folder, stop)
        assert_same_bits(whole, fit(folder, resume_from=folder))


def test_a_folder_of_another_training_is_left_alone(make_strategy, stopped):
    before = checkpoint.steps(stopped)
    with pytest.raises(ValueError, match="Give that folder as `resume_from` to go on"):
        train(make_strategy(1), stopped, arrays)
    assert checkpoint.steps(stopped) == before
    with pytest.raises(ValueError, match="Give its parent"):
        train(make_strategy(1), stopped, arrays, resume_from=stopped / "step-6")


def test_a_checkpoint_is_no_matter_of_the_chief_alone(make_strategy, tmp_path):
    alone = distfit.callbacks.ChiefOnly(Checkpoint(tmp_path))
    with make_strategy(1).scope():
        model = build()
    with pytest.raises(ValueError, match="takes all workers"):
        model.fit(**arrays(), verbose=0, callbacks=[alone])


def test_what_a_kill_leaves_unfinished_is_removed_or_put_back(tmp_path):
    checkpoint.write(tmp_path, 1, {"a": np.ones(2)}, {})
    (tmp_path / "step-1").rename(tmp_path / ".unfinished-old-step-1")
    (tmp_path / ".unfinished-step-1").mkdir()
    (tmp_path / ".unfinished-file").touch()
    checkpoint.recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.read(tmp_path / "step-1")[1]["a"].tolist() == [1, 1]


def test_who_only_reads_leaves_a_training_at_work_alone(make_strategy, tmp_path):
    team = workers.of(make_strategy(1))
    checkpoint.write(tmp_path, 1, {"a": np.ones(2)}, {})
    (tmp_path / ".unfinished-step-2").mkdir()
    assert resuming.load(team, tmp_path).manifest["step"] == 1
    assert resuming.load(team, tmp_path, owned=[tmp_path / "other"]) is not None
    assert (tmp_path / ".unfinished-step-2").is_dir()
    resuming.load(team, tmp_path, owned=[tmp_path])
    assert not (tmp_path / ".unfinished-step-2").exists()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path, monkeypatch
):
    checkpoint.write(tmp_path, 1, {"a": np.ones(2)}, {"epoch": 0})
    read_manifest = checkpoint.read_manifest
    replaced = []

    def then_replace(path):
        manifest = read_manifest(path)
        if not replaced:
            replaced.append(True)
            checkpoint.write(tmp_path, 1, {"a": np.zeros(2)}, {})
        return manifest

    monkeypatch.setattr(checkpoint, "read_manifest", then_replace)
    assert checkpoint.read(tmp_path / "step-1")[1]["a"].tolist() == [0, 0]


def test_a_checkpoint_that_is_removed_while_it_is_read_is_no_error(tmp_path, caplog):
    checkpoint.write(tmp_path, 2, {"a": np.ones(2)}, {})
    looks = iter([[1], [2], [2]])  # The first was removed when 2 was saved.
    found = resuming._first_good(tmp_path, lambda: next(looks))
    assert found.manifest["step"] == 2 and not caplog.text


class Counts(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.limit, self.seen, self.best = 3, [], {}

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(np.float32(epoch))
        self.best[epoch] = (np.arange(epoch), None)


class Opaque(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.thing = object()


def test_the_state_of_callbacks_is_what_they_have_changed():
    callback, other, opaque = Counts(), Counts(), Opaque()
    before = states.snapshot([callback, opaque])
    other.limit = 9  # A setting of the call that goes on.
    for epoch in range(2):
        callback.on_epoch_end(epoch)
        opaque.on_epoch_end(epoch)
    values = {}
    found = states.states_of([callback, opaque], before, values)
    assert found[1]["unsaved"] == ["thing"]
    found = json.loads(json.dumps(found))
    again = [other, Opaque()]
    states.set_states(again, found, states.snapshot(again), values)
    other.best[1][0][0] = 5  # Arrays can be written.
    assert other.limit == 9 and other.seen == [0.0, 1.0]
    assert list(other.best) == [0, 1] and other.best[1][1] is None
    assert other.best[1][0].tolist() == [5]


class Holds(keras.callbacks.Callback):
    def __init__(self, thing):
        super().__init__()
        self.thing = thing


@pytest.mark.parametrize(
    "generator",
    [random.Random(1), np.random.RandomState(1), np.random.default_rng(1)],
    ids=lambda generator: type(generator).__name__,
)
def test_a_generator_of_a_callback_is_part_of_its_state(generator):
    callback, arrays = Holds(generator), {}
    before = states.snapshot([callback])
    generator.random()
    found = json.loads(json.dumps(states.states_of([callback], before, arrays)))
    assert found[0]["unsaved"] == []
    other = Holds(None)
    states.set_states([other], found, states.snapshot([other]), arrays)
    assert [other.thing.random() for _ in range(9)] == [
        generator.random() for _ in range(9)
    ]


def test_what_changes_inside_of_a_callback_is_named_if_it_cannot_be_saved():
    held = tf.Variable(1.0), keras.metrics.Mean(), [{1, 2}]
    callbacks = [Holds(thing) for thing in held]
    same = Holds(held[0])
    before = states.snapshot([*callbacks, same])
    found = states.states_of([*callbacks, same], before, {})
    assert not any(entry["unsaved"] for entry in found)
    held[2][0].add(3)
    held[0].assign(2.0)
    found = states.states_of([*callbacks, same], before, {})
    assert found[0]["unsaved"] == found[2]["unsaved"] == ["thing"]


JOB = """
import sys
sys.path[:0] = sys.argv[3:]
import distfit
import test_resuming as tests
strategy = distfit.create_strategy("mirrored", virtual_devices=2)
model, history = tests.train(strategy, sys.argv[1], tests.shuffled,
                             resume_from=sys.argv[1], epochs=6)
state = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
tests.np.savez(sys.argv[2], *state, history.history["loss"])
"""


@pytest.mark.integration
@only_exhaustive  # tests/integration/test_faults.py has one by default.
def test_kills_at_any_moment_change_no_bit(tmp_path):
    """Each after a random time, be it in a step, in a save or in the start."""

    def start(folder):
        weights = tmp_path / f"{folder}.npz"
        here = pathlib.Path(__file__).parent
        arguments = [tmp_path / folder, weights, here, here.parent]
        return weights, subprocess.Popen(
            [sys.executable, "-c", JOB, *map(str, arguments)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        )

    expected, process = start("whole")
    assert process.wait(120) == 0
    generator = np.random.default_rng(0)
    for _ in range(examples(1, 5)):
        found, process = start("killed")
        steps = checkpoint.steps(tmp_path / "killed")
        deadline = time.monotonic() + 120
        while checkpoint.steps(tmp_path / "killed") == steps and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    found, process = start("killed")
    assert process.wait(120) == 0
    assert _arrays_of(found) == _arrays_of(expected)


def _arrays_of(file):
    with np.load(file) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}
