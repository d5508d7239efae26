"""A fixture that trains a program on one device, by stock Keras, and on replicas."""

import contextlib

import comparing
import keras
import pytest
import tensorflow as tf
from breadth import pick

import distfit

OPTIONS = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


def _trained(build, data, options, scope, fit) -> comparing.Run:
    keras.utils.set_random_seed(7)
    with scope:
        model = build()
    options = OPTIONS | options
    if isinstance(data[0], tf.data.Dataset):
        del options["batch_size"]
    history = fit(model, *data, **options).history
    return comparing.Run(history, model.get_weights())


@pytest.fixture
def assert_same(make_strategy):
    """`assert_same(build, *data, **options)`: trains what `build` makes.

    Uses `keras.Model.fit` on one device and `distfit.fit` on replicas, where
    weights and logs must be the same.
    """

    def check(build, *data, **options):
        scope = contextlib.nullcontext()
        one = _trained(build, data, options, scope, keras.Model.fit)
        for replicas in pick([3], [2, 3]):
            scope = make_strategy(replicas).scope()
            other = _trained(build, data, options, scope, distfit.fit)
            comparing.assert_same(one, other)

    return check
