"""Whatever an optimizer does with gradients, it does with those of the batch."""

import functools
import inspect
import itertools

import comparing
import keras
import numpy as np
import pytest
import tensorflow as tf
from breadth import pick
from keras import layers

import distfit

# Batches of 7, 7, 7 and 2 rows: uneven parts, then fewer rows than replicas.
ROWS, BATCH = 23, 7


def _run(strategy, make_optimizer, cls=distfit.Model, prepare=None, **dense):
    def build():
        inputs = keras.Input((8,))
        hidden = layers.Dense(5, activation="tanh", name="hidden", **dense)(inputs)
        model = cls(inputs, layers.Dense(1, name="out")(hidden))
        model.compile(make_optimizer(), "mse")
        if prepare:
            prepare(model)
        return model

    return comparing.run(strategy, build, _fit)


def _fit(model, **arguments):
    x, y = comparing.regression_data(ROWS)
    return model.fit(
        x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, **arguments
    )


def _multi():
    optimizers = keras.optimizers
    return optimizers.MultiOptimizer(
        optimizers.OptimizerMap(
            optimizers.SGD(0.05, momentum=0.9),
            {"hidden/.*": optimizers.Adam(0.01, clipnorm=0.1)},
        )
    )


CLASSES = {
    name: cls
    for name, cls in vars(keras.optimizers).items()
    if inspect.isclass(cls)
    and issubclass(cls, keras.optimizers.Optimizer)
    and cls is not keras.optimizers.Optimizer
}
MAKE = {
    "LossScaleOptimizer": lambda cls: cls(keras.optimizers.RMSprop(0.01)),
    "MultiOptimizer": lambda cls: _multi(),
}


FEW = ["LossScaleOptimizer", "MultiOptimizer"]


def test_classes_are_found():
    assert {"Adam", "Muon", "ScheduleFreeAdamW", "MultiOptimizer"} <= CLASSES.keys()


# test_keras_functions.py has steps of more.
@pytest.mark.parametrize("name", pick(FEW, list(CLASSES)))
def test_every_class_equals_one_device(make_strategy, name):
    """All optimizer classes of Keras, so that a new one is tested, too."""
    make = MAKE.get(name, lambda cls: cls(learning_rate=0.02))
    one, three = (_run(make_strategy(n), lambda: make(CLASSES[name])) for n in (1, 3))
    comparing.assert_same(one, three)
    assert np.ptp(one.history["loss"]) > 1e-3  # It has learnt something.


def _without_decay_of_biases():
    optimizer = keras.optimizers.SGD(0.05, weight_decay=0.2)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


SETTINGS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "weight_decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "muon": lambda: keras.optimizers.Muon(0.02, weight_decay=0, adam_weight_decay=0.5),
    "excluded": _without_decay_of_biases,
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.05),
    "loss_scale_factor": lambda: keras.optimizers.SGD(
        0.1, loss_scale_factor=8.0, clipnorm=0.5
    ),
    "ema": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5),
    "ema_overwrite": lambda: keras.optimizers.SGD(
        0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    ),
    "callable": lambda: keras.optimizers.SGD(lambda: 0.05),
}
FEW_SETTINGS = [
    *("excluded", "global_clipnorm"),
    *("loss_scale_factor", "ema_overwrite"),
]


@functools.cache
def _on_one_device(strategy, name):
    return _run(strategy, SETTINGS[name])


@pytest.mark.parametrize(
    "name, replicas",
    [
        *((name, 3) for name in pick(FEW_SETTINGS, list(SETTINGS))),
        *pick([], list(itertools.product(("clipnorm", "ema_overwrite"), (2, 4)))),
    ],
)
def test_setting_equals_one_device(make_strategy, name, replicas):
    one = _on_one_device(make_strategy(1), name)
    comparing.assert_same(one, _run(make_strategy(replicas), SETTINGS[name]))


