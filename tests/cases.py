"""Thirty training steps as people write them for one device.

Each case is a function of the class that models are made of, `keras.Model` or
`distfit.Model`, and returns a `Case`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, losses, optimizers


@dataclasses.dataclass
class Case:
    """A model and its data.

    Attributes:
        build: Makes a compiled model; takes what `outside` returns.
        data: The arguments of `fit`.
        options: Keyword arguments of `fit`.
        outside: Makes objects outside of any strategy's scope.
    """

    build: Callable
    data: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    outside: Callable[[], Sequence] = tuple


CASES: dict[str, Callable[[type], Case]] = {}


def case(function: Callable[[type], Case]) -> Callable[[type], Case]:
    """Registers a case by its name."""
    CASES[function.__name__] = function
    return function


def rows(outputs: int = 1) -> tuple:
    """`(x, y)` of 22 rows: the last of the batches of 8 has 6."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(22, 4)).astype("float32")
    return x, generator.normal(size=(22, outputs)).astype("float32")


def net(cls: type) -> keras.Model:
    """A small functional model of a class."""
    inputs = keras.Input((4,))
    hidden = layers.Dense(6, activation="tanh")(inputs)
    return cls(inputs, layers.Dense(1)(hidden))


def squares(model, x, y, predictions):
    """The mean squared error by hand."""
    return tf.reduce_mean(tf.square(y - predictions))


def stepping(
    base: type,
    loss_of: Callable,
    *,
    gradients_of: Callable = lambda gradients: gradients,
    after: Callable | None = None,
) -> type:
    """A class of models whose step minimizes `loss_of(model, x, y, predictions)`.

    Args:
        base: Its base class.
        loss_of: Returns the loss.
        gradients_of: Changes gradients before they are applied.
        after: Called with `(model, x, loss)` after they are applied.
    """

    class Stepping(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = loss_of(self, x, y, self(x, training=True))
            weights = self.trainable_variables
            self.optimizer.apply(gradients_of(tape.gradient(loss, weights)), weights)
            if after is not None:
                after(self, x, loss)
            return {"raw": loss}

    return Stepping


def simple(base: type, loss_of: Callable, rate: float = 0.1, **parts) -> Case:
    """A case of the small model with a step made by `stepping`."""
    cls = stepping(base, loss_of, **parts)

    def build():
        model = net(cls)
        model.compile(optimizers.SGD(rate))
        return model

    return Case(build, rows())


@case
def mean(base):
    return simple(base, squares)


@case
def ops_mean(base):
    return simple(base, lambda model, x, y, p: keras.ops.mean(keras.ops.square(y - p)))


@case
def sum_by_rows(base):
    def loss_of(model, x, y, p):
        return tf.reduce_sum(tf.square(y - p)) / tf.cast(tf.shape(x)[0], tf.float32)

    return simple(base, loss_of)


@case
def root_of_mean(base):
    return simple(base, lambda *args: tf.sqrt(squares(*args)))


@case
def masked_mean(base):
    def loss_of(model, x, y, p):
        kept = tf.cast(y > 0, tf.float32)
        total = tf.reduce_sum(kept * tf.square(y - p))
        return total / (tf.reduce_sum(kept) + 1e-6)

    return simple(base, loss_of)


@case
def clip_by_hand(base):
    return simple(
        base, squares, gradients_of=lambda given: tf.clip_by_global_norm(given, 0.1)[0]
    )


@case
def sign_of_gradient(base):
    def loss_of(model, x, y, p):
        return tf.reduce_mean(tf.abs(y - p))

    def signs(gradients):
        return [tf.sign(g) for g in gradients]

    return simple(base, loss_of, rate=0.01, gradients_of=signs)


@case
def pairs_of_rows(base):
    def loss_of(model, x, y, p):
        z = tf.math.l2_normalize(tf.concat([p, y], 1), axis=1)
        similar = tf.matmul(z, z, transpose_b=True) / 0.5
        own = tf.range(tf.shape(z)[0])
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(own, similar)
        )

    return simple(base, loss_of)


@case
def learned_weight(base):
    squared = losses.MeanSquaredError()

    def loss_of(model, x, y, p):
        scale = tf.convert_to_tensor(model.scale)
        return tf.exp(-scale) * squared(y, p) + scale

    def build():
        model = net(stepping(base, loss_of))
        model.scale = model.add_weight(shape=(), initializer="ones", name="scale")
        model.compile(optimizers.SGD(0.1))
        return model

    return Case(build, rows())


