"""The variables that the future of a training depends on, and their values.

One list serves workers, which agree on it, and checkpoints, which hold it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from distfit import _keras
from distfit.cluster.workers import Workers
from distfit.training import checks


def variables_of(model: keras.Model, drivers: Iterable[Any]) -> dict[str, Any]:
    """The TensorFlow variables of a training, by names that another process gives them.

    A name says whose variable it is and its place there: names of Keras count the
    models that a process has made, and differ in the next.

    Args:
        model: The model.
        drivers: The drivers of its steps, which may use other variables as well:
            seed generators, averages, tables.
    """
    owners: list[tuple[str, Iterable[Any]]] = [("model", model.variables)]
    for i, optimizer in enumerate(checks.optimizers_of(model)):
        owners.append((f"optimizer {i}", optimizer.variables))
    for i, driver in enumerate(drivers):
        owners.append((f"step {i}", driver.variables))
    return _named(owners)


def variables_of_model(model: keras.Model) -> dict[str, Any]:
    """Those of the model itself, by the same names."""
    return _named([("model", model.variables)])


def learning_rates_of(model: keras.Model) -> list[float]:
    """The values of the learning rates that can be set."""
    return [float(_keras.local_value(each)) for each in checks.learning_rates(model)]


def _named(owners: Iterable[tuple[str, Iterable[Any]]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    known: set[int] = set()
    for owner, variables in owners:
        for place, variable in enumerate(variables):
            value = _keras.underlying(variable)
            if id(value) not in known:
                known.add(id(value))
                named[f"{owner}/{place}"] = value
    return named


def values_of(team: Workers, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies of the values of variables. All workers call this at the same place.

    Of a variable that is summed on read, the parts of all replicas of all workers: an
    array of shape (replicas, *shape).
    """
    values = {}
    for name, variable in variables.items():
        if not _keras.is_summed_on_read(variable):
            values[name] = np.array(_keras.local_value(variable))
            continue
        own = np.stack([part.numpy() for part in _keras.local_copies(variable)])
        of_all = team.gather(f"the parts of {name}", own.tobytes())
        values[name] = np.concatenate(
            [np.frombuffer(data, own.dtype).reshape(own.shape) for data in of_all]
        )
    return values


def set_values(
    team: Workers, variables: Mapping[str, Any], values: Mapping[str, np.ndarray]
) -> None:
    """Sets what `values_of` has returned.

    With as many replicas as then, each gets its own part of a sum; with another number,
    the first replica gets the whole.
    """
    for name, variable in variables.items():
        value = values[name]
        if not _keras.is_summed_on_read(variable):
            variable.assign(value)
            continue
        parts = _keras.local_copies(variable)
        if len(value) != len(parts) * team.count:
            zeros = [np.zeros_like(value[0])] * (len(parts) * team.count - 1)
            value = np.stack([value.sum(axis=0, dtype=value.dtype), *zeros])
        own = value[len(parts) * team.index :]
        for part, number in zip(parts, own, strict=False):
            part.assign(number)
