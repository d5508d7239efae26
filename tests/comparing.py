"""Trains the same model on one device and on N replicas, and compares the numbers."""

import contextlib
import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from distfit import _keras
from distfit.cluster import workers

RELATIVE = 1e-5  # of losses and metrics
ABSOLUTE = 1e-5  # of weights


@dataclasses.dataclass
class Run:
    """The results of a training."""

    history: dict
    weights: list
    evaluation: dict | None = None
    predictions: np.ndarray | None = None


def run(strategy, build: Callable, fit: Callable, then: Callable | None = None) -> Run:
    """Builds a model in the scope of a strategy, with the same seed, and trains it.

    Args:
        strategy: Where to train.
        build: `() -> compiled model`.
        fit: `model -> History`.
        then: `model -> (evaluation, predictions)`.
    """
    keras.utils.set_random_seed(7)
    with strategy.scope():
        model = build()
    history = fit(model).history
    evaluation, predictions = then(model) if then else (None, None)
    check_replicas_agree(strategy, model)
    return Run(history, model.get_weights(), evaluation, predictions)


def scope_of(strategy) -> contextlib.AbstractContextManager:
    """The scope of a strategy; without one, that of stock Keras on one device."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def check_replicas_agree(strategy, model) -> None:
    """All replicas, of all workers, hold the same weights, bit for bit."""
    team = workers.of(strategy)
    if team.count > 1:
        bits = b"".join(_keras.local_value(v).tobytes() for v in model.weights)
        team.check_alike("the weights", {"weights": workers.checksum(bits)})
    for variable in model.weights:
        first, *others = strategy.experimental_local_results(variable.value)
        for other in others:
            np.testing.assert_array_equal(
                first.numpy(), other.numpy(), err_msg=variable.path
            )


def assert_same(one: Run, other: Run, relative=RELATIVE, absolute=ABSOLUTE) -> None:
    """Losses and metrics agree relatively, weights and predictions absolutely."""
    assert_close_logs(one.history, other.history, relative)
    assert len(one.weights) == len(other.weights)
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=absolute)
    if one.evaluation is not None:
        assert_close_logs(one.evaluation, other.evaluation, relative)
    if one.predictions is not None:
        assert one.predictions.shape == other.predictions.shape
        np.testing.assert_allclose(
            other.predictions, one.predictions, rtol=0, atol=10 * absolute
        )


def assert_close_logs(one: dict, other: dict, relative: float) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(
            other[name], values, rtol=relative, atol=1e-7, err_msg=name
        )


def regression_data(rows: int, features: int = 8, seed: int = 0):
    """`(x, y)`: a linear target with noise."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, features)).astype("float32")
    y = x @ generator.normal(size=(features, 1)) + generator.normal(size=(rows, 1))
    return x, y.astype("float32")
