"""Training steps as people write them: N replicas give the numbers of one device."""

import contextlib
import functools

import comparing
import keras
import pytest
import tensorflow as tf
from breadth import numbers_of_replicas
from cases import CASES, Case

import distfit

OPTIONS = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


def _trained(case: Case, scope, fit) -> comparing.Run:
    keras.utils.set_random_seed(3)
    made = case.outside()
    with scope:
        model = case.build(*made)
    options = OPTIONS | case.options
    if isinstance(case.data[0], tf.data.Dataset):
        del options["batch_size"]
    history = fit(model, *case.data, **options).history
    return comparing.Run(history, model.get_weights())


@functools.cache
def _on_one_device(name: str) -> comparing.Run:
    case = CASES[name](keras.Model)
    return _trained(case, contextlib.nullcontext(), keras.Model.fit)


@pytest.mark.parametrize("replicas", numbers_of_replicas([4], [3, 4]))
@pytest.mark.parametrize("name", CASES)
def test_keras_model(make_strategy, name, replicas):
    case = CASES[name](keras.Model)
    trained = _trained(case, make_strategy(replicas).scope(), distfit.fit)
    comparing.assert_same(_on_one_device(name), trained)


# The methods of `distfit.Model` differ from `distfit.fit` in who calls them: by default
# a few of the cases tell, but workers, which train these alone, get all.
OF_METHODS = ["accumulation", "decorated_step", "eager_branch", "gan_with_noisy_labels"]


@pytest.mark.parametrize("replicas", [2])
@pytest.mark.parametrize("name", numbers_of_replicas(OF_METHODS, list(CASES)))
def test_distfit_model(make_strategy, name, replicas):
    case = CASES[name](distfit.Model)
    trained = _trained(case, make_strategy(replicas).scope(), distfit.Model.fit)
    comparing.assert_same(_on_one_device(name), trained)