def test_constraint_equals_one_device(make_strategy):
    def run(replicas):
        return _run(
            make_strategy(replicas),
            lambda: keras.optimizers.SGD(0.1),
            kernel_constraint=keras.constraints.UnitNorm(),
            bias_constraint="non_neg",
        )

    one = run(1)
    comparing.assert_same(one, run(3))
    np.testing.assert_allclose(np.linalg.norm(one.weights[0], axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swapped_averages_equal_one_device(make_strategy, swap_on_epoch):
    """Validation sees the averages, training continues with the weights."""

    def run(replicas):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)

        def build():
            model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
            model.compile(keras.optimizers.SGD(0.05, use_ema=True), "mse")
            return model

        def fit(model):
            validation = comparing.regression_data(9, seed=1)
            return _fit(model, validation_data=validation, callbacks=[swap])

        return comparing.run(make_strategy(replicas), build, fit)

    one = run(1)
    comparing.assert_same(one, run(3))
    assert "val_loss" in one.history


class TwoOptimizers(distfit.Model):
    """The second optimizer is first used inside the step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.second = keras.optimizers.Adam(0.01, clipnorm=0.5)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.update(tape.gradient(loss, self.trainable_variables))
        return {"loss": loss}

    def update(self, gradients):
        kernels, biases = self.trainable_variables[::2], self.trainable_variables[1::2]
        self.optimizer.apply(gradients[::2], kernels)
        self.second.apply_gradients(zip(gradients[1::2], biases, strict=True))


class SharedVariables(TwoOptimizers):
    """Both optimizers update the same variables, one after the other."""

    def update(self, gradients):
        self.optimizer.apply(gradients, self.trainable_variables)
        self.second.apply(gradients, self.trainable_variables)


class SeveralTimes(TwoOptimizers):
    """A critic's optimizer is applied more often than that of the rest."""

    def train_step(self, data):
        x, y = data
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            critic = self.trainable_variables[2:]
            self.second.apply(tape.gradient(loss, critic), critic)
        return super().train_step(data)

    def update(self, gradients):
        self.optimizer.apply(gradients[:2], self.trainable_variables[:2])


@pytest.mark.parametrize(
    "cls", pick([SeveralTimes], [TwoOptimizers, SharedVariables, SeveralTimes])
)
def test_second_optimizer_first_used_inside_the_step(make_strategy, cls):
    """Stock Keras: you must feed a value for placeholder."""

    def run(replicas):
        return _run(make_strategy(replicas), lambda: keras.optimizers.SGD(0.05), cls)

    one = run(1)
    for replicas in (2, 4) if cls is TwoOptimizers else (3,):
        comparing.assert_same(one, run(replicas))


class AppliesByItself(distfit.Model):
    how = None

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.how(self.optimizer, gradients, self.trainable_variables)
        return {"loss": loss}


WAYS = {
    "keywords": lambda o, g, v: o.apply(grads=tuple(g), trainable_variables=tuple(v)),
    "built": lambda o, g, v: o.apply(g),
    "apply_gradients": lambda o, g, v: o.apply_gradients(zip(g, v, strict=True)),
    "empty": lambda o, g, v: (o.apply([], []), o.apply(g, v)),
}


@pytest.mark.parametrize("name", pick(["keywords", "empty"], list(WAYS)))
def test_ways_to_apply(make_strategy, name):
    """Each does what `fit()` with the default step does on one device."""

    def prepare(model):
        model.how = WAYS[name]
        model.optimizer.build(model.trainable_variables)

    one = _on_one_device(make_strategy(1), "clipnorm")
    three = _run(make_strategy(3), SETTINGS["clipnorm"], AppliesByItself, prepare)
    three.history = one.history  # Its logs are of the last batches.
    comparing.assert_same(one, three)


def test_stateless_apply_is_left_alone(make_strategy):
    with make_strategy(2).scope():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05), "mse")
    with pytest.raises(ValueError, match="not supported with the TensorFlow backend"):
        model.optimizer.stateless_apply([], [], [])


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda o, g, v: o.apply([None for _ in g], v), "No gradients provided"),
        (lambda o, g, v: o.apply(g), "must already be built"),
    ],
)
def test_what_keras_refuses(make_strategy, how, message):
    def prepare(model):
        model.how = how

    with pytest.raises(ValueError, match=message):
        _run(make_strategy(2), lambda: "sgd", AppliesByItself, prepare)


class NoGradient(distfit.Model):
    """One of its variables has no gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unused = self.add_weight(shape=(2,), name="unused")


@pytest.mark.parametrize("steps", pick([2], [None, 2]))
def test_variable_without_gradient(make_strategy, steps):
    def run(replicas):
        return _run(
            make_strategy(replicas),
            lambda: keras.optimizers.Adam(0.05, gradient_accumulation_steps=steps),
            NoGradient,
        )

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        comparing.assert_same(run(1), run(3))


class ReadsLossesLast(distfit.Model):
    """It reads what its layers added after the optimizers have been applied."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"added": self.losses[0]}


