"""Keras's progress bar, for one worker or several."""

import time
from collections.abc import Callable

import keras

from distfit.cluster.workers import Workers


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Keras's progress bar, which reads the metrics only when it is redrawn.

    It shows the metrics of the epoch so far, as they are reported at its end.

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
        """The values are means already: the bar must not average them again."""
        self._maybe_init_progbar()
        self.progbar.stateless_metrics.update(logs or {})


class SharedProgressBar(ProgressBar):
    """The progress bar of several workers, shown by the chief.

    Reading the metrics takes all workers. So all have the bar, and at each redraw the
    chief announces after how many executions the next one follows.

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