@case
def target_copied(base):
    class WithTarget(base):
        def __init__(self):
            super().__init__()
            self.online = layers.Dense(1)
            self.target = layers.Dense(1, trainable=False)
            self.online.build((None, 4))
            self.target.build((None, 4))

        def call(self, x):
            return self.online(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                target = y + 0.5 * self.target(x)
                loss = self.compute_loss(y=target, y_pred=self(x, training=True))
            weights = self.online.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            for old, new in zip(self.target.weights, self.online.weights, strict=True):
                old.assign(new)
            return {"raw": loss}

    def build():
        model = WithTarget()
        model.compile("sgd", "mse")
        return model

    return Case(build, rows())


class Positions(layers.Layer):
    """Adds a learned embedding of the position."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(5, 3)

    def call(self, x):
        return x + self.embedding(tf.range(5))


@case
def position_embedding(base):
    def build():
        inputs = keras.Input((5, 3))
        model = base(inputs, layers.Dense(1)(Positions()(inputs)))
        model.compile(optimizers.Adam(0.01), "mse")
        return model

    generator = np.random.default_rng(0)
    x = generator.normal(size=(22, 5, 3)).astype("float32")
    return Case(build, (x, generator.normal(size=(22, 5, 1)).astype("float32")))


@case
def decorated_step(base):
    class Decorated(base):
        @tf.function
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = squares(self, x, y, self(x, training=True))
            weights = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return {"raw": loss}

    return _compiled(Decorated)


def _compiled(cls: type, optimizer="sgd", loss=None, **options) -> Case:
    def build():
        model = net(cls)
        model.compile(keras.optimizers.get(optimizer), loss)
        return model

    return Case(build, rows(), options)


@case
def decorated_helper(base):
    class Helped(base):
        @tf.function
        def update(self, x, y):
            with tf.GradientTape() as tape:
                loss = squares(self, x, y, self(x, training=True))
            weights = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return loss

        def train_step(self, data):
            return {"raw": self.update(*data)}

    return _compiled(Helped)


@case
def optimizer_in_dict(base):
    class WithDict(base):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
            weights = self.trainable_variables
            self.by_name["a"].apply(tape.gradient(loss, weights), weights)
            return {"raw": loss}

    def build():
        model = net(WithDict)
        model.compile(loss="mse")
        model.by_name = {}
        model.by_name["a"] = optimizers.SGD(0.1, clipnorm=0.05)
        return model

    return Case(build, rows())


@case
def accumulation(base):
    def build():
        model = net(base)
        model.compile(optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
        return model

    return Case(build, rows())


class BatchNumber(keras.callbacks.Callback):
    """Gives the model the index of the batch."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.number[0] = batch


@case
def eager_branch(base):
    squared = losses.MeanSquaredError()

    def loss_of(model, x, y, p):
        if model.number[0] % 2:
            kept = y[:, 0] > 0
            return squared(y[kept], p[kept])
        return squared(y, p)

    def build():
        model = net(stepping(base, loss_of))
        model.compile("sgd", run_eagerly=True)
        object.__setattr__(model, "number", [0])
        return model

    return Case(build, rows(), {"callbacks": [BatchNumber()]})


@case
def table_beside_rows(base):
    class WithTable(base):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs["x"]) + tf.reduce_mean(inputs["table"])

    def build():
        model = WithTable()
        model.compile("sgd", "mse")
        return model

    x, y = rows()
    table = np.arange(10, dtype="float32").reshape(5, 2)
    data = tf.data.Dataset.from_tensors(({"x": x[:6], "table": table}, y[:6]))
    return Case(build, (data,))


@case
def metric_made_outside(base):
    def after(model, x, loss):
        model.tracker.update_state(loss)

    def build(tracker):
        model = net(stepping(base, squares, after=after))
        object.__setattr__(model, "tracker", tracker)
        model.compile("sgd")
        return model

    def outside():
        return (keras.metrics.Mean(name="tracker"),)

    return Case(build, rows(), outside=outside)


@case
def seeded_noise(base):
    def loss_of(model, x, y, p):
        noise = 0.1 * tf.random.normal(tf.shape(p), seed=5)
        return tf.reduce_mean(tf.square(y - p + noise))

    return simple(base, loss_of)


@case
def keras_noise(base):
    def loss_of(model, x, y, p):
        noise = 0.1 * keras.random.normal(tf.shape(p), seed=model.generator)
        return tf.reduce_mean(tf.square(y - p + noise))

    def build():
        model = net(stepping(base, loss_of))
        model.generator = keras.random.SeedGenerator(7)
        model.compile("sgd")
        return model

    return Case(build, rows())


@case
def dropout(base):
    def build():
        inputs = keras.Input((4,))
        hidden = layers.Dropout(0.4, seed=3)(layers.Dense(6)(inputs))
        model = base(inputs, layers.Dense(1)(hidden))
        model.compile("sgd", "mse")
        return model

    return Case(build, rows())


