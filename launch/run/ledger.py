"""Where the time of a run went: seconds by purpose, over all its restarts."""

import json
import os
import time
from typing import Any

import distfit
from launch import run_files

# In the order of a start; "rest" is callbacks, logs and what lies between.
PARTS = (
    "noticing",  # from a failure until all workers had ended
    "waiting",  # from then to the next start
    "starting",  # from there until the program is loaded
    "building",  # the data, the model and its steps
    "restoring",  # the state of a checkpoint
    "first step",  # compiling it, too
    "data",  # that steps have waited for
    "steps",
    "validation",
    "saving",
    "lost",  # in starts that failed, after the checkpoint that this one went on from
    "rest",
)


class Ledger(distfit.callbacks.DataWait):
    """Adds up seconds by purpose, as this worker sees them.

    Its state is part of checkpoints, so that a run that goes on adds to what was there.

    Args:
        began: when this process began, in seconds of `time.time()`.
        loaded: when the program was loaded.
        checkpoints: the callback that saves, or None.
    """

    def __init__(
        self,
        began: float,
        loaded: float,
        checkpoints: distfit.callbacks.Checkpoint | None,
    ) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._restarts = 0
        self._failures = json.loads(os.environ.get(run_files.RESTART_VARIABLE, "[]"))
        self._began = began
        self._since = 0.0  # when the checkpoint was made that this start went on from
        self._is_saved = False  # whether a checkpoint has what was before this start
        self._steps_ran = False
        self._waited = 0.0
        self._mark = loaded
        self._add("starting", loaded - began)

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] += max(0.0, seconds)

    def get_state(self) -> dict[str, Any]:
        self._is_saved = True
        return {**self.so_far(), "time": time.time()}

    def set_state(self, state: dict[str, Any]) -> None:
        if self._is_saved:  # A rollback: what the checkpoint has is here already.
            return
        self._is_saved = True
        for part in PARTS:
            self._seconds[part] += state["seconds"].get(part, 0.0)
        self._restarts, self._since = state["restarts"], state["time"]

    def on_train_begin(self, logs: Any = None) -> None:
        self._pass("building")

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._pass("rest" if self._steps_ran else "restoring")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._pass("steps" if self._steps_ran else "first step")
        self._steps_ran = True

    def on_test_begin(self, logs: Any = None) -> None:
        self._pass("rest")

    def on_test_end(self, logs: Any = None) -> None:
        self._pass("validation")

    def _pass(self, part: str) -> None:
        """Adds the time since the last call, of which some has waited for data."""
        now, waited = time.time(), self.seconds_waited
        data = waited - self._waited
        self._add("data", data)
        self._add(part, now - self._mark - data)
        self._mark, self._waited = now, waited

    def so_far(self) -> dict[str, Any]:
        """The seconds of each part, and the number of restarts."""
        seconds, restarts = dict(self._seconds), self._restarts
        # The failures that the checkpoint does not count, each with the next start.
        failures = [each for each in self._failures if each[2] > self._since]
        again = [*(began for began, _, _ in failures[1:]), self._began]
        for (began, failed, ended), then in zip(failures, again, strict=False):
            restarts += 1
            seconds["lost"] += max(0.0, failed - max(began, self._since))
            seconds["noticing"] += max(0.0, ended - failed)
            seconds["waiting"] += max(0.0, then - ended)
        paused = self._checkpoints.paused if self._checkpoints else 0.0
        seconds["saving"] += paused  # which is part of what lies between steps
        seconds["rest"] = max(0.0, seconds["rest"] - paused)
        return {"seconds": seconds, "restarts": restarts}

    def end(self) -> dict[str, Any]:
        """The ledger once the model is saved, rounded to milliseconds."""
        self._pass("saving")
        found = self.so_far()
        seconds = {k: round(v, 3) for k, v in found["seconds"].items()}
        return {"seconds": seconds, "restarts": found["restarts"]}


def text(ledger: dict[str, Any]) -> str:
    """One line for the summary: the parts that took a tenth of a second or more."""
    parts = [f"{k} {v:.1f}" for k, v in ledger["seconds"].items() if v >= 0.1]
    restarts = f"; restarts {ledger['restarts']}" if ledger["restarts"] else ""
    return ", ".join(parts) + restarts
