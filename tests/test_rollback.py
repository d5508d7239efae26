"""`NonFinite(action="rollback")` trains as if the bad batches were not in the data."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers

import distfit
from distfit.callbacks import Checkpoint, NonFinite
from distfit.training import checkpoint

BATCH, STEPS, EPOCHS = 4, 6, 3


def build():
    model = distfit.Sequential(
        [keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def rows(bad=()):
    x = np.random.default_rng(0).normal(size=(BATCH * STEPS, 3)).astype("float32")
    y = x.sum(1, keepdims=True)
    for step in bad:
        x[step * BATCH] = np.nan
    return x, y


def fit(strategy, callbacks, x, y, **arguments):
    keras.utils.set_random_seed(3)
    with strategy.scope():
        model = build()
    options = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "shuffle": False}
    options |= arguments
    history = distfit.fit(model, x, y, callbacks=callbacks, **options)
    return model, history


def without(bad):
    """Trains by hand on the batches that are not bad."""
    keras.utils.set_random_seed(3)
    model = build()
    x, y = rows()
    for _ in range(EPOCHS):
        for step in range(STEPS):
            if step not in bad:
                part = slice(step * BATCH, (step + 1) * BATCH)
                model.train_on_batch(x[part], y[part])
    return model


@pytest.mark.parametrize("replicas", numbers_of_replicas([2], [1, 2, 3]))
@pytest.mark.parametrize("bad", pick([[2, 5]], [[0], [3], [2, 5]]))
def test_bad_batches_are_left_out(make_strategy, tmp_path, replicas, bad):
    guard = NonFinite(action="rollback")
    saves = Checkpoint(tmp_path, every=["2steps", "1epoch"])
    strategy = make_strategy(replicas)
    model, history = fit(strategy, [guard, saves], *rows(bad))
    assert guard.skipped == [[e + 1, s + 1] for e in range(EPOCHS) for s in bad]
    expected = without(bad)
    for one, other in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert history.epoch == [0, 1, 2]
    assert np.isfinite(history.history["loss"]).all()


def test_fused_steps_and_data_of_unknown_length_leave_them_out(make_strategy, tmp_path):
    guard = NonFinite(action="rollback")
    saves = Checkpoint(tmp_path, every="1epoch")
    data = tf.data.Dataset.from_tensor_slices(rows([4])).filter(lambda x, y: True)
    keras.utils.set_random_seed(3)
    with make_strategy(2).scope():
        model = build()
        model.steps_per_execution = 3
    model.fit(data.batch(BATCH), epochs=EPOCHS, callbacks=[guard, saves], verbose=0)
    assert guard.skipped == [[1, 5], [2, 5], [3, 5]]
    for one, other in zip(model.get_weights(), without([4]).get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        x, y = rows([4])
        part = slice(index * BATCH, (index + 1) * BATCH)
        return x[part], y[part]


class Changes(Batches):
    def on_epoch_end(self):
        pass


def test_they_are_left_out_in_the_middle_of_an_epoch(make_strategy, tmp_path):
    dataset = tf.data.Dataset.from_tensor_slices(rows([4])).batch(BATCH)
    for name, data in (("dataset", dataset), ("pydataset", Batches())):
        saves = Checkpoint(tmp_path / name, every="3steps")
        guard, arguments = NonFinite(action="rollback"), {"batch_size": None}
        model, _ = fit(make_strategy(2), [guard, saves], data, None, **arguments)
        assert guard.skipped == [[1, 5], [2, 5], [3, 5]]
        expected = without([4]).get_weights()
        for one, other in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _shuffled(bad, seed, spent=0, repeats=1):
    x, y = rows()
    x[bad] = np.nan
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat(repeats)
    data = data.shuffle(8, seed).batch(BATCH)
    for _ in range(spent):  # Each draws a seed.
        iter(data)
    return data.map(lambda x, y: (x, y)).prefetch(2)


@pytest.mark.parametrize(
    "seed, every, end", [(5, "2steps", None), (None, "1epoch", None), (5, "4steps", 4)]
)
def test_shuffled_datasets_go_back_to_their_order(
    make_strategy, tmp_path, seed, every, end
):
    """Also one that was read before, and one that goes on in the next epoch."""

    class Notes(distfit.Model):
        def train_step(self, batch):
            seen.append(tf.nest.map_structure(np.array, batch))
            return {"loss": 0.0}

    def data():
        keras.utils.set_random_seed(3)
        return _shuffled([5, 17], seed, spent=2, repeats=1 if end is None else -1)

    seen, epochs = [], {"epochs": EPOCHS, "steps_per_epoch": end, "verbose": 0}
    notes = Notes()
    notes.compile(run_eagerly=True)
    notes.fit(data(), **epochs)
    good = [np.isfinite(x).all() for x, _ in seen]

    guard = NonFinite(action="rollback")
    saves = Checkpoint(tmp_path, every=every)
    dataset = data()
    epochs |= {"shuffle": False, "batch_size": None}
    model, _ = fit(make_strategy(2), [guard, saves], dataset, None, **epochs)
    in_epoch = end or STEPS
    places = [
        [i // in_epoch + 1, i % in_epoch + 1] for i, g in enumerate(good) if not g
    ]
    assert guard.skipped == places and len(places) >= EPOCHS

    keras.utils.set_random_seed(3)
    expected = build()
    for (x, y), is_good in zip(seen, good, strict=True):
        if is_good:
            expected.train_on_batch(x, y)
    for one, other in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_shuffled_validation_goes_back_as_well(make_strategy, tmp_path):
    """Also before it has begun."""
    seen = []

    class Notes(distfit.Model):
        def train_step(self, batch):
            return {"loss": 0.0}

        def test_step(self, batch):
            seen.append(tf.nest.map_structure(np.array, batch))
            return {"loss": 0.0}

    notes = Notes()
    notes.compile(run_eagerly=True)
    held_out = _shuffled([], 9).take(1)
    notes.fit(*rows(), epochs=EPOCHS, validation_data=held_out, verbose=0)

    guard, saves = NonFinite("rollback"), Checkpoint(tmp_path, every="2steps")
    options = {"batch_size": None, "validation_data": _shuffled([], 9).take(1)}
    data = _shuffled([5, 17], 5)
    model, history = fit(make_strategy(2), [guard, saves], data, None, **options)
    assert len(guard.skipped) >= EPOCHS and len(seen) == EPOCHS
    losses = [model.evaluate(*batch, verbose=0) for batch in seen]
    assert history.history["val_loss"][-1] == pytest.approx(losses[-1], rel=1e-5)
    assert losses[-1] != pytest.approx(losses[-2], rel=1e-3)


def test_a_dataset_that_cannot_go_back_is_refused(make_strategy, tmp_path):
    callbacks = [NonFinite("rollback"), Checkpoint(tmp_path)]
    good, shuffled = _shuffled([], 4), _shuffled([], 5)
    for data in (
        shuffled.cache(),
        shuffled.repeat(),
        shuffled.shuffle(3, 6),
        shuffled.take(2).concatenate(_shuffled([], 6)),
        shuffled.map(lambda x, y: (x + tf.random.normal([3]), y)),
    ):
        options = {"batch_size": None, "steps_per_epoch": 3}
        with pytest.raises(ValueError, match="shuffle is not the last part"):
            fit(make_strategy(1), callbacks, data, None, **options)
        options = {"batch_size": None, "validation_data": data, "validation_steps": 1}
        with pytest.raises(ValueError, match="shuffle is not the last part"):
            fit(make_strategy(1), callbacks, good, None, **options)
    options = {"batch_size": None, "validation_data": shuffled.take(1)}
    with pytest.raises(ValueError, match="Shuffle each by itself"):
        fit(make_strategy(1), callbacks, shuffled.skip(1), None, **options)


def test_a_training_that_goes_on_keeps_leaving_them_out(make_strategy, tmp_path):
    def callbacks(asks=False):
        saves = Checkpoint(tmp_path / str(asks), every="1epoch")
        ask = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: (
                saves.request_stop() if asks and epoch == 1 else None
            )
        )
        return [NonFinite(action="rollback"), ask, saves]

    whole = fit(make_strategy(1), callbacks(), *rows([2]))
    with pytest.raises(SystemExit):
        fit(make_strategy(1), callbacks(asks=True), *rows([2]))
    again = callbacks(asks=True)
    again[1].on_epoch_begin = lambda *_: None
    resumed = fit(make_strategy(1), again, *rows([2]), resume_from=tmp_path / "True")
    assert again[0].skipped == [[1, 3], [2, 3], [3, 3]]
    for one, other in zip(whole[0].variables, resumed[0].variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert whole[1].history == resumed[1].history


def test_it_goes_back_to_finite_weights(make_strategy, tmp_path):
    """A step may give a finite loss and weights that are not."""

    class Breaks(keras.callbacks.Callback):
        done = False

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

        def on_train_batch_end(self, batch, logs=None):
            if batch == 2 and not self.done:
                self.done = True
                kernel = self.model.layers[-1].kernel
                kernel.assign(kernel * np.inf)

    guard, saves = NonFinite("rollback"), Checkpoint(tmp_path, every="1steps", keep=9)
    model, _ = fit(make_strategy(1), [Breaks(), guard, saves], *rows())
    assert guard.skipped == [[1, 4]]
    assert all(np.isfinite(each).all() for each in model.get_weights())


class Masked(layers.Layer):
    """Has a weight that is not finite."""

    def build(self, shape):
        mask = keras.initializers.Constant([0, 0, -np.inf])
        self.mask = self.add_weight(shape=(3,), initializer=mask, trainable=False)

    def call(self, x):
        return keras.ops.softmax(x + self.mask)


def test_a_weight_may_be_infinite_from_the_start(make_strategy, tmp_path):
    keras.utils.set_random_seed(3)
    with make_strategy(2).scope():
        model = distfit.Sequential([keras.Input((3,)), Masked(), layers.Dense(1)])
        model.compile("sgd", "mse")
    guard = NonFinite(action="rollback")
    model.fit(
        *rows([2, 3]),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[guard, Checkpoint(tmp_path)],
    )
    assert guard.skipped == [[1, 3], [1, 4]]


def test_a_loss_is_named_where_no_checkpoint_can_be_gone_back_to(
    make_strategy, tmp_path
):
    class Damages(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            for file in tmp_path.glob("step-*/manifest.json"):
                file.write_text("{")

    saves = Checkpoint(tmp_path, every="1000steps")
    callbacks = [Damages(), NonFinite(action="rollback"), saves]
    with pytest.raises(FloatingPointError, match="step 3 .*No checkpoint can be gone"):
        fit(make_strategy(2), callbacks, *rows([2]))


def test_eager_steps_go_back_once_they_have_a_checkpoint(make_strategy, tmp_path):
    """Before the first step they have not made all variables."""

    def callbacks(name):
        return [NonFinite("rollback"), Checkpoint(tmp_path / name, every="1steps")]

    def fit_eagerly(name, bad):
        keras.utils.set_random_seed(3)
        with make_strategy(2).scope():
            model = build()
        model.run_eagerly = True
        x, y = rows(bad)
        options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False}
        model.fit(x, y, callbacks=callbacks(name), verbose=0, **options)
        return model.get_weights()

    for one, other in zip(
        fit_eagerly("back", [3]), without([3]).get_weights(), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(FloatingPointError, match="at step 1"):
        fit_eagerly("at once", [0])


def test_it_gives_up_where_every_batch_is_bad(make_strategy, tmp_path):
    saves = Checkpoint(tmp_path)
    with pytest.raises(FloatingPointError, match="at step 5 on replica 0"):
        fit(make_strategy(1), [NonFinite("rollback"), saves], *rows(range(STEPS)))
    manifest, _ = checkpoint.read(tmp_path / "step-6")
    assert manifest["epoch"] == 1


def test_it_takes_a_checkpoint_and_data_that_can_be_read_again(make_strategy, tmp_path):
    with pytest.raises(ValueError, match="without a Checkpoint"):
        fit(make_strategy(1), [NonFinite("rollback")], *rows())
    callbacks = [NonFinite("rollback"), Checkpoint(tmp_path)]
    for data in (Changes(), ((x, y) for x, y in [rows()])):
        with pytest.raises(ValueError, match="a PyDataset with hooks"):
            fit(make_strategy(1), callbacks, data, None, batch_size=None)
    with pytest.raises(ValueError, match="Received: action='stay'"):
        NonFinite("stay")


def test_a_validation_loss_that_is_not_finite_ends_with_an_error(make_strategy):
    x, y = rows()
    held_out = (x[:4], np.full((4, 1), np.nan, "float32"))
    with pytest.raises(FloatingPointError, match="val_loss=nan at the end of epoch 1"):
        fit(make_strategy(2), [NonFinite()], x, y, validation_data=held_out)
