"""Saves all that a training depends on, so that it can go on exactly where it was."""

import pathlib
import re
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from distfit.training import checkpoint

# `python -m launch` reads these from this file, to check its flags without TensorFlow.
EVERY = r"(0*[1-9][0-9]*)\s*(steps?|epochs?|min|s)"
MODES = ("min", "max")
ON_ERROR = ("raise", "warn")


class SaveError(OSError):
    """A checkpoint could not be written. What was saved before is still there."""


class Checkpoint(keras.callbacks.Callback):
    """Saves checkpoints from which `fit(..., resume_from=folder)` goes on, bit for bit.

    A checkpoint holds the model, its optimizers, metrics, seeds, averages and loss
    scales, the place in the data, the random generators and the state of the other
    callbacks. It is written in the background. The end of the training is saved as
    well, so that it can go on with more epochs. The data may be whatever `fit()` takes,
    save those of other libraries; a program that goes on makes them anew.

    Args:
        folder: Where to save: `<folder>/step-120`, for the 120 steps done so far.
        every: When to save, as "100steps", "2epochs", "10min" or "30s", or several of
            these. The end of an epoch is seen after its validation; other places are
            looked at after each execution of `steps_per_execution` steps.
        keep: How many of the latest checkpoints to keep, at least two.
        monitor: A name in the logs of epochs, such as "val_loss": of the ends of epochs
            the `keep` best are kept, and the latest two checkpoints.
        mode: "min" or "max": which values of `monitor` are the best.
        on_error: What follows if one cannot be written, on a full disk, say: "raise" a
            `SaveError` at the next step, or "warn". What was saved before stays.

    Attributes:
        paused: Seconds in which the training waited for its checkpoints.
        saved_step: The step of `latest`, or None.
        has_stopped: Whether the training ended as it was asked to, and is saved.

    Raises:
        ValueError: for an `every`, `mode` or `on_error` of another form, or a `keep`
            below two.
    """

    in_step_with_others = True

    def __init__(
        self,
        folder: str | pathlib.Path,
        every: str | Sequence[str] = "1epoch",
        keep: int = 3,
        monitor: str | None = None,
        mode: str = "min",
        on_error: str = "raise",
    ):
        super().__init__()
        if keep < checkpoint.LEAST_KEPT:
            raise ValueError(
                "Fewer than two checkpoints are not safe: the latest may be damaged. "
                f"Received: keep={keep}. Give at least {checkpoint.LEAST_KEPT}."
            )
        _check_choice("mode", mode, MODES)
        _check_choice("on_error", on_error, ON_ERROR)
        self.folder = pathlib.Path(folder)
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.on_error = on_error
        self.every = [every] if isinstance(every, str) else list(every)
        self.asked = 0
        self.has_stopped = False
        self.paused = 0.0
        self._every = [_parsed(each) for each in self.every]
        self._last_step = self._last_epoch = 0
        self.saved_step: int | None = None
        self._saved_before: int | None = None
        self._saved_epoch = 0
        self._last_time = time.monotonic()
        self._logs: tuple[int, dict[str, float]] = (-1, {})
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def request_stop(self, exit_code: int = 143) -> None:
        """Saves at the next step at which all workers can, and ends the program.

        On every worker `fit()` then raises `SystemExit(exit_code)`, even if only one
        was asked. It can be called from a signal handler and from any thread:

            signal.signal(signal.SIGTERM, lambda *_: checkpoint.request_stop(143))
        """
        self.asked = exit_code

    @property
    def is_stopping(self) -> bool:
        """Whether this worker or another one was asked to stop."""
        return self.asked != 0

    @property
    def latest(self) -> pathlib.Path | None:
        """The last checkpoint of this training, or the one that it began from."""
        if self.saved_step is None:
            return None
        return checkpoint.path_of(self.folder, self.saved_step)

    # What `fit()` calls.

    def begin(self, step: int, epoch: int, is_saved: bool = True) -> None:
        """Counts from here on; `is_saved`: whether this place is a checkpoint."""
        self._last_step, self._last_epoch = step, epoch
        self._last_time = time.monotonic()
        if is_saved:
            self.note_saved(step, epoch)
        else:
            self.saved_step = None

    def note_saved(self, step: int, epoch: int) -> None:
        """Notes a checkpoint; steps and epochs are counted from where they were."""
        self._saved_before = self.saved_step
        self.saved_step, self._saved_epoch = step, epoch
        self._last_time = time.monotonic()

    def note_failure(self) -> None:
        """Notes that the latest save has failed: the one before it is the latest."""
        self.saved_step = self._saved_before

    def has_saved(self, step: int, epoch: int) -> bool:
        """Whether the latest checkpoint is one of this place."""
        return (self.saved_step, self._saved_epoch) == (step, epoch)

    def count_is_due(self, step: int, epoch: int, at_end_of_epoch: bool) -> bool:
        """Whether to save after so many steps and epochs."""
        passed = {
            "step": step - self._last_step,
            "epoch": epoch - self._last_epoch if at_end_of_epoch else 0,
        }
        return any(passed.get(unit, -1) >= number for number, unit in self._every)

    def time_is_due(self) -> bool:
        """Whether to save by this worker's clock."""
        passed = time.monotonic() - self._last_time
        return any(unit == "s" and passed >= number for number, unit in self._every)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the numbers in the logs."""
        found = {k: float(v) for k, v in (logs or {}).items() if np.ndim(v) == 0}
        if self.monitor is not None and self.monitor not in found:
            warnings.warn(  # As Keras does: an epoch may have no validation.
                f"The logs of epoch {epoch + 1} lack what a Checkpoint monitors: it is "
                f"not one of the best. Received: monitor={self.monitor!r}, logs "
                f"of {', '.join(found)}.",
                stacklevel=2,
            )
        self._logs = (epoch, found)

    def logs_at(self, epoch: int) -> dict[str, float]:
        """The logs of the epoch that ended before this one, if it was seen to end."""
        before, logs = self._logs
        return logs if before == epoch - 1 else {}

    def save(self, step: int, write: Callable[[pathlib.Path], Any]) -> None:
        """Calls `write(folder)` in the background; the last one must have ended."""

        def run() -> None:
            try:
                checkpoint.read(write(self.folder))
                best = checkpoint.Best(self.monitor, self.mode, self.keep)
                keep = checkpoint.LEAST_KEPT if self.monitor else self.keep
                checkpoint.prune(self.folder, keep, latest=step, best=best)
            except BaseException as error:
                self._failure = error

        self._writing = threading.Thread(target=run, name="checkpoint")
        self._writing.start()

    def join(self) -> None:
        """Returns when nothing is being written, whether or not that has failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def failure(self) -> str:
        """Why the last checkpoint could not be written, once that is known, or ""."""
        self.join()
        return self.failure_so_far()

    def failure_so_far(self) -> str:
        """As `failure`, without waiting."""
        failure, self._failure = self._failure, None
        if failure is None:
            return ""
        return (
            f"A checkpoint could not be written: {failure}. Received: "
            f"folder={str(self.folder)!r}. What was saved before is still there."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}."
        )


def _parsed(every: str) -> tuple[int, str]:
    match = re.fullmatch(EVERY, every)
    if match is None:
        raise ValueError(
            "`every` must be a number with a unit, as 100steps, 1epoch, 10min or 30s. "
            f"Received: every={every!r}."
        )
    number, unit = int(match[1]), match[2].removesuffix("s") or "s"
    return (60 * number, "s") if unit == "min" else (number, unit)
