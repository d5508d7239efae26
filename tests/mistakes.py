"""Models for `distfit.verify`: right ones, and some with one mistake each.

A line that a report must name ends in a comment `# here`; `place(cls)` finds it.
"""

import inspect
import itertools

import keras
import numpy as np
import tensorflow as tf
from keras import layers


def place(cls: type) -> str:
    """`file:line` of the line marked `# here` in a class."""
    lines, first = inspect.getsourcelines(cls)
    (index,) = [i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    return f"{inspect.getsourcefile(cls)}:{first + index}"


def data(rows: int = 24):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 8)).astype("float32")
    return x, generator.normal(size=(rows, 1)).astype("float32")


def build(cls: type, optimizer=None, hidden=(), **arguments):
    """A function that makes a compiled model of a class."""

    def make():
        inputs = keras.Input((8,))
        x = layers.Dense(6, activation="tanh")(inputs)
        for make_layer in hidden:
            x = make_layer()(x)
        model = cls(inputs, layers.Dense(1)(x))
        made = optimizer() if optimizer else keras.optimizers.SGD(0.1)
        model.compile(made, "mse", **arguments)
        return model

    return make


class Right(keras.Model):
    """A step without a mistake, for the others to vary."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def loss_of(self, x, y):
        return self.compute_loss(y=y, y_pred=self(x, training=True))


class ByHand(Right):
    """Right: the batch is the global batch, and the only replica is the first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seeds = keras.random.SeedGenerator(5)
        self.error = keras.metrics.Mean(name="error")

    def loss_of(self, x, y):
        y_pred = self(x + 0.1 * keras.random.normal(tf.shape(x)), training=True)
        loss = tf.reduce_mean(tf.square(y - y_pred))
        pairs = tf.matmul(y_pred, y_pred, transpose_b=True)
        loss += 0.1 * tf.reduce_mean(tf.abs(pairs - tf.transpose(pairs) + 1.0))
        loss += 0.1 * tf.reduce_sum(tf.square(self.trainable_variables[0]))
        self.error.update_state(tf.reduce_max(tf.abs(y - y_pred)))
        context = tf.distribute.get_replica_context()
        (loss,) = context.all_reduce("sum", [loss])
        return keras.random.uniform((), 0.5, 1.5, seed=self.seeds) * loss

    def train_step(self, data):
        logs = super().train_step(data)
        for weight in self.trainable_variables:
            weight.assign(tf.clip_by_value(weight, -0.3, 0.3))
        largest = tf.reduce_max(self(data[0]))
        return {**logs, "largest": largest, "error": self.error.result()}


class SingularRows(Right):
    """Right, but not partitioned."""

    def loss_of(self, x, y):
        y_pred = self(x, training=True)
        ranked = tf.linalg.svd(y - y_pred, compute_uv=False)  # here
        return self.compute_loss(y=y, y_pred=y_pred) + 0.1 * tf.reduce_sum(ranked)


class DividedByReplicas(Right):
    """Its loss is what a step under tf.distribute has to scale by hand."""

    def loss_of(self, x, y):
        number = self.distribute_strategy.num_replicas_in_sync
        return super().loss_of(x, y) / number


def rate_by_replicas() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.1 * tf.distribute.get_strategy().num_replicas_in_sync)


class RunsOnReplicas(Right):
    """Distributes its forward pass by itself."""

    def loss_of(self, x, y):
        y_pred = self.distribute_strategy.run(self, args=(x,))
        return self.compute_loss(y=y, y_pred=y_pred)  # here


class LocalMean(layers.Layer):
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
            self.mean.assign(0.9 * self.mean + 0.1 * mean)
        return inputs


class VariableOfValue(Right):
    def loss_of(self, x, y):
        loss = super().loss_of(x, y)
        return tf.Variable(loss) * loss


class Broken(Right):
    def loss_of(self, x, y):
        raise KeyError("no such column")  # here


class UnseededNoise(Right):
    def loss_of(self, x, y):
        return super().loss_of(x + tf.random.normal(tf.shape(x)), y)  # here


class CountsInPython(Right):
    """A Python function in the step counts its calls."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = itertools.count(1)

    def loss_of(self, x, y):
        count = tf.numpy_function(lambda: np.float32(next(self.calls)), [], "float32")
        return tf.reshape(count, ()) * super().loss_of(x, y)
