"""Gradients accumulate on each replica, and are summed only in every k-th step."""

import functools

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas, pick
from keras import layers
from keras.optimizers import SGD, Adam, LossScaleOptimizer, MultiOptimizer, OptimizerMap

import distfit
from distfit.partition.program import Exchange, key_of

# Eight batches in two epochs: uneven parts, and 2 rows for more replicas twice.
ROWS, BATCH, STEPS = 23, 7, 8


def _embedding_data():
    generator = np.random.default_rng(3)
    x = generator.integers(0, 6, (ROWS, 3)) ** 2 // 5
    return x, generator.normal(size=(ROWS, 1)).astype("float32")


def _dense_model():
    inputs = keras.Input((8,))
    hidden = layers.Dense(5, activation="tanh", name="hidden")(inputs)
    return distfit.Model(inputs, layers.Dense(1, name="out")(hidden))


def _sparse_model():
    inputs = keras.Input((3,), dtype="int32")
    x = layers.Flatten()(layers.Embedding(6, 4, name="hidden")(inputs))
    return distfit.Model(inputs, layers.Dense(1, name="out")(x))


def _run(strategy, make_optimizer, sparse=False, epochs=2, callbacks=(), **compiling):
    def build():
        model = _sparse_model() if sparse else _dense_model()
        model.compile(make_optimizer(), "mse", **compiling)
        return model

    def fit(model):
        x, y = _embedding_data() if sparse else comparing.regression_data(ROWS)
        return model.fit(
            x,
            y,
            batch_size=BATCH,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=list(callbacks),
        )

    return comparing.run(strategy, build, fit)


def _some_accumulate():
    """Two that accumulate over different numbers of steps, and one that does not."""
    mapped = {
        "hidden/kernel": Adam(0.05, gradient_accumulation_steps=3),
        "hidden/embeddings": Adam(0.05, gradient_accumulation_steps=3),
        "out/kernel": SGD(0.05, gradient_accumulation_steps=2, momentum=0.9),
    }
    return MultiOptimizer(OptimizerMap(SGD(0.1), mapped))


OPTIMIZERS = {
    "plain": lambda: Adam(0.05, gradient_accumulation_steps=3),
    "clipnorm": lambda: SGD(
        0.1, clipnorm=0.1, weight_decay=0.1, gradient_accumulation_steps=2
    ),
    "global_clipnorm": lambda: SGD(
        0.1, momentum=0.9, global_clipnorm=0.1, gradient_accumulation_steps=2
    ),
    "ema": lambda: SGD(
        0.1,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=2,
        gradient_accumulation_steps=2,
    ),
    "loss_scale": lambda: LossScaleOptimizer(
        Adam(0.05, gradient_accumulation_steps=3), dynamic_growth_steps=2
    ),
    "multi": _some_accumulate,
    "loss_scale_multi": lambda: LossScaleOptimizer(_some_accumulate()),
}


NUMBERS = numbers_of_replicas([4], [2, 3, 4])


@functools.cache
def _on_one_device(strategy, name, sparse):
    return _run(strategy, OPTIMIZERS[name], sparse)


@pytest.mark.parametrize(
    "name, sparse, replicas",
    [
        *(
            ("plain", sparse, n)
            for sparse in pick([True], [False, True])
            for n in NUMBERS
        ),
        *((name, True, 3) for name in OPTIMIZERS if name != "plain"),
    ],
)
def test_accumulation_equals_one_device(make_strategy, name, sparse, replicas):
    """Stock Keras: merge_call called while defining a new graph."""
    one = _on_one_device(make_strategy(1), name, sparse)
    comparing.assert_same(one, _run(make_strategy(replicas), OPTIMIZERS[name], sparse))


@pytest.mark.parametrize("compiling", [{"steps_per_execution": 3}, {"run_eagerly": 1}])
def test_fused_and_eager_steps(make_strategy, compiling):
    one = _on_one_device(make_strategy(1), "plain", False)
    two = _run(make_strategy(2), OPTIMIZERS["plain"], **compiling)
    comparing.assert_same(one, two)


def test_loss_scale_factor(make_strategy):
    """Accumulators hold unscaled gradients."""

    class Scaled(distfit.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    def run(replicas, **arguments):
        def build():
            inputs = keras.Input((8,))
            model = Scaled(inputs, layers.Dense(1)(inputs))
            model.compile(SGD(0.1, gradient_accumulation_steps=3, **arguments), "mse")
            return model

        def fit(model):
            x, y = comparing.regression_data(ROWS)
            return model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)

        return comparing.run(make_strategy(replicas), build, fit)

    comparing.assert_same(run(1), run(3, loss_scale_factor=64.0))


