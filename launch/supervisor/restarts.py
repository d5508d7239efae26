"""Whether a run that has failed is started again, and when."""

import signal

from launch.supervisor.root_cause import End

_FIRST_PAUSE = 1.0  # seconds, doubled with each failure in a row
_LONGEST_PAUSE = 60.0
_INVALID_INPUT = 2
_PREEMPTED = 128 + signal.SIGTERM


class Restarts:
    """Counts the failures in a row: those with no later checkpoint between them.

    Preemptions, in which a worker alone got SIGTERM, are counted by themselves. Invalid
    input ends a run, and so does the same exception at the same step twice in a row:
    starting again would not help.

    Args:
        most: how many failures in a row to start again after, and as many preemptions.

    Attributes:
        reason: why the run is not, or how often it was, started again; for a message.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = {"failure": 0, "preemption": 0}
        self._step = 0  # of the latest checkpoint at the last failure
        self._before: tuple[str, str, int | None] | None = None
        self.reason = ""

    def after(self, cause: End, step: int) -> float | None:
        """Returns the seconds to wait before the next start, or None: there is none.

        Args:
            cause: the root cause of the failure.
            step: the step of the latest checkpoint that the workers know of, or 0.
        """
        self.reason = ""
        if not self._most or cause.exit_code == _INVALID_INPUT:
            return None
        failure, before = cause.failure, self._before
        own = failure is not None and not failure.follows and cause.is_own
        self._before = (
            (failure.type, failure.message, failure.step) if failure and own else None
        )
        kind = "preemption" if cause.exit_code == _PREEMPTED else "failure"
        if kind == "failure" and self._before is not None and self._before == before:
            self.reason = f"the same error at the same place, step {before[2]}, twice"
            return None
        if step > self._step:
            self._step = step
            self._count = dict.fromkeys(self._count, 0)
        if self._count[kind] >= self._most:
            self.reason = f"{self._most} restarts without a later checkpoint"
            return None
        self._count[kind] += 1
        self.reason = f"{self._count[kind]} of {self._most} after a {kind}"
        pause = _FIRST_PAUSE * 2 ** (self._count[kind] - 1)
        return min(pause, _LONGEST_PAUSE)
