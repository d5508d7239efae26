"""The compiled steps of a model, for batches of each layout."""

import logging
import operator
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras import tree

from distfit import _keras
from distfit.training import checks
from distfit.training.data_clock import DataClock
from distfit.training.driver import StepDriver
from distfit.training.finite import FiniteWatch
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import check_element_spec
from distfit.training.predict_driver import PredictDriver
from distfit.training.shards import Shards
from distfit.training.shares import Layout

_KINDS = ("train", "test", "predict")


def step_driver(
    model,
    kind: str,
    batches: GlobalBatches,
    watched: bool = False,
    timed: bool = False,
) -> StepDriver:
    """The compiled steps of a kind for some data, built if there are none yet.

    Args:
        model: The model.
        kind: `"train"` or `"test"`.
        batches: The data.
        watched: Whether the steps watch for non-finite losses.
        timed: Whether they measure how long they wait for data.
    """
    sharded = isinstance(batches, Shards)
    return cached_driver(model, kind, batches.layout, sharded, watched, timed)


# The attribute that holds a model's compiled steps. They refer to the model: a table of
# models, even with weak keys, would keep all of them alive.
_DRIVERS = "_distfit_drivers"


def drivers_of(model, kind: str) -> dict[tuple, Any]:
    """The compiled steps of a kind.

    They are kept until the model is compiled again or the functions of stock Keras are
    made again.
    """
    checks.check_runs_steps(model, kind)
    functions = [getattr(model, f"{kind}_function") for kind in _KINDS]
    made_for = [_keras.compilation(model), *functions]
    known = vars(model).get(_DRIVERS)
    if known is None or any(map(operator.is_not, known[0], made_for)):
        known = (made_for, {kind: {} for kind in _KINDS})
        object.__setattr__(model, _DRIVERS, known)  # Keras must not track it.
    return known[1][kind]


def cached_driver(
    model,
    kind: str,
    layout: Layout,
    sharded: bool = False,
    watched: bool = False,
    timed: bool = False,
) -> StepDriver:
    """The compiled steps of a kind for batches of a layout, built if there are none."""
    drivers = drivers_of(model, kind)
    key = (_signature(layout), sharded, watched, timed, checks.runs_eagerly(model))
    if key not in drivers:
        step = getattr(model, f"{kind}_step")
        watch = FiniteWatch() if watched else None
        clock = DataClock() if timed else None
        drivers[key] = StepDriver(model, step, layout, sharded, watch, clock)
    return drivers[key]


def predict_driver(model, layout: Layout, sharded: bool = False) -> PredictDriver:
    """The compiled `predict_step` for batches of a layout, built if there is none."""
    drivers = drivers_of(model, "predict")
    key = (_signature(layout), sharded, checks.runs_eagerly(model))
    if key not in drivers:
        drivers[key] = PredictDriver(model, layout, sharded)
    return drivers[key]


def _signature(layout: Layout) -> str:
    """Identifies batches that the same traced step can process.

    A step is traced for these sizes and may have their numbers in its graph.
    """
    specs = tree.map_structure(_shape_and_dtype, layout.spec)
    return f"{specs} {layout.has_rows}"


def _shape_and_dtype(spec) -> str:
    if isinstance(spec, tf.TensorSpec):  # Without its name.
        return f"{spec.dtype.name}{spec.shape}"
    return str(spec)


def driver_on(model, kind: str, batch, exact: Layout, cached: Callable) -> Any:
    """The compiled steps for batches like this one, whose layout is `exact`.

    After batches of other sizes, the steps for any sizes, as a `tf.function` relaxes
    shapes, unless the step must know the sizes.
    """
    known = {signature for signature, *_ in drivers_of(model, kind)}
    if known and _signature(exact) not in known:
        try:
            return cached(layout_of(batch, any_sizes=True))
        except Exception:
            logging.getLogger("distfit").debug("The step needs sizes.", exc_info=True)
    return cached(exact)


def layout_of(batch, any_sizes: bool = False) -> Layout:
    """The layout of batches like this one, with any number of rows or any sizes."""

    def like(tensor):
        if tensor is None:
            return None
        sizes = tensor.shape[1:]
        rows = [None] if tensor.shape.rank else []
        inner = [None] * len(sizes) if any_sizes else sizes
        return tf.TensorSpec([*rows, *inner], tensor.dtype)

    spec = tree.map_structure(like, batch)
    check_element_spec(spec)
    return Layout(spec, batch)
