"""Bad input gets one clear error, before any work."""

import subprocess
import sys

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit


def _model(strategy, **compiled):
    with strategy.scope():
        inputs = keras.Input((8,))
        model = distfit.Model(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", "mse", **compiled)
    return model


DATA = comparing.regression_data(12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "tpu"}, r"Unknown strategy. Received: name='tpu'"),
        ({"virtual_devices": -1}, r"at least 1. Received: virtual_devices=-1"),
        (
            {"devices": ["CPU:0"], "virtual_devices": 2},
            r"not both. Received: devices=\['CPU:0'\], virtual_devices=2",
        ),
    ],
)
def test_strategy_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        distfit.create_strategy(**arguments)


def test_more_virtual_devices_than_an_initialised_tensorflow_has():
    tf.constant(1.0)
    with pytest.raises(
        RuntimeError, match="already initialised with 8 .*Received: virt"
    ):
        distfit.create_strategy("mirrored", virtual_devices=9)


def test_fit_before_compile(make_strategy):
    with make_strategy(2).scope():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
    for method in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        with pytest.raises(ValueError, match=f"compile.*before calling `{method}"):
            getattr(model, method)(*DATA)


@pytest.mark.parametrize("name", ["batch_size", "steps_per_epoch"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(make_strategy, name, value):
    model = _model(make_strategy(2))
    message = f"`{name}` must be at least 1. Received: {name}={value}"
    with pytest.raises(ValueError, match=message):
        model.fit(*DATA, **{name: value})
    assert model.optimizer.iterations.numpy() == 0


def _dataset(*tensors):
    return tf.data.Dataset.from_tensor_slices(tensors)


@pytest.mark.parametrize("value", [0, -1, None, 1.5, "2"])
def test_validation_freq_that_is_none(make_strategy, value):
    """Stock Keras complains after the first epoch, and about no number."""
    model = _model(make_strategy(2))
    with pytest.raises(ValueError, match=f"`validation_freq`.*Received: .*{value}"):
        model.fit(*DATA, validation_data=DATA, validation_freq=value)
    assert model.optimizer.iterations.numpy() == 0


BAD_DATA = {
    "no rows": ((np.zeros((0, 8)), np.zeros((0, 1))), "no batch at all"),
    "empty dataset": ((_dataset(*DATA).take(0).batch(4),), "no batch at all"),
    "empty, unknown length": (
        (_dataset(*DATA).filter(lambda x, y: False).batch(4),),
        "no batch at all",
    ),
    "not batched": ((_dataset(*DATA[:1], np.arange(12)),), "Received: scalars"),
    "not batched, no targets": ((_dataset(np.arange(4.0)),), "Received: scalars"),
    "four tensors": ((_dataset(*DATA, *DATA).batch(4),), "Data is expected to be in"),
    "datasets of datasets": ((_dataset(DATA[0]).window(2),), "must be a tensor or a"),
    "row counts": ((DATA[0], DATA[1][:5]), "(?s)cardinality.*12.*5"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data(make_strategy, name):
    data, message = BAD_DATA[name]
    model = _model(make_strategy(2))
    weights = model.get_weights()
    with pytest.raises(ValueError, match=message):
        model.fit(*data, verbose=0)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_distributed_dataset(make_strategy):
    strategy = make_strategy(2)
    cut = strategy.experimental_distribute_dataset(_dataset(*DATA).batch(4))
    with pytest.raises(ValueError, match="cuts global batches itself. Received"):
        _model(strategy).fit(cut)


def test_model_outside_the_scope(make_strategy):
    inputs = keras.Input((8,))
    model = distfit.Model(inputs, layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    with make_strategy(2).scope():
        with pytest.raises(
            ValueError, match="(?s)The model .*outside the scope.*with strategy"
        ):
            model.fit(*DATA)
    unbuilt = distfit.Sequential([layers.Dense(1)])
    unbuilt.compile("sgd", "mse")
    with make_strategy(2).scope():
        with pytest.raises(ValueError, match="a call within the scope"):
            unbuilt.fit(*DATA)


LOSS = keras.losses.Huber()
TRACKER = keras.metrics.Mean(name="tracker")


class UsesWhatIsOutside(distfit.Model):
    """Its loss, its metric and its optimizer were made outside the scope."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = LOSS(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        TRACKER.update_state(loss)
        return {"loss": TRACKER.result()}

    @property
    def metrics(self):
        return [TRACKER]


@pytest.mark.parametrize("built", [False, True])
def test_what_is_made_outside_the_scope_just_works(make_strategy, built):
    def run(replicas):
        optimizer = keras.optimizers.Adam(0.05)

        def build():
            inputs = keras.Input((8,))
            model = UsesWhatIsOutside(inputs, layers.Dense(1)(inputs))
            model.compile(optimizer)
            return model

        def fit(model):
            if built:
                optimizer.build(model.trainable_variables)
            return model.fit(*DATA, batch_size=5, epochs=3, shuffle=False, verbose=0)

        return comparing.run(make_strategy(replicas), build, fit)

    one = run(1)
    for replicas in (2, 3):
        comparing.assert_same(one, run(replicas))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # By stock Keras.
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fused", [1, 2])
def test_log_of_changing_shape_is_that_of_stock_keras(make_strategy, known, fused):
    def history(base, strategy):
        class PerRow(base):
            def train_step(self, data):
                return {"errors": data[1][data[1] > 0]}

        with strategy.scope():
            model = PerRow()
            model.compile(steps_per_execution=fused)
        data = _dataset(*DATA).batch(5)
        data = data if known else data.filter(lambda x, y: True)
        return model.fit(data, shuffle=False, verbose=0).history

    stock = history(keras.Model, tf.distribute.get_strategy())
    for replicas in (1, 2):
        found = history(distfit.Model, make_strategy(replicas))
        np.testing.assert_array_equal(found["errors"][0], stock["errors"][0])


@pytest.mark.parametrize("kind", ["train", "test"])
def test_compile_in_a_callback(make_strategy, kind):
    """As in stock Keras, which cannot continue with another optimizer either."""
    model = _model(make_strategy(2))

    class Compiles(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with make_strategy(2).scope():
                self.model.compile("sgd", "mae")

        on_test_batch_end = on_train_batch_end

    run = model.fit if kind == "train" else model.evaluate
    with pytest.raises(RuntimeError, match="cannot be compiled while it trains"):
        run(*DATA, batch_size=4, verbose=0, callbacks=[Compiles()])


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_loss_that_is_not_finite_names_step_and_replica(make_strategy, replicas):
    x, y = comparing.regression_data(40)
    y[29] = np.inf  # Batch 3 of 10 rows; row 9 of it belongs to the last replica.
    model = _model(make_strategy(replicas))
    callback = distfit.callbacks.NonFinite()
    message = f"step 3 on replica {replicas - 1}"
    with pytest.raises(FloatingPointError, match=message):
        model.fit(x, y, batch_size=10, shuffle=False, verbose=0, callbacks=[callback])


def test_a_finite_run_passes_the_check(make_strategy):
    model = _model(make_strategy(2))
    callback = distfit.callbacks.NonFinite()
    history = model.fit(*DATA, batch_size=4, verbose=0, callbacks=[callback])
    assert np.isfinite(history.history["loss"]).all()


def test_importing_distfit_does_not_initialise_tensorflow():
    code = (
        "import distfit; s = distfit.create_strategy('mirrored', virtual_devices=3);"
        "assert s.num_replicas_in_sync == 3;"
        "assert distfit.create_strategy().num_replicas_in_sync == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class MakesItsFunction(distfit.Model):
    def make_train_function(self, force=False):
        raise AssertionError("Never called.")


def test_a_function_of_its_own_that_runs_steps_is_refused(make_strategy):
    with make_strategy(2).scope():
        inputs = keras.Input((8,))
        model = MakesItsFunction(inputs, keras.layers.Dense(1)(inputs))
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Put what it does into `train_step`"):
        model.fit(*DATA, verbose=0)
    model.evaluate(*DATA, verbose=0)


def _outright(x):
    tf.debugging.assert_less(tf.reduce_max(x), 0.5)  # here


def _in_a_branch(x):
    tf.cond(tf.reduce_max(x) > 0.5, lambda: _outright(x), lambda: None)


def _in_a_loop(x):
    def body(i):
        _outright(x + tf.cast(i, x.dtype))
        return i + 1

    tf.while_loop(lambda i: i < 2, body, [0])


def _of_numbers(x):
    return tf.debugging.check_numerics(x / (x - 1.0), "no number")  # here


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
@pytest.mark.parametrize("method", ["fit", "train_on_batch", "predict"])
@pytest.mark.parametrize("place", [_outright, _in_a_branch, _in_a_loop, _of_numbers])
def test_errors_in_a_step_name_its_line(make_strategy, replicas, method, place):
    class Failing(distfit.Model):
        def train_step(self, data):
            checked = place(data[0])
            return {"loss": tf.reduce_sum(data[0] if checked is None else checked)}

        def predict_step(self, data):
            checked = place(data[0])
            return data[0] if checked is None else checked

    with make_strategy(replicas).scope():
        inputs = keras.Input((3,))
        model = Failing(inputs, keras.layers.Dense(1)(inputs))
        model.compile()
    quiet = {} if method == "train_on_batch" else {"verbose": 0}
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        getattr(model, method)(np.ones((4, 3), "float32"), **quiet)
    (note,) = caught.value.__notes__
    assert "test_errors.py" in note and note.endswith("# here"), note


@pytest.mark.parametrize("replicas", pick([2], [1, 2]))
def test_errors_in_the_data_name_no_line_of_the_step(make_strategy, replicas):
    """The operations of both have the same names."""

    class Checking(distfit.Model):
        def train_step(self, data):
            _outright(data)
            return {"loss": tf.reduce_sum(data)}

    def check(x):
        tf.debugging.assert_less(x, 0.5)
        return x

    with make_strategy(replicas).scope():
        model = Checking()
        model.compile()
    data = tf.data.Dataset.from_tensor_slices(tf.ones((4, 1))).map(check).batch(4)
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        model.fit(data, verbose=0)
    assert not hasattr(caught.value, "__notes__")
