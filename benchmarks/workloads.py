"""The work: a model, its data and its epoch, the same for every contender.

Functions that build something take `keras` as an argument: it is Keras 3 or tf_keras.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from distfit.datasets import mnist, synthetic
from distfit.models import masked_lm

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its data and its epoch.

    Attributes:
        name: Its key in `WORKLOADS`.
        batch_size: Rows of the global batch.
        epoch_steps: Steps of the epoch that is timed.
        arrays: Returns `(x, y)`.
        network: `network(keras)` returns the `(inputs, outputs)` of a functional model.
        loss: `loss(keras, **kwargs)` returns a Keras loss.
        metric: `metric(keras)` returns a Keras metric.
        optimizer: `optimizer(keras)` returns a Keras optimizer.
        fixed: Whether the pipeline declares a fixed batch size.
    """

    name: str
    batch_size: int
    epoch_steps: int
    arrays: Callable[[], Arrays]
    network: Callable[[Any], tuple]
    loss: Callable[..., Any]
    metric: Callable[[Any], Any]
    optimizer: Callable[[Any], Any] = lambda keras: keras.optimizers.Adam()
    fixed: bool = True

    def on_workers(self, count: int) -> "Workload":
        """The same rows for each worker: a global batch `count` times as large."""
        return dataclasses.replace(self, batch_size=count * self.batch_size)

    def dataset(self) -> tf.data.Dataset:
        """Endless global batches.

        An idle worker prefetches a few, too few to affect the next epoch.
        """
        return (
            tf.data.Dataset.from_tensor_slices(self.arrays())
            .batch(self.batch_size, drop_remainder=self.fixed)
            .repeat()
            .prefetch(4)
        )


def _regression() -> Arrays:
    return synthetic.regression(rows=32 * 100)


def _digits() -> Arrays:
    images, labels = mnist.scaled(*mnist.load()[0])
    rows = 64 * 150  # Full batches only.
    return images[:rows], labels[:rows]


def _noise() -> Arrays:
    """Unrelated images and labels."""
    generator = np.random.default_rng(0)
    images = generator.random((8 * 10, 32, 32, 3), "float32")
    return images, generator.integers(10, size=len(images), dtype="int32")


def _tokens() -> Arrays:
    """Sequences that are their own targets."""
    tokens = np.random.default_rng(0).integers(
        masked_lm.MASK, masked_lm.VOCABULARY, (32 * 10, masked_lm.LENGTH), "int32"
    )
    return tokens, tokens


def _mlp_network(keras) -> tuple:
    inputs = keras.Input((32,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    return inputs, keras.layers.Dense(1)(hidden)


def _cnn_network(keras) -> tuple:
    inputs = x = keras.Input((28, 28, 1))
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    return inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x))


def _resnet_network(keras) -> tuple:
    model = keras.applications.ResNet50(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )
    return model.inputs[0], model.outputs[0]


def _transformer_network(keras) -> tuple:
    """The network of the masked language model, which needs Keras 3."""
    model = masked_lm.make_network(masked_lm.LENGTH, width=64, heads=4, blocks=4)
    return model.inputs[0], model.outputs[0]


def _squared_error(keras, **kwargs):
    return keras.losses.MeanSquaredError(**kwargs)


def _crossentropy(keras, **kwargs):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def _accuracy(keras):
    return keras.metrics.SparseCategoricalAccuracy(name="accuracy")


WORKLOADS = {
    "mlp": Workload(
        name="mlp",
        batch_size=32,
        epoch_steps=500,
        arrays=_regression,
        network=_mlp_network,
        loss=_squared_error,
        metric=lambda keras: keras.metrics.MeanAbsoluteError(name="mae"),
    ),
    "cnn": Workload(
        name="cnn",
        batch_size=64,
        epoch_steps=50,
        arrays=_digits,
        network=_cnn_network,
        loss=_crossentropy,
        metric=_accuracy,
    ),
    "resnet50": Workload(
        name="resnet50",
        batch_size=8,
        epoch_steps=10,
        arrays=_noise,
        network=_resnet_network,
        loss=_crossentropy,
        metric=_accuracy,
        optimizer=lambda keras: keras.optimizers.SGD(0.01, momentum=0.9),
    ),
    "transformer": Workload(
        name="transformer",
        batch_size=32,
        epoch_steps=10,
        arrays=_tokens,
        network=_transformer_network,
        loss=_crossentropy,
        metric=_accuracy,
    ),
}