def test_added_losses_can_be_read_after_an_update(make_strategy):
    def run(replicas):
        return _run(
            make_strategy(replicas),
            lambda: keras.optimizers.SGD(0.05),
            ReadsLossesLast,
            activity_regularizer="l2",
        )

    one = run(1)
    comparing.assert_same(one, run(2))
    comparing.assert_same(one, run(3))


def test_iterations_are_counted_once_per_step_on_all_replicas(make_strategy):
    strategy, seen = make_strategy(3), []
    with strategy.scope():
        model = distfit.Sequential([keras.Input((8,)), layers.Dense(1)])
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.01])
        model.compile(keras.optimizers.SGD(schedule), "mse", steps_per_execution=3)

    def look(batch, logs):
        copies = strategy.experimental_local_results(model.optimizer.iterations.value)
        rate = float(model.optimizer.learning_rate)
        seen.append(([int(copy) for copy in copies], round(rate, 6)))

    _fit(model, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=look)])
    assert seen == [
        ([3] * 3, 0.01),
        ([4] * 3, 0.01),
        ([7] * 3, 0.01),
        ([8] * 3, 0.01),
    ]


# Sparse gradients.

SPARSE = {
    "adam": lambda: keras.optimizers.Adam(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.05),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.05),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.02),
    "ema": lambda: keras.optimizers.Adam(
        0.05, weight_decay=0.1, use_ema=True, ema_overwrite_frequency=3
    ),
}


class Sparse(distfit.Model):
    """A model whose first gradient holds rows of an embedding."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        assert isinstance(gradients[0], tf.IndexedSlices)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def run_sparse(strategy, make_optimizer):
    """Trains an embedding of 6 rows, many of which are looked up several times."""

    def build():
        inputs = keras.Input((3,), dtype="int32")
        x = layers.Embedding(6, 4, name="embedding")(inputs)
        x = layers.Flatten()(x)
        model = Sparse(inputs, layers.Dense(1, kernel_constraint="unit_norm")(x))
        model.compile(make_optimizer(), "mse")
        return model

    def fit(model):
        generator = np.random.default_rng(3)
        x = generator.integers(0, 6, (ROWS, 3)) ** 2 // 5
        y = generator.normal(size=(ROWS, 1))
        return model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)

    return comparing.run(strategy, build, fit)


@functools.cache
def _sparse_on_one_device(strategy, name):
    return run_sparse(strategy, SPARSE[name])


# The others train an embedding in test_keras_functions.py, or stand beside harder ones.
FEW_SPARSE = ["global_clipnorm", "ema"]


@pytest.mark.parametrize(
    "name, replicas",
    [
        *((name, 3) for name in pick(FEW_SPARSE, list(SPARSE))),
        *pick([], [("adam", 2), ("adam", 4), ("adagrad", 4)]),
    ],
)
def test_sparse_gradients_equal_one_device(make_strategy, name, replicas):
    """Rows that several replicas look up are those one device looks up repeatedly."""
    one = _sparse_on_one_device(make_strategy(1), name)
    comparing.assert_same(one, run_sparse(make_strategy(replicas), SPARSE[name]))


class MakesItsOptimizer(keras.Model):
    own = None

    def train_step(self, data):
        x, y = data
        if self.own is None:
            self.own = keras.optimizers.SGD(0.02, momentum=0.9)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y))
        variables = self.trainable_variables
        self.own.apply(tape.gradient(loss, variables), variables)
        return {"error": loss}


@pytest.mark.parametrize("replicas", [1, 3])
def test_an_optimizer_made_in_the_first_step(make_strategy, replicas):
    def train(fit, strategy):
        keras.utils.set_random_seed(0)
        with comparing.scope_of(strategy):
            inputs = keras.Input((8,))
            model = MakesItsOptimizer(inputs, layers.Dense(1)(inputs))
            model.compile()
        data = comparing.regression_data(20)
        options = {"batch_size": 6, "epochs": 2, "shuffle": False, "verbose": 0}
        return comparing.Run(fit(model, *data, **options).history, model.get_weights())

    one = train(keras.Model.fit, None)
    comparing.assert_same(one, train(distfit.fit, make_strategy(replicas)))