def _with_state(base: type, after: Callable, **weight) -> Case:
    def build():
        model = net(stepping(base, squares, after=after))
        model.state = model.add_weight(
            shape=(), initializer="zeros", trainable=False, name="state", **weight
        )
        model.compile("sgd")
        return model

    return Case(build, rows())


@case
def flag_as_state(base):
    def after(model, x, loss):
        model.state.assign(tf.reduce_any(x > 1.5))

    return _with_state(base, after, dtype="bool")


@case
def counted_rows(base):
    def after(model, x, loss):
        model.state.assign_add(tf.cast(tf.shape(x)[0], "float32"))

    return _with_state(base, after)


def _with_metric(base: type, metric: type, value_of: Callable) -> Case:
    class Logging(stepping(base, squares)):
        def train_step(self, data):
            loss = super().train_step(data)["raw"]
            self.metric.update_state(value_of(loss))
            return {"m": self.metric.result()}

    def build():
        model = net(Logging)
        model.metric = metric()
        model.compile("sgd")
        return model

    return Case(build, rows())


@case
def sum_of_a_constant(base):
    return _with_metric(base, keras.metrics.Sum, lambda loss: 1.0)


class OwnMean(keras.metrics.Mean):
    """A subclass that changes nothing."""


@case
def subclass_of_mean(base):
    return _with_metric(base, OwnMean, lambda loss: loss)


@case
def loss_function_of_sum(base):
    def loss(y, p):
        return tf.reduce_sum(tf.square(y - p))

    def build():
        model = net(base)
        model.compile(optimizers.SGD(0.01), loss)
        return model

    return Case(build, rows())


@case
def dice(base):
    def build():
        inputs = keras.Input((4,))
        model = base(inputs, layers.Dense(3, activation="sigmoid")(inputs))
        model.compile(optimizers.SGD(0.5), losses.Dice())
        return model

    x, y = rows(outputs=3)
    return Case(build, (x, (y > 0).astype("float32")))


@case
def update_in_branch(base):
    class Branching(base):
        def train_step(self, data):
            x, y = data
            weights = self.trainable_variables
            with tf.GradientTape() as tape:
                loss = squares(self, x, y, self(x, training=True))
            gradients = tape.gradient(loss, weights)

            def update():
                self.optimizer.apply(gradients, weights)
                return 0

            tf.cond(loss < 2.0, update, lambda: 0)
            return {"raw": loss}

    def build():
        model = net(Branching)
        model.compile("sgd")
        model.optimizer.build(model.trainable_variables)
        return model

    return Case(build, rows())


@case
def loop_over_rows(base):
    def loss_of(model, x, y, p):
        each = [tf.reduce_sum(tf.square(y[i] - p[i])) for i in range(x.shape[0])]
        return tf.add_n(each) / x.shape[0]

    found = simple(base, loss_of)
    data = tf.data.Dataset.from_tensor_slices(found.data)
    return Case(found.build, (data.batch(6, drop_remainder=True),))


class Gan(keras.layers.Layer):
    """The networks of a small GAN."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(8, use_bias=False),
                layers.BatchNormalization(),
                layers.LeakyReLU(),
                layers.Dense(4),
            ]
        )
        self.discriminator = keras.Sequential(
            [keras.Input((4,)), layers.Dense(8), layers.LeakyReLU(), layers.Dense(1)]
        )


@case
def gan_with_noisy_labels(base):
    entropy = losses.BinaryCrossentropy(from_logits=True)

    class Trained(base):
        def __init__(self):
            super().__init__()
            nets = Gan()
            self.generator, self.discriminator = nets.generator, nets.discriminator
            self.seeds = keras.random.SeedGenerator(5)

        def compile(self, first, second):
            super().compile()
            self.first, self.second = first, second

        def latent(self, count):
            return keras.random.normal((count, 3), seed=self.seeds)

        def train_step(self, real):
            count = tf.shape(real)[0]
            fake = self.generator(self.latent(count), training=True)
            both = tf.concat([fake, real], 0)
            labels = tf.concat([tf.ones((count, 1)), tf.zeros((count, 1))], 0)
            labels += 0.05 * keras.random.uniform((2 * count, 1), seed=self.seeds)
            with tf.GradientTape() as tape:
                of_both = entropy(labels, self.discriminator(both))
            weights = self.discriminator.trainable_weights
            self.first.apply(tape.gradient(of_both, weights), weights)
            with tf.GradientTape() as tape:
                fake = self.generator(self.latent(count), training=True)
                of_fake = entropy(tf.zeros((count, 1)), self.discriminator(fake))
            weights = self.generator.trainable_weights
            self.second.apply(tape.gradient(of_fake, weights), weights)
            return {"raw_d": of_both, "raw_g": of_fake}

    def build():
        model = Trained()
        model.compile(*(optimizers.SGD(0.05, momentum=0.9) for _ in range(2)))
        return model

    return Case(build, rows()[:1])
