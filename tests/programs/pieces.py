"""Data and small networks of the programs."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

ROWS = 23  # In batches of 8: the last has 7.


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers for each row."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(ROWS, *shape)).astype("float32")


def classes(count: int, *shape: int, seed: int = 1) -> np.ndarray:
    """Integers below `count` for each row."""
    return np.random.default_rng(seed).integers(0, count, (ROWS, *shape), "int32")


def mlp(inputs: int, outputs: int, hidden: int = 6) -> keras.Sequential:
    """A network of two layers."""
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(hidden, activation="tanh"),
            layers.Dense(outputs),
        ]
    )


class Program(keras.Model):
    """A model around a network whose step minimizes `loss(*data)`."""

    def __init__(self, net: keras.Model):
        super().__init__()
        self.net = net

    def call(self, x, training=None):
        return self.net(x, training=training)

    def loss_of(self, *data):
        raise NotImplementedError

    def train_step(self, data):
        data = data if isinstance(data, tuple) else (data,)
        with tf.GradientTape() as tape:
            loss = self.loss_of(*data)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"raw": loss}


def compiled(make, optimizer="sgd", rate=0.05, **options):
    """Returns `build()`, which makes the model by `make` and compiles it."""

    def build():
        model = make()
        made = keras.optimizers.get(optimizer)
        made.learning_rate = rate
        model.compile(made, **options)
        return model

    return build
