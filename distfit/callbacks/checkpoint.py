"""Saves all that a training depends on, so that it can go on exactly where it was."""

import pathlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras

from distfit.training import checkpoint

_EVERY = re.compile(r"(\d+)\s*(steps?|epochs?|min|s)")


class Checkpoint(keras.callbacks.Callback):
    """Saves checkpoints from which `fit(..., resume_from=folder)` goes on, bit for bit.

    A checkpoint holds the model, its optimizers, metrics, seeds, averages and loss
    scales, the place in the data, the random generators and the state of the other
    callbacks. It is written in the background.

    Args:
        folder: Where to save: `<folder>/step-120`, for the 120 steps done so far.
        every: When to save, as "100steps", "2epochs", "10min" or "30s", or several of
            these. The end of an epoch is seen after its validation; other places are
            looked at after each execution of `steps_per_execution` steps.
        keep: How many of the latest checkpoints to keep, at least two.

    Raises:
        ValueError: for an `every` of another form, or a `keep` below two.
    """

    in_step_with_others = True

    def __init__(
        self,
        folder: str | pathlib.Path,
        every: str | Sequence[str] = "1epoch",
        keep: int = 3,
    ):
        super().__init__()
        if keep < checkpoint.LEAST_KEPT:
            raise ValueError(
                "Fewer than two checkpoints are not safe: the latest may be damaged. "
                f"Received: keep={keep}. Give at least {checkpoint.LEAST_KEPT}."
            )
        self.folder = pathlib.Path(folder)
        self.keep = keep
        self.every = [every] if isinstance(every, str) else list(every)
        self._every = [_parsed(each) for each in self.every]
        self._last_step = self._last_epoch = 0
        self._last_time = time.monotonic()
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, step: int, epoch: int) -> None:
        """Counts from here on. `fit()` calls it before its first step."""
        self._last_step, self._last_epoch = step, epoch
        self._last_time = time.monotonic()

    def is_due(self, step: int, epoch: int, at_end_of_epoch: bool) -> bool:
        """Whether to save after so many steps and epochs."""
        passed = {
            "step": step - self._last_step,
            "epoch": epoch - self._last_epoch if at_end_of_epoch else 0,
            "s": time.monotonic() - self._last_time,
        }
        return any(passed[unit] >= number for number, unit in self._every)

    @property
    def depends_on_time(self) -> bool:
        """Whether workers have to agree on when to save."""
        return any(unit == "s" for _, unit in self._every)

    def save(self, step: int, epoch: int, write: Callable[[pathlib.Path], Any]) -> None:
        """Calls `write(folder)` in the background, after the last one is written."""
        self.join()
        self.begin(step, epoch)

        def run() -> None:
            try:
                checkpoint.read(write(self.folder))
                checkpoint.prune(self.folder, self.keep, latest=step)
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
        failure, self._failure = self._failure, None
        if failure is None:
            return ""
        return (
            f"A checkpoint could not be written: {failure}. Received: "
            f"folder={str(self.folder)!r}. What was saved before is still there."
        )


def _parsed(every: str) -> tuple[int, str]:
    match = _EVERY.fullmatch(every)
    if match is None or int(match[1]) < 1:
        raise ValueError(
            "`every` must be a number with a unit, as 100steps, 1epoch, 10min or 30s. "
            f"Received: every={every!r}."
        )
    number, unit = int(match[1]), match[2].removesuffix("s") or "s"
    return (60 * number, "s") if unit == "min" else (number, unit)
