"""The random generators of Python, NumPy and TensorFlow as values for JSON."""

import random
from typing import Any

import numpy as np
import tensorflow as tf

from distfit import _keras


def state() -> dict[str, Any]:
    """The state of all three; TensorFlow's is None if nothing has seeded it."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "tensorflow": _keras.tensorflow_generator_state(),
    }


def set_state(state: dict[str, Any]) -> None:
    """Sets what `state` has returned, before or after JSON."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, "uint32"), *rest))
    if state["tensorflow"] is not None:
        _keras.set_tensorflow_generator_state(state["tensorflow"])


def seed_if_unseeded() -> None:
    """Gives TensorFlow a seed if it has none: its shuffles can then be repeated."""
    if _keras.tensorflow_generator_state() is None:
        tf.random.set_seed(int(np.random.SeedSequence().generate_state(1)[0]))
