"""Logs: what steps and metrics return, as numbers by name."""

from typing import Any

import keras

from distfit import _keras


def as_numbers(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs sorted by name, as Python numbers; those of nested dicts are merged in.

    A value that is no number stays what it is, as in stock Keras.
    """
    numbers: dict[str, Any] = {}
    for name, value in sorted(logs.items()):
        if isinstance(value, dict):
            numbers |= as_numbers(value)
        else:
            numbers[name] = _as_number(value)
    return numbers


def _as_number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def in_order_of_metrics(model: keras.Model, logs: dict[str, Any]) -> Any:
    """Logs as `evaluate()` returns them: a list, or a number if there is only one.

    First those of the model's metrics, in their order, then the others by name.
    """
    names = [part.name for m in model.metrics for part in _keras.parts_of(m)]
    values = [logs[name] for name in names if name in logs]
    values += [logs[name] for name in sorted(logs.keys() - set(names))]
    return values[0] if len(values) == 1 else values
