"""Run as a program: what `import distfit` and training change in Keras and TensorFlow.

Prints the names of functions, classes and properties that differ from before.
"""

import inspect
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from keras.src.backend.tensorflow import random, trainer  # noqa: F401
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.optimizers.base_optimizer import BaseOptimizer

TOLD = (
    keras.Model,
    keras.losses.Loss,
    keras.layers.Layer,
    keras.Variable,
    keras.optimizers.LossScaleOptimizer,
    keras.random.SeedGenerator,
    BaseOptimizer,
    TFOptimizer,
    tf.GradientTape,
    tf.Variable,
    tf.random.Generator,
    tf.distribute.MirroredStrategy,
    random,
)


def _is_code(value) -> bool:
    wrapped = isinstance(value, property | classmethod | staticmethod)
    return wrapped or inspect.isroutine(value) or inspect.isclass(value)


def snapshot() -> dict:
    """By owner and name, all code of the modules of Keras and TensorFlow."""
    found = {}
    owners = list(TOLD)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("keras", "tensorflow") and inspect.ismodule(module):
            owners.append(module)
            owners += [v for v in vars(module).values() if inspect.isclass(v)]
    for owner in owners:
        origin = getattr(owner, "__module__", owner.__name__) or ""
        if origin.split(".")[0] in ("keras", "tensorflow"):
            for name, value in list(vars(owner).items()):
                if _is_code(value):
                    found[owner, name] = value
            found[owner, "its bases"] = getattr(owner, "__bases__", None)
    return found


def changed(before: dict, after: dict) -> list[str]:
    """What differs, and what classes have gained."""
    others = [key for key, value in before.items() if after.get(key) is not value]
    owners = {owner for owner, _ in before if inspect.isclass(owner)}
    added = [key for key in after if key not in before and key[0] in owners]
    return sorted(f"{owner.__name__}.{name}" for owner, name in others + added)


def train(distfit) -> None:
    strategy = distfit.create_strategy("mirrored", virtual_devices=2)
    with strategy.scope():
        inputs = keras.Input((3,))
        hidden = layers.BatchNormalization()(layers.Dropout(0.5)(inputs))
        model = distfit.Model(inputs, layers.Dense(1)(hidden))
        optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer), "mse")
    x = np.ones((5, 3), "float32")
    model.fit(x, x[:, :1], batch_size=3, validation_data=(x, x[:, :1]), verbose=0)
    model.predict(x, verbose=0)


def warm_up() -> None:
    """Makes Keras and TensorFlow fill in the names that they fill in later."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((np.ones((2, 3)), np.ones((2, 1))))
    model.fit(data, verbose=0)


if __name__ == "__main__":
    # Devices are fixed at the first use.
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    warm_up()
    before = snapshot()
    assert len(before) > 10_000
    import distfit

    print("import:", *changed(before, snapshot()))
    train(distfit)
    print("training:", *changed(before, snapshot()))
    keras.Model.fit = lambda self: None
    print("check:", *changed(before, snapshot()))
