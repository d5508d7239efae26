"""Random generators as values for JSON: the global ones, and those of an object."""

import array
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from distfit import _keras

KINDS = (random.Random, np.random.RandomState, np.random.Generator)


def generators_of(thing: Any) -> dict[str, Any]:
    """The generators of Python and NumPy among the attributes of an object."""
    values = getattr(thing, "__dict__", {})
    return {name: value for name, value in values.items() if isinstance(value, KINDS)}


def state(others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The states of the global generators; TensorFlow's is None if nothing seeded it.

    Args:
        others: More generators, by name.
    """
    states = {
        "python": _of_python(random),
        "numpy": _of_numpy(np.random),
        "tensorflow": _keras.tensorflow_generator_state(),
    }
    for name, generator in (others or {}).items():
        states[f"own {name}"] = of(generator)
    return states


def set_state(states: dict[str, Any], others: Mapping[str, Any] | None = None) -> None:
    """Sets what `state` has returned, or a part of it, before or after JSON."""
    if "python" in states:
        _set_python(random, states["python"])
    if "numpy" in states:
        _set_numpy(np.random, states["numpy"])
    if states.get("tensorflow") is not None:
        _keras.set_tensorflow_generator_state(states["tensorflow"])
    for name, generator in (others or {}).items():
        if f"own {name}" in states:
            _set(generator, states[f"own {name}"])


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The states that are others after something than before."""
    return {name: now for name, now in after.items() if now != before.get(name)}


def seed_if_unseeded() -> None:
    """Gives TensorFlow a seed if it has none: its shuffles can then be repeated."""
    if _keras.tensorflow_generator_state() is None:
        tf.random.set_seed(int(np.random.SeedSequence().generate_state(1)[0]))


def made(kind: str, state: Any) -> Any:
    """A new generator of one of `KINDS`, with a state that `of` has returned."""
    if kind == "Random":
        generator: Any = random.Random()
    elif kind == "RandomState":
        generator = np.random.RandomState()
    else:
        bits = json.loads(state)["bit_generator"]
        generator = np.random.Generator(getattr(np.random, bits)())
    _set(generator, state)
    return generator


def of(generator: Any) -> Any:
    """The state of a generator, for JSON."""
    if isinstance(generator, random.Random):
        return _of_python(generator)
    if isinstance(generator, np.random.RandomState):
        return _of_numpy(generator)
    return json.dumps(generator.bit_generator.state, default=np.ndarray.tolist)


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        _set_python(generator, state)
    elif isinstance(generator, np.random.RandomState):
        _set_numpy(generator, state)
    else:
        generator.bit_generator.state = json.loads(state)


# The words of a Mersenne Twister are in hex: a state is taken with each batch.


def _of_python(generator: Any) -> list:
    version, words, gauss = generator.getstate()
    return [version, array.array("I", words).tobytes().hex(), gauss]


def _set_python(generator: Any, state: list) -> None:
    version, words, gauss = state
    generator.setstate((version, tuple(array.array("I", bytes.fromhex(words))), gauss))


def _of_numpy(generator: Any) -> list:
    name, keys, position, has_gauss, cached = generator.get_state(legacy=True)
    return [name, keys.astype("uint32").tobytes().hex(), position, has_gauss, cached]


def _set_numpy(generator: Any, state: list) -> None:
    name, keys, *rest = state
    generator.set_state((name, np.frombuffer(bytes.fromhex(keys), "uint32"), *rest))
