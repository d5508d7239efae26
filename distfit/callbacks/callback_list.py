"""Keras's list of callbacks, for one worker or several.

On several workers each has the same callbacks, which see the same logs and so make the
same decisions. Keras callbacks that write files write them on the chief.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.callbacks import BackupAndRestore

from distfit._keras import scalars
from distfit.callbacks import states
from distfit.callbacks.checkpoint import Checkpoint
from distfit.callbacks.chief_files import move_paths, packed_backups, unpack_backups
from distfit.callbacks.chief_only import ChiefOnly
from distfit.callbacks.data_wait import DataWait
from distfit.callbacks.hooks import BATCH_HOOKS, listens
from distfit.callbacks.lazy_logs import LazyLogs
from distfit.callbacks.non_finite import NonFinite
from distfit.callbacks.progress_bar import ProgressBar, SharedProgressBar
from distfit.cluster import workers
from distfit.cluster.workers import Workers
from distfit.training import checks
from distfit.training.data_clock import DataClock
from distfit.training.finite import FiniteWatch


class CallbackList(keras.callbacks.CallbackList):
    """Keras's list of callbacks, with logs that are fetched only if they are read.

    It is a context manager. Until it exits, Keras callbacks on workers other than the
    chief write to a temporary folder. They cannot be left out there, because saving a
    model takes all workers.

    Args:
        callbacks: Callbacks, as `fit()` takes them.
        team: The workers, which must all create this list at the same place; by default
            those of the current strategy.
        add_progbar: Whether to add a progress bar; on several workers, the chief
            decides.
        arguments: As for Keras's list.

    Attributes:
        may_stop_alone: For each kind of step, whether a callback may stop it after an
            execution on some workers but not on others.
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
                move_paths(callbacks, moved)
            super().__init__(callbacks, verbose=verbose, **arguments)
            self._moved = moved.pop_all()
        self.checkpoints = [c for c in self.callbacks if isinstance(c, Checkpoint)]
        self.non_finite = [c for c in self.callbacks if isinstance(c, NonFinite)]
        self.data_waits = [c for c in self.callbacks if isinstance(c, DataWait)]
        self.stateful = list(_with_state(self.callbacks))
        self._before: list[dict[str, Any]] = []
        self._has_warned = False
        self._listeners = {
            hook: [c for c in self.callbacks if listens(c, hook)]
            for hooks in BATCH_HOOKS.values()
            for hook in hooks
        }
        own = {kind: self._independent(kind) for kind in BATCH_HOOKS}
        backups = sum(isinstance(c, BackupAndRestore) for c in self.callbacks)
        told = team.tell("its callbacks", {**own, "backups": backups})
        self._backs_up = team.count > 1 and any(each["backups"] for each in told)
        self.may_stop_alone = {
            kind: any(each[kind] for each in told)
            or len({str(each[kind]) for each in told}) > 1
            for kind in BATCH_HOOKS
        }

    @property
    def watch_losses(self) -> bool:
        """Whether a callback watches for non-finite losses."""
        return bool(self.non_finite)

    @property
    def rolls_back(self) -> bool:
        """Whether a non-finite loss leads back to the last checkpoint."""
        return any(each.action == "rollback" for each in self.non_finite)

    def use_watch(self, watch: FiniteWatch | None) -> None:
        """Gives callbacks the watch of losses that is part of the compiled steps."""
        for callback in self.non_finite:
            callback.watch = watch

    def use_clock(self, clock: DataClock | None) -> None:
        """Gives callbacks the clock of data that is part of the compiled steps."""
        for callback in self.data_waits:
            callback.use(clock)

    def note_states(self) -> None:
        """Remembers the callbacks as they are, to tell later what has changed."""
        self._before = states.snapshot(self.stateful)

    def states(self, arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """The Python state of the callbacks, for JSON; its arrays go into `arrays`."""
        found = states.states_of(self.stateful, self._before, arrays)
        self._warn_of_unsaved([e for e in found if e["unsaved"]])
        return found

    def _warn_of_unsaved(self, entries: list[dict[str, Any]]) -> None:
        if entries and not self._has_warned:
            names = "; ".join(
                f"{e['class']}: {', '.join(e['unsaved'])}" for e in entries
            )
            logging.getLogger("distfit").warning(
                "Checkpoints cannot hold some attributes of callbacks. Received: "
                f"{names}. Give these callbacks `get_state()` and `set_state(state)`."
            )
            self._has_warned = True

    def set_states(
        self, found: list[dict[str, Any]], arrays: dict[str, np.ndarray]
    ) -> None:
        """Sets what `states` has returned."""
        states.set_states(self.stateful, found, self._before, arrays)

    def _independent(self, kind: str) -> list[str]:
        """Callbacks for batches that may behave differently on other workers."""
        listeners = [c for hook in BATCH_HOOKS[kind] for c in self._listeners[hook]]
        return [type(c).__name__ for c in listeners if not _in_step_with_others(c)]

    def __enter__(self) -> "CallbackList":
        """Copies the chief's backups to all workers: loading one takes all of them."""
        if self._backs_up:
            own = packed_backups(self.callbacks) if self._team.is_chief else b""
            backups = self._team.gather("its backups", own)[0]
            if not self._team.is_chief:
                unpack_backups(backups, self.callbacks)
        return self

    def __exit__(self, *exc_info) -> None:
        for checkpoints in self.checkpoints:
            checkpoints.join()  # Also after an error: what was begun is finished.
        self.use_clock(None)  # Other calls of `fit()` go on with it.
        self._moved.close()

    def batch_begin(self, kind: str, step: int) -> None:
        """Calls `on_{kind}_batch_begin`."""
        for callback in self._listeners[BATCH_HOOKS[kind][0]]:
            getattr(callback, BATCH_HOOKS[kind][0])(step, logs={})

    def batch_end(self, kind: str, step: int, read: Callable[[], dict]) -> None:
        """Calls `on_{kind}_batch_end` with logs that call `read()` on first access."""
        logs = LazyLogs(read)
        if self.may_stop_alone[kind]:
            logs.read()  # Takes all workers, and callbacks on some may not read them.
        for callback in self._listeners[BATCH_HOOKS[kind][1]]:
            getattr(callback, BATCH_HOOKS[kind][1])(step, logs=logs)
        if sys.getrefcount(logs) > 2:  # A callback keeps them: they must not change.
            logs.read()


def checkpoints_among(callbacks: Any) -> list[Checkpoint]:
    """Those in what `fit()` takes as callbacks."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    found = keras.tree.flatten(callbacks or [])
    return [each for each in found if isinstance(each, Checkpoint)]


def _with_state(callbacks: list) -> Iterator[keras.callbacks.Callback]:
    """The callbacks whose state a checkpoint holds."""
    for callback in callbacks:
        if isinstance(callback, ChiefOnly):
            callback = callback.callback
            if isinstance(callback, Checkpoint):
                raise ValueError(
                    "A Checkpoint takes all workers. Received: ChiefOnly(Checkpoint). "
                    "Give it to every worker as it is: the chief alone writes."
                )
        if not isinstance(callback, Checkpoint | keras.callbacks.ProgbarLogger):
            yield callback


def _make_scalars_convertible(model: keras.Model | None) -> None:
    """Lets callbacks use a model's learning rates and step counts as numbers."""
    if model is not None:
        scalars.make_convertible(model.variables)
        for optimizer in checks.optimizers_of(model):
            scalars.make_convertible(optimizer.variables)


def _fit_for_workers(callback: keras.callbacks.Callback) -> keras.callbacks.Callback:
    if isinstance(callback, keras.callbacks.OrbaxCheckpoint):
        raise ValueError(
            "OrbaxCheckpoint does not support TensorFlow's workers: all would write to "
            f"the same folder. Received: directory={callback.directory!r}. Use "
            "`keras.callbacks.ModelCheckpoint` or `BackupAndRestore`."
        )
    if isinstance(callback, keras.callbacks.RemoteMonitor):
        return ChiefOnly(callback)
    return callback


def _in_step_with_others(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback reads logs at the same steps on all workers and stops at none.

    Keras callbacks do, except TerminateOnNaN. Others, and LambdaCallback, may depend on
    a clock or a file.
    """
    if isinstance(
        callback, keras.callbacks.LambdaCallback | keras.callbacks.TerminateOnNaN
    ):
        return False
    of_keras = type(callback).__module__.startswith("keras.")
    return of_keras or getattr(callback, "in_step_with_others", False)
