"""Callbacks: Keras's own, called so that they cost nothing where nobody listens.

On several workers each has the same callbacks, which see the same logs and so decide
alike. Those of Keras that write files write them on the chief.
"""

import contextlib
import functools
import io
import os
import pathlib
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.callbacks import BackupAndRestore

from distfit import _keras, build, workers
from distfit._keras import scalars
from distfit.finite import FiniteWatch, bad_replica
from distfit.workers import Workers

_BATCH_HOOKS = {
    "train": ("on_train_batch_begin", "on_train_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
    "predict": ("on_predict_batch_begin", "on_predict_batch_end"),
}


class NonFinite(keras.callbacks.Callback):
    """Stops training with an error at the first loss that is NaN or infinite.

    The error names the step and, where that can be found out, the replica whose rows
    gave the value. The check is part of the compiled step, and its outcome is read
    after every execution.
    """

    in_step_with_others = True

    def __init__(self):
        super().__init__()
        self.watch: FiniteWatch | None = None  # That of the steps; `fit()` sets it.

    def on_train_batch_end(self, batch, logs=None):
        if self.watch is None:
            return
        step = self.watch.first()
        if step is None:
            return
        replica = bad_replica(self.model)
        where = "" if replica is None else f" on replica {replica}"
        raise FloatingPointError(
            f"The loss is not finite. Received: NaN or infinity at step {step}{where}. "
            "Lower the learning rate, clip gradients, or look at the rows of that step."
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
        if self.verbose != 1 or not self._is_due():
            return
        self._draw(batch, logs)
        self._schedule()

    def _draw(self, batch, logs) -> None:
        self._show(logs)
        super()._update_progbar(batch, logs)

    def _is_due(self) -> bool:
        return self._clock() >= self._due

    def _schedule(self) -> None:
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


class SharedProgressBar(ProgressBar):
    """The progress bar of several workers, shown by the chief.

    To read the metrics takes all workers. So all have the bar, and each time it is
    redrawn the chief says after how many executions it will be next.

    Args:
        team: The workers.
        interval, clock: As for `ProgressBar`.
    """

    in_step_with_others = True

    def __init__(self, team: Workers, **arguments):
        super().__init__(**arguments)
        self._team = team
        self._executions = self._next = 1
        self._drawn = self._clock()

    def _is_due(self) -> bool:
        self._next -= 1
        return self._next <= 0

    def _schedule(self) -> None:
        now = self._clock()
        pace = self._executions * self._interval / max(now - self._drawn, 1e-6)
        self._drawn = now
        own = min(max(int(pace), 1), 10 * self._executions)  # Tracing slows the first.
        self._executions = self._next = self._team.from_chief("the progress bar", own)

    def _draw(self, batch, logs) -> None:
        dict(logs or {})  # Reads them, on every worker.
        if self._team.is_chief:
            super()._draw(batch, logs)

    def _finalize_progbar(self, logs):
        if self._team.is_chief:
            super()._finalize_progbar(logs)


class ChiefOnly(keras.callbacks.Callback):
    """Calls another callback on the chief alone, for what writes or reports.

    On several workers that callback must not do what takes all of them: `evaluate()`,
    `predict()`, `fit()` and their `*_on_batch` forms raise an error in it. Saving a
    model works, except that of metrics and of gradients that are being accumulated it
    saves the part of the chief. What it draws of the random numbers of Python, NumPy
    and TensorFlow is drawn again after it. Hooks for batches cost an exchange after
    every execution, in which the logs are read.

    Args:
        callback: The callback.
    """

    def __init__(self, callback: keras.callbacks.Callback):
        super().__init__()
        self.callback = callback
        self._team: Workers | None = None
        for name in _hooks_of(callback):
            setattr(self, name, functools.partial(self._call, name))

    def set_params(self, params):
        super().set_params(params)
        self.callback.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        self._team = workers.of(model.distribute_strategy)
        if self._team.is_chief:
            self.callback.set_model(model)

    def _call(self, name: str, *args, **kwargs) -> None:
        if self._team is None or self._team.count == 1:
            getattr(self.callback, name)(*args, **kwargs)
        elif self._team.is_chief:
            with workers.alone(self.model.distribute_strategy):
                getattr(self.callback, name)(*args, **kwargs)


def _hooks_of(callback: keras.callbacks.Callback) -> list[str]:
    """The names of the hooks in which a callback does something."""
    names = [n for n in vars(keras.callbacks.Callback) if n.startswith("on_")]
    batch_hooks = [hook for hooks in _BATCH_HOOKS.values() for hook in hooks]
    # Keras's `on_train_batch_*` call the older two.
    others = {*batch_hooks, "on_batch_begin", "on_batch_end"}
    listened = [hook for hook in batch_hooks if _keras.listens(callback, hook)]
    return [n for n in names if n not in others] + listened


class CallbackList(keras.callbacks.CallbackList):
    """Keras's list of callbacks, with logs that are read when somebody reads them.

    It is a context manager. Until it is left, what callbacks of Keras write on other
    workers than the chief goes to a folder that is removed then. They cannot just be
    left out there: saving a model takes all workers.

    Args:
        callbacks: Callbacks, as `fit()` takes them.
        team: The workers, all of which make this list at the same place; by default
            those of the strategy in whose scope it is made.
        add_progbar: Whether to add a progress bar; on several workers, the chief's
            word counts.
        arguments: As for Keras's list.

    Attributes:
        may_stop_alone: For each kind of step, whether a callback of some worker may
            stop it after an execution, although those of other workers perhaps do not.
    """

    def __init__(
        self,
        callbacks=None,
        *,
        team: Workers | None = None,
        add_progbar: bool = False,
        verbose: Any = "auto",
        **arguments,
    ):
        team = team or workers.of(tf.distribute.get_strategy())
        callbacks = list(keras.tree.flatten(callbacks)) if callbacks else []
        if team.count > 1:
            add_progbar, verbose = team.from_chief(
                "its progress bar", (add_progbar, verbose)
            )
            callbacks = [_fit_for_workers(callback) for callback in callbacks]
        shown = any(isinstance(c, keras.callbacks.ProgbarLogger) for c in callbacks)
        if add_progbar and not shown:
            bar = ProgressBar() if team.count == 1 else SharedProgressBar(team)
            callbacks.append(bar)
        self._team = team
        _make_scalars_convertible(arguments.get("model"))
        with contextlib.ExitStack() as moved:
            if not team.is_chief:
                _move_paths(callbacks, moved)
            super().__init__(callbacks, verbose=verbose, **arguments)
            self._moved = moved.pop_all()
        self._listeners = {
            hook: [c for c in self.callbacks if _keras.listens(c, hook)]
            for hooks in _BATCH_HOOKS.values()
            for hook in hooks
        }
        own = {kind: self._independent(kind) for kind in _BATCH_HOOKS}
        backups = sum(isinstance(c, BackupAndRestore) for c in self.callbacks)
        told = team.tell("its callbacks", {**own, "backups": backups})
        self._backs_up = team.count > 1 and any(each["backups"] for each in told)
        self.may_stop_alone = {
            kind: any(each[kind] for each in told)
            or len({str(each[kind]) for each in told}) > 1
            for kind in _BATCH_HOOKS
        }

    @property
    def watch_losses(self) -> bool:
        """Whether a callback wants to know of losses that are not finite."""
        return any(isinstance(c, NonFinite) for c in self.callbacks)

    def use_watch(self, watch: FiniteWatch | None) -> None:
        """Hands on what looks at the losses in the compiled steps."""
        for callback in self.callbacks:
            if isinstance(callback, NonFinite):
                callback.watch = watch

    def _independent(self, kind: str) -> list[str]:
        """What listens to batches and may do other things than on other workers."""
        listeners = [c for hook in _BATCH_HOOKS[kind] for c in self._listeners[hook]]
        return [type(c).__name__ for c in listeners if not _in_step_with_others(c)]

    def __enter__(self) -> "CallbackList":
        """Gives all workers what the chief has backed up: loading it takes all."""
        if self._backs_up:
            own = _packed_backups(self.callbacks) if self._team.is_chief else b""
            backups = self._team.gather("its backups", own)[0]
            if not self._team.is_chief:
                _unpack_backups(backups, self.callbacks)
        return self

    def __exit__(self, *exc_info) -> None:
        self._moved.close()

    def batch_begin(self, kind: str, step: int) -> None:
        """Calls `on_{kind}_batch_begin`."""
        for callback in self._listeners[_BATCH_HOOKS[kind][0]]:
            getattr(callback, _BATCH_HOOKS[kind][0])(step, logs={})

    def batch_end(self, kind: str, step: int, read: Callable[[], dict]) -> None:
        """Calls `on_{kind}_batch_end` with logs that `read()` gives when asked."""
        logs = LazyLogs(read)
        if self.may_stop_alone[kind]:
            logs.read()  # It takes all workers, and some may not ask for them.
        for callback in self._listeners[_BATCH_HOOKS[kind][1]]:
            getattr(callback, _BATCH_HOOKS[kind][1])(step, logs=logs)
        if sys.getrefcount(logs) > 2:  # Somebody keeps them: they must not change.
            logs.read()


def _make_scalars_convertible(model: keras.Model | None) -> None:
    """Lets callbacks take learning rates and step counts of a model for numbers."""
    if model is not None:
        scalars.make_convertible(model.variables)
        for optimizer in build.optimizers_of(model):
            scalars.make_convertible(optimizer.variables)


_PATHS: dict[type, tuple[str, ...]] = {
    keras.callbacks.ModelCheckpoint: ("filepath",),
    keras.callbacks.CSVLogger: ("filename",),
    keras.callbacks.TensorBoard: ("log_dir",),
    BackupAndRestore: ("backup_dir", *_keras.BACKUP_PATHS),
}


def _paths_of(callback: keras.callbacks.Callback) -> tuple[str, ...]:
    """The attributes of a callback of Keras that say where it writes."""
    return next((p for cls, p in _PATHS.items() if isinstance(callback, cls)), ())


def _move_paths(
    callbacks: Iterable[keras.callbacks.Callback], until: contextlib.ExitStack
) -> None:
    """Sends what callbacks write to a folder that goes `until` the stack is closed."""
    folder = until.enter_context(tempfile.TemporaryDirectory())
    for callback in callbacks:
        for name in _paths_of(callback):
            path = getattr(callback, name)
            until.callback(setattr, callback, name, path)
            setattr(callback, name, _path_in(folder, path))


def _path_in(folder: str, path: str) -> str:
    moved = os.path.join(folder, os.path.relpath(path, os.sep))
    os.makedirs(os.path.dirname(moved), exist_ok=True)
    return moved


def _packed_backups(callbacks: Iterable[keras.callbacks.Callback]) -> bytes:
    """The files that callbacks have backed up, as a zip archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name, path in _backup_files(callbacks):
            if tf.io.gfile.exists(path):
                files.writestr(name, tf.io.gfile.GFile(path, "rb").read())
    return archive.getvalue()


def _unpack_backups(
    archive: bytes, callbacks: Iterable[keras.callbacks.Callback]
) -> None:
    """Puts files that were packed on the chief where callbacks look for their own."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name, path in _backup_files(callbacks):
            if name in files.namelist():
                pathlib.Path(path).write_bytes(files.read(name))


def _backup_files(
    callbacks: Iterable[keras.callbacks.Callback],
) -> Iterator[tuple[str, str]]:
    """A name for each file that a backup may consist of, and its path."""
    backing_up = (c for c in callbacks if isinstance(c, BackupAndRestore))
    for number, callback in enumerate(backing_up):
        for attribute in _keras.BACKUP_PATHS:
            yield f"{number}/{attribute}", getattr(callback, attribute)


def _fit_for_workers(callback: keras.callbacks.Callback) -> keras.callbacks.Callback:
    if isinstance(callback, keras.callbacks.OrbaxCheckpoint):
        raise ValueError(
            "OrbaxCheckpoint knows nothing of TensorFlow's workers: all would write to "
            f"the same folder. Received: directory={callback.directory!r}. Use "
            "`keras.callbacks.ModelCheckpoint` or `BackupAndRestore`."
        )
    if isinstance(callback, keras.callbacks.RemoteMonitor):
        return ChiefOnly(callback)
    return callback


def _in_step_with_others(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback reads logs at the same steps everywhere, and stops at none.

    Callbacks of Keras do, but for one. Others, or those made of functions, may look at
    a clock or at a file.
    """
    if isinstance(
        callback, keras.callbacks.LambdaCallback | keras.callbacks.TerminateOnNaN
    ):
        return False
    of_keras = type(callback).__module__.startswith("keras.")
    return of_keras or getattr(callback, "in_step_with_others", False)


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
