"""The Python state of callbacks: what they have changed of themselves in a training.

A callback with a `get_state()` and a `set_state(state)` says itself what its state is.
Of others it is the attributes that differ from those at the start of `fit()`, as far as
they are numbers, strings, arrays and lists or dicts of these.
"""

import copy
import dataclasses
import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from distfit.training import randomness

# What Keras gives every callback, and what is made anew when a training begins.
_NOT_STATE = {"_model", "model", "params"}
# How callbacks of Keras compare what they monitor.
_COMPARISONS = {"less": keras.ops.less, "greater": keras.ops.greater}
_MADE_ANEW = {
    "csv_file",
    "writer",
    "append",
    "append_header",
    "watch",
    "_writers",
    "_summary_module",
}


class NotPlainError(TypeError):
    """A value that a checkpoint cannot hold."""


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """A value that a checkpoint cannot hold: itself, and a digest of what is in it."""

    value: Any
    digest: str | None


def snapshot(callbacks: Sequence[keras.callbacks.Callback]) -> list[dict[str, Any]]:
    """The attributes of callbacks, to tell later which have changed."""
    return [{name: _kept(value) for name, value in _own(c).items()} for c in callbacks]


def _kept(value: Any) -> Any:
    return copy.deepcopy(value) if _is_plain(value) else _Opaque(value, _digest(value))


def _digest(value: Any) -> str | None:
    """Changes with what is in a value; None if that cannot be told.

    Functions and the model are what they are. Others tell by what they would pickle.
    """
    if callable(value) or isinstance(value, keras.Layer | keras.Variable):
        return None
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception:  # noqa: BLE001  # Any class may refuse in its own way.
        return None


def states_of(
    callbacks: Sequence[keras.callbacks.Callback],
    before: Sequence[dict[str, Any]],
    arrays: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """The state of each callback as JSON can hold it.

    Args:
        callbacks: The callbacks.
        before: What `snapshot` returned of them.
        arrays: Gets the arrays among the values.

    Returns:
        For each its class, its state, and the attributes that could not be saved.
    """
    states = []
    for index, (callback, then) in enumerate(zip(callbacks, before, strict=True)):
        place = f"callback {index}"
        entry: dict[str, Any] = {"class": type(callback).__name__, "unsaved": []}
        if hasattr(callback, "get_state"):
            entry["state"] = encode(callback.get_state(), arrays, place)
        else:
            entry["state"] = {}
            for name, value in _own(callback).items():
                if name in then and _equal(value, then[name]):
                    continue
                try:
                    key = f"{place}/{name}"
                    entry["state"][name] = encode(value, arrays, key)
                except NotPlainError:
                    if name not in _MADE_ANEW:
                        entry["unsaved"].append(name)
        states.append(entry)
    return states


def set_states(
    callbacks: Sequence[keras.callbacks.Callback],
    states: Sequence[dict[str, Any]],
    before: Sequence[dict[str, Any]],
    arrays: dict[str, np.ndarray],
) -> None:
    """Sets what `states_of` has returned.

    What had not changed then is as it was in `before`, a snapshot of these callbacks,
    whatever the hooks at the start of training have done.
    """
    for callback, entry, then in zip(callbacks, states, before, strict=True):
        if hasattr(callback, "set_state"):
            callback.set_state(decode(entry["state"], arrays))
            continue
        changed = {*entry["state"], *entry["unsaved"], *_MADE_ANEW}
        for name in then.keys() & _own(callback).keys() - changed:
            if _is_plain(then[name]):
                setattr(callback, name, copy.deepcopy(then[name]))
        for name, value in entry["state"].items():
            setattr(callback, name, decode(value, arrays))


def _is_plain(value: Any) -> bool:
    try:
        encode(value, {}, "")
    except NotPlainError:
        return False
    return True


def _own(callback: keras.callbacks.Callback) -> dict[str, Any]:
    return {k: v for k, v in vars(callback).items() if k not in _NOT_STATE}


def _equal(one: Any, before: Any) -> bool:
    """Whether a value is as `_kept` has kept it."""
    if isinstance(before, _Opaque):
        return one is before.value and _digest(one) == before.digest
    arrays: tuple[dict, dict] = ({}, {})
    try:
        same = encode(one, arrays[0], "") == encode(before, arrays[1], "")
    except NotPlainError:
        return False
    return same and all(np.array_equal(arrays[0][k], arrays[1][k]) for k in arrays[0])


def encode(value: Any, arrays: dict[str, np.ndarray], place: str) -> Any:
    """A value as JSON can hold it, its arrays put into `arrays` by their place.

    Raises:
        NotPlainError: it holds something else than numbers, strings, arrays, lists,
            tuples and dicts.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, comparison in _COMPARISONS.items():
        if value is comparison:
            return {"comparison": name}
    if isinstance(value, randomness.KINDS):
        return {"generator": [type(value).__name__, randomness.of(value)]}
    if isinstance(value, tf.Tensor):
        value = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic) and (
        value.dtype.kind in "biufc" or value.dtype.name == "bfloat16"
    ):
        arrays[place] = np.array(value)
        return {"array": place}
    if type(value) in (list, tuple):  # No subclass, which would come back as these.
        items = [encode(v, arrays, f"{place}/{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if type(value) is dict:
        pairs = [
            [encode(k, arrays, f"{place}/{i}/key"), encode(v, arrays, f"{place}/{i}")]
            for i, (k, v) in enumerate(value.items())
        ]
        return {"dict": pairs}
    raise NotPlainError(f"{type(value).__name__} at {place}")


def decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, list):
        return [decode(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return np.array(arrays[content])[()]  # A scalar where there is no dimension.
    if kind == "comparison":
        return _COMPARISONS[content]
    if kind == "generator":
        return randomness.made(*content)
    if kind == "tuple":
        return tuple(decode(v, arrays) for v in content)
    return {decode(k, arrays): decode(v, arrays) for k, v in content}
