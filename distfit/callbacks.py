"""Callbacks: Keras's own, called so that they cost nothing where nobody listens."""

import functools
import sys
import time
from collections.abc import Callable

import keras

from distfit import _keras

_BATCH_HOOKS = {
    "train": ("on_train_batch_begin", "on_train_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
    "predict": ("on_predict_batch_begin", "on_predict_batch_end"),
}


class NonFinite(keras.callbacks.Callback):
    """Stops training with an error at the first loss that is NaN or infinite.

    The error names the step and the replica whose rows gave the value. The check is
    part of the compiled step, and its outcome is read after every execution.
    """

    def set_model(self, model):
        super().set_model(model)
        model.check_finite = True

    def on_train_batch_end(self, batch, logs=None):
        found = self.model.first_non_finite()
        if found is not None:
            step, replica = found
            raise FloatingPointError(
                f"The loss is not finite. Received: NaN or infinity at step {step} on "
                f"replica {replica}. Lower the learning rate, clip gradients, or look "
                "at the rows of that step."
            )


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, which reads the metrics only when it is redrawn.

    The numbers it shows are those of the epoch so far, as reported at its end.

    Args:
        interval: Seconds between two updates of the bar.
        clock: The clock that measures them.
    """

    def __init__(self, interval: float = 0.2, clock: Callable[[], float] | None = None):
        super().__init__()
        self._interval = interval
        self._clock = clock or time.monotonic
        self._due = 0.0

    def _update_progbar(self, batch, logs=None):
        self.seen = batch + 1
        if self.verbose != 1 or self._clock() < self._due:
            return
        self._show(logs)
        super()._update_progbar(batch, logs)
        self._due = self._clock() + self._interval

    def _finalize_progbar(self, logs):
        self._maybe_init_progbar()
        self._show(logs)
        self._due = 0.0
        super()._finalize_progbar(logs)

    def _show(self, logs):
        """The values are means already: the bar must not average them once more."""
        self._maybe_init_progbar()
        self.progbar.stateless_metrics.update(logs or {})


class CallbackList(keras.callbacks.CallbackList):
    """Keras's list of callbacks, with logs that are read when somebody reads them."""

    def __init__(self, callbacks=None, *, add_progbar: bool = False, **arguments):
        callbacks = list(keras.tree.flatten(callbacks)) if callbacks else []
        shown = any(isinstance(c, keras.callbacks.ProgbarLogger) for c in callbacks)
        if add_progbar and not shown:
            callbacks.append(ProgressBar())
        super().__init__(callbacks, **arguments)
        self._listeners = {
            hook: [c for c in self.callbacks if _keras.listens(c, hook)]
            for hooks in _BATCH_HOOKS.values()
            for hook in hooks
        }

    def batch_begin(self, kind: str, step: int) -> None:
        """Calls `on_{kind}_batch_begin`."""
        for callback in self._listeners[_BATCH_HOOKS[kind][0]]:
            getattr(callback, _BATCH_HOOKS[kind][0])(step, logs={})

    def batch_end(self, kind: str, step: int, read: Callable[[], dict]) -> None:
        """Calls `on_{kind}_batch_end` with logs that `read()` gives when asked."""
        logs = LazyLogs(read)
        for callback in self._listeners[_BATCH_HOOKS[kind][1]]:
            getattr(callback, _BATCH_HOOKS[kind][1])(step, logs=logs)
        if sys.getrefcount(logs) > 2:  # Somebody keeps them: they must not change.
            logs.read()


class LazyLogs(dict):
    """Logs that are read from the devices at the first look.

    A callback may insist on a `dict`, as TensorBoard does, so they are one. It starts
    with a placeholder: code in C, such as that of `json`, asks how many entries there
    are before it asks for them.

    Args:
        read: Returns the logs.
    """

    def __init__(self, read: Callable[[], dict]):
        super().__init__({"": None})
        self._read: Callable[[], dict] | None = read

    def read(self) -> None:
        """Reads the logs, unless that is done."""
        if self._read is not None:
            read, self._read = self._read, None
            super().clear()
            super().update(read())

    def __bool__(self) -> bool:
        return True

    def __reduce__(self):
        return dict, (dict(self),)


def _reads_first(method: Callable) -> Callable:
    @functools.wraps(method)
    def reading(self, *args, **kwargs):
        self.read()
        return method(self, *args, **kwargs)

    return reading


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__"),
    *("__len__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__"),
    *("__setitem__", "clear", "copy", "get", "items", "keys", "pop", "popitem"),
    *("setdefault", "update", "values"),
):
    setattr(LazyLogs, _name, _reads_first(getattr(dict, _name)))

_keras.convert_replicated_scalars()
