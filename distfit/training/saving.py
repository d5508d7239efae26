"""When a training saves, and when it ends as it was asked to: all workers alike."""

import pathlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distfit.callbacks import Checkpoint, SaveError
from distfit.cluster.workers import Workers
from distfit.training import checkpoint

_BETWEEN_TALKS = 0.5  # Seconds, about: an exchange takes less than a millisecond.

Frozen = tuple[dict[str, Any], dict[str, np.ndarray]]


class Saving:
    """The checkpoints of a call of `fit()`.

    Saving takes all workers at the same step. What only one of them knows (a signal,
    the time, a full disk) they tell each other at the ends of epochs and at steps that
    they have agreed on the time before: about twice a second, whatever a step takes.

    Args:
        team: The workers.
        checkpoints: The `Checkpoint` callbacks.
        freeze: Returns the manifest and the arrays of a checkpoint of this moment.
    """

    def __init__(
        self,
        team: Workers,
        checkpoints: Sequence[Checkpoint],
        freeze: Callable[[], Frozen],
    ):
        self._team = team
        self._checkpoints = checkpoints
        self._freeze = freeze
        self._held: Frozen | None = None
        self._held_at = (0, 0)
        self._next_talk = 0
        self._last_talk = (0, 0.0)

    def begin(self, step: int, epoch: int, resumed: pathlib.Path | None) -> None:
        """Counts from here on.

        Args:
            step, epoch: How many were trained.
            resumed: The folder of checkpoints that the training goes on from, or None.

        Raises:
            ValueError: a new training would save among the checkpoints of another one.
        """
        for each in self._checkpoints:
            is_new = resumed is None or resumed.resolve() != each.folder.resolve()
            found: list[int] = []
            if self._team.is_chief:
                checkpoint.recover(each.folder)
                found = checkpoint.steps(each.folder)
            if self._team.from_chief("the checkpoints before", bool(found and is_new)):
                raise ValueError(
                    "The folder has checkpoints of another training. Received: "
                    f"Checkpoint({str(each.folder)!r}), resume_from="
                    f"{resumed and str(resumed)!r}. Give that folder as `resume_from` "
                    "to go on from there, or save to another one."
                )
            each.begin(step, epoch, is_saved=not is_new)
        self._plan_next_talk(step, pace=0.0)

    def after_steps(self, step: int, epoch: int) -> None:
        """Saves where that is due, after an execution of steps within an epoch."""
        counted = self._due_by_count(step, epoch, at_end_of_epoch=False)
        if self._is_time_to_talk(step):
            self._look(step, step, epoch, counted)
        else:
            self._save_those(counted, step, epoch)

    def hold(self, step: int, epoch: int) -> None:
        """Freezes this moment: it is what validation, which follows, saves.

        Validation changes metrics and random generators, and may take long.
        """
        if self._checkpoints:
            self._held, self._held_at = self._freeze(), (step, epoch)
            self._plan_next_talk(0, pace=0.0)

    def after_test_steps(self, step: int, more: bool) -> None:
        """Saves where that is due by the time, after steps of a validation."""
        if more and self._is_time_to_talk(step):
            self._look(step, *self._held_at, [False] * len(self._checkpoints))

    def after_epoch(self, step: int, epoch: int) -> None:
        """Saves where that is due, after an epoch."""
        self._held = None
        if self._checkpoints:
            counted = self._due_by_count(step, epoch, at_end_of_epoch=True)
            self._look(step, step, epoch, counted)

    def end(self, step: int, epoch: int) -> None:
        """Saves the end of the training, if it is not yet saved, and waits for that.

        Raises:
            SaveError: on all workers, if the chief could not write.
        """
        for each in self._checkpoints:
            if not each.has_saved(step, epoch):
                self._save(each, step, epoch)
            began = time.monotonic()
            self._check_written(each)
            each.paused += time.monotonic() - began

    def _is_time_to_talk(self, step: int) -> bool:
        is_planned = self._team.count == 1 or step >= self._next_talk
        return bool(self._checkpoints) and is_planned

    def _due_by_count(self, step: int, epoch: int, at_end_of_epoch: bool) -> list[bool]:
        """Whether each is to save after so many steps and epochs."""
        return [
            each.count_is_due(step, epoch, at_end_of_epoch)
            for each in self._checkpoints
        ]

    def _look(self, count: int, step: int, epoch: int, counted: Sequence[bool]) -> None:
        """Tells the others what only this worker knows, and does what follows.

        Args:
            count: How many steps were run, of training or of this validation.
            step, epoch: The place to save.
            counted: Which are to save whatever the time is.
        """
        then, when = self._last_talk
        now = time.monotonic()
        own = {
            "code": max((each.asked for each in self._checkpoints), default=0),
            "due": [each.time_is_due() for each in self._checkpoints],
            "failures": [each.failure_so_far() for each in self._checkpoints],
            "pace": (now - when) / (count - then) if count > then else 0.0,
        }
        told = self._team.tell("what is to be saved", own)
        chief, code = told[0], max(each["code"] for each in told)
        self._plan_next_talk(count, max(each["pace"] for each in told))
        for each, failure in zip(self._checkpoints, chief["failures"], strict=True):
            self._report(each, failure)
        by_time = chief["due"]
        due = [one or other for one, other in zip(counted, by_time, strict=True)]
        self._save_those(due, step, epoch)
        if code:
            for each in self._checkpoints:
                each.request_stop(code)
            self.end(step, epoch)
            for each in self._checkpoints:
                each.has_stopped = True
            raise SystemExit(code)

    def _plan_next_talk(self, step: int, pace: float) -> None:
        """Plans it alike on all: `pace` is the seconds of a step of the slowest."""
        self._last_talk = (step, time.monotonic())
        self._next_talk = step + (max(1, int(_BETWEEN_TALKS / pace)) if pace else 1)

    def _save_those(self, due: Sequence[bool], step: int, epoch: int) -> None:
        for each, is_due in zip(self._checkpoints, due, strict=True):
            if is_due:
                self._save(each, step, epoch)

    def _save(self, each: Checkpoint, step: int, epoch: int) -> None:
        began = time.monotonic()
        self._check_written(each)
        manifest, arrays = self._held or self._freeze()
        manifest["logs"] = (
            each.logs_at(epoch) if manifest["step of the epoch"] == 0 else {}
        )

        def write(folder: pathlib.Path) -> pathlib.Path:
            return checkpoint.write(folder, step, arrays, manifest)

        if self._held:  # The end of this epoch may still be due.
            each.note_saved(step, epoch)
        else:
            each.begin(step, epoch)
        if self._team.is_chief:
            each.save(step, write)
        each.paused += time.monotonic() - began

    def _check_written(self, each: Checkpoint) -> None:
        """Waits until the chief has written; an error is one of all workers."""
        self._report(each, self._team.from_chief("the last save", each.failure()))

    def _report(self, each: Checkpoint, failure: str) -> None:
        if not failure:
            return
        each.note_failure()
        if each.on_error == "raise":
            raise SaveError(failure)
        if self._team.is_chief:
            warnings.warn(failure, stacklevel=2)
