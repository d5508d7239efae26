"""Models with one mistake each, for `distfit.verify` to find.

The line of a mistake ends in a comment `# here`; `place(cls)` finds it.
"""

import inspect

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import distfit


def place(cls: type) -> str:
    """`file:line` of the line marked `# here` in a class."""
    lines, first = inspect.getsourcelines(cls)
    (index,) = [i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{inspect.getsourcefile(cls)}:{first + index}"


def data(rows: int = 24):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 8)).astype("float32")
    return x, generator.normal(size=(rows, 1)).astype("float32")


def build(cls: type, optimizer=None, hidden=()):
    """A function that makes a compiled model of a class."""

    def make():
        inputs = keras.Input((8,))
        x = layers.Dense(6, activation="tanh")(inputs)
        for make_layer in hidden:
            x = make_layer()(x)
        model = cls(inputs, layers.Dense(1)(x))
        model.compile(optimizer() if optimizer else keras.optimizers.SGD(0.1), "mse")
        return model

    return make


class Right(distfit.Model):
    """A step without a mistake, for the others to vary."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.update(gradients)
        return {"loss": loss}

    def loss_of(self, x, y):
        return self.compute_loss(y=y, y_pred=self(x, training=True))

    def update(self, gradients):
        self.optimizer.apply(gradients, self.trainable_variables)


class BareMean(Right):
    def loss_of(self, x, y):
        return tf.reduce_mean(tf.square(y - self(x, training=True)))  # here


class BareMeanOfPart(Right):
    """The compiled loss is right, what is added to it is not."""

    def loss_of(self, x, y):
        y_pred = self(x, training=True)
        extra = tf.reduce_mean(tf.abs(y_pred))  # here
        return self.compute_loss(y=y, y_pred=y_pred) + 0.1 * extra


class SumByHand(Right):
    def update(self, gradients):
        context = tf.distribute.get_replica_context()
        gradients = context.all_reduce("sum", gradients)  # here
        self.optimizer.apply(gradients, self.trainable_variables)


class LocalPairs(Right):
    """A contrastive loss: each row is to be most similar to itself."""

    def loss_of(self, x, y):
        z = tf.math.l2_normalize(self.layers[1](x), axis=1)
        similarities = tf.matmul(z, z + 0.1, transpose_b=True)  # here
        labels = tf.range(tf.shape(x)[0])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return loss(labels, similarities) + self.compute_loss(y=y, y_pred=self(x))


class PenaltyByHand(Right):
    def loss_of(self, x, y):
        kernel = self.trainable_variables[0]
        penalty = tf.reduce_sum(tf.square(kernel))  # here
        return super().loss_of(x, y) + 0.1 * penalty


class DescentByHand(Right):
    def update(self, gradients):
        for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.1 * gradient)


class CentredRows(layers.Layer):
    def call(self, inputs):
        return inputs - tf.reduce_mean(inputs, axis=0)  # here


class CountedRows(layers.Layer):
    """Counts rows, each replica its own."""

    def build(self, input_shape):
        self.rows = self.add_weight(shape=(), trainable=False, name="rows")

    def call(self, inputs, training=False):
        if training:
            rows = tf.cast(tf.shape(inputs)[0], "float32")
            self.rows.assign(self.rows + rows)  # here
        return inputs


class ReplicaVariable(layers.Layer):
    """Keeps a running mean in a variable of TensorFlow that is local to a replica."""

    def build(self, input_shape):
        self.mean = tf.Variable(
            tf.zeros(input_shape[-1]),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
        )

    def call(self, inputs, training=False):
        if training:
            mean = tf.reduce_mean(inputs, axis=0)
            self.mean.assign(0.9 * self.mean + 0.1 * mean)  # here
        return inputs


class UnlistedMetric(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.error = keras.metrics.MeanAbsoluteError(name="error")

    @property
    def metrics(self):
        return []

    def train_step(self, data):
        logs = super().train_step(data)
        self.error.update_state(data[1], self(data[0]))
        return {**logs, "error": self.error.result()}


class SameNoise(Right):
    def loss_of(self, x, y):
        noise = tf.random.stateless_normal(tf.shape(x), seed=(1, 2))  # here
        return super().loss_of(x + noise, y)


class SameNoiseByNumber(Right):
    def loss_of(self, x, y):
        return super().loss_of(x + keras.random.normal(tf.shape(x), seed=3), y)  # here


class UnseededNoise(Right):
    def loss_of(self, x, y):
        return super().loss_of(x + tf.random.normal(tf.shape(x)), y)  # here


class OneNumberPerReplica(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seeds = keras.random.SeedGenerator(5)

    def loss_of(self, x, y):
        scale = keras.random.uniform((), 0.5, 1.5, seed=self.seeds)  # here
        return scale * super().loss_of(x, y)


class LargestLog(Right):
    def train_step(self, data):
        logs = super().train_step(data)
        return {**logs, "largest": tf.reduce_max(self(data[0]))}  # here


class LocalScalarInMetric(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.error = keras.metrics.Mean(name="error")

    def train_step(self, data):
        logs = super().train_step(data)
        x, y = data
        self.error.update_state(tf.reduce_max(tf.abs(y - self(x))))  # here
        return {**logs, "error": self.error.result()}


class OptimizerInStep(Right):
    def update(self, gradients):
        optimizer = keras.optimizers.SGD(0.1)  # here
        optimizer.apply(gradients, self.trainable_variables)


class VariableInStep(Right):
    def loss_of(self, x, y):
        scale = tf.Variable(2.0)  # here
        return scale * super().loss_of(x, y)


class FirstReplicaOnly(Right):
    def loss_of(self, x, y):
        context = tf.distribute.get_replica_context()
        is_first = tf.equal(context.replica_id_in_sync_group, 0)  # here
        return tf.where(is_first, 2.0, 1.0) * super().loss_of(x, y)


class PythonCounter(Right):
    steps_done = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps_done = 0

    def train_step(self, data):
        self.steps_done += 1  # here
        return super().train_step(data)


class RawLosses(keras.Model):
    """Right as a `distfit.Model`; under Keras each replica adds the whole penalty."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = keras.losses.MeanSquaredError()(y, y_pred)
            loss += sum(self.losses)  # here
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}
