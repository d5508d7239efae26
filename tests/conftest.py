"""Eight virtual CPU devices for every test, and the strategies on them."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import functools

import keras
import pytest
import tensorflow as tf

import distfit

VIRTUAL_DEVICES = 8


# Before any test module is imported: TensorFlow fixes its devices at its first use.
distfit.create_strategy("mirrored", virtual_devices=VIRTUAL_DEVICES)


@functools.cache
def _strategy(replicas: int) -> tf.distribute.Strategy:
    devices = [f"CPU:{i}" for i in range(replicas)]
    name = "one_device" if replicas == 1 else "mirrored"
    return distfit.create_strategy(name, devices=devices)


@pytest.fixture(scope="session")
def make_strategy():
    """`make_strategy(n)`: a strategy with n replicas on virtual CPU devices."""
    return _strategy


@pytest.fixture(autouse=True)
def clean_session():
    """Every test starts with the same names, seeds and no leftovers."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    yield