@pytest.fixture
def exchanges(monkeypatch):
    """Counts the exchanges of floats that are not scalars.

    The counter is part of the graph, so it counts what runs, not what is traced.
    """
    counter = tf.Variable(0)
    place = Exchange.place

    def counted(self, placed, replicas, jit):
        sources = [source for source, *_ in (*self.sums, *self.gathers)]
        tensors = [placed[key_of(source)][0] for source in sources]
        if any(t.shape.rank != 0 and t.dtype.is_floating for t in tensors):
            counter.assign_add(1)
        return place(self, placed, replicas, jit)

    monkeypatch.setattr(Exchange, "place", counted)
    return counter


@pytest.mark.parametrize(
    "make_optimizer, times",
    [
        (lambda: SGD(0.1), STEPS),
        (lambda: SGD(0.1, gradient_accumulation_steps=3), STEPS // 3),
        (lambda: SGD(0.1, gradient_accumulation_steps=2), STEPS // 2),
        (
            # Overflow is checked on the sum, in each step.
            lambda: LossScaleOptimizer(SGD(0.1, gradient_accumulation_steps=4)),
            STEPS + STEPS // 4,
        ),
    ],
)
@pytest.mark.parametrize("sparse", pick([True], [False, True]))
def test_gradients_are_exchanged_once_per_k_steps(
    make_strategy, exchanges, make_optimizer, times, sparse
):
    _run(make_strategy(3), make_optimizer, sparse)
    assert int(exchanges) == times


class KeepsState(keras.callbacks.Callback):
    """Keeps the values of an optimizer's variables after each step."""

    def __init__(self):
        super().__init__()
        self.scales, self.iterations, self.weights = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        self.scales.append(float(optimizer.dynamic_scale.numpy()))
        self.iterations.append(int(optimizer.inner_optimizer.variables[0].numpy()))
        self.weights.append(self.model.get_weights())


def test_all_skip_when_one_replica_overflows(make_strategy):
    """In the steps 1, 3 and 6, of which 3 and 6 would have updated the weights."""

    class Overflows(distfit.Model):
        """A row whose target is beyond 100 has an infinite gradient."""

        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            weight = tf.where(tf.abs(y) > 100, np.inf, 1.0)
            return super().compute_loss(x, y, y_pred * weight, sample_weight)

    x, y = comparing.regression_data(8 * 6)
    for step, row in [(1, 1), (3, 3), (6, 5)]:  # Rows of the first, second and third.
        y[(step - 1) * 6 + row] = 1000

    def run(replicas):
        state = KeepsState()

        def build():
            inputs = keras.Input((8,))
            model = Overflows(inputs, layers.Dense(1)(inputs))
            inner = SGD(0.1, gradient_accumulation_steps=2)
            model.compile(LossScaleOptimizer(inner), "mse")
            return model

        def fit(model):
            arguments = {"batch_size": 6, "shuffle": False, "verbose": 0}
            return model.fit(x, y, callbacks=[state], **arguments)

        comparing.run(make_strategy(replicas), build, fit)
        return state

    one, three = run(1), run(3)
    assert three.scales == one.scales
    assert three.scales[-1] == 2.0**15 / 8
    assert three.iterations == one.iterations == [0, 1, 1, 2, 3, 3, 4, 5]
    for a, b in zip(one.weights, three.weights, strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=0, atol=comparing.ABSOLUTE)


def _accumulated(model):
    return [v.numpy() for v in model.optimizer.variables if "accumulator" in v.path]


def test_accumulators_are_one_device_s_and_survive_saving(make_strategy, tmp_path):
    """Saved after 4 of 8 steps, which leaves one in the accumulators."""
    data = comparing.regression_data(ROWS)
    fit = {"batch_size": BATCH, "shuffle": False, "verbose": 0}

    def trained(replicas):
        keras.utils.set_random_seed(7)
        with make_strategy(replicas).scope():
            model = _dense_model()
            model.compile(OPTIMIZERS["plain"](), "mse")
        model.fit(*data, **fit)
        return model

    one, three = trained(1), trained(3)
    for a, b in zip(_accumulated(one), _accumulated(three), strict=True):
        assert np.any(a)
        np.testing.assert_allclose(a, b, rtol=0, atol=comparing.ABSOLUTE)
    three.save(tmp_path / "model.keras")
    with make_strategy(2).scope():
        two = keras.saving.load_model(tmp_path / "model.keras")
    for model in (one, two, three):
        model.fit(*data, **fit)
        for a, b in zip(one.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=comparing.ABSOLUTE)
