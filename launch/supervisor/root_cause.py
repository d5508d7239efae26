"""Finds the root cause among the exceptions that failed workers have recorded.

When one worker fails, the others' collectives fail after it. The root cause is the
earliest failure that does not follow from another one.
"""

import dataclasses
import os
import pathlib
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from launch import messages, run_files
from launch.errors import RunError, UsageError

_LONGEST_MESSAGE = 2000  # characters
# Their message needs no traceback: it says what is wrong with the input, names the step
# and the replica (NonFinite), or was given to sys.exit().
_EXPLAIN_THEMSELVES = (UsageError, RunError, FloatingPointError, SystemExit)

# What TensorFlow raises in a worker that has lost a peer.
_ALWAYS_FOLLOW = {
    "AbortedError",
    "CancelledError",
    "DeadlineExceededError",
    "UnavailableError",
}
# These may follow: collectives are aborted with the code of the error that came first.
_MAY_FOLLOW = {
    "ConnectionResetError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OpError",
    "OutOfRangeError",
    "RuntimeError",
    "UnknownError",
}
_SPEAKS_OF_PEERS = re.compile(
    r"collective ops? (is|was|were|has been) aborted|connection (reset|refused|closed)"
    r"|socket closed|heartbeat|coordination (service|agent)|\bpeers?\b",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """The exception that ended a worker.

    Attributes:
        worker: the index of the worker.
        time: when it was recorded, in seconds of `time.time()`.
        type: the name of the exception's class.
        message: at most 2000 characters.
        traceback: as Python prints it; empty if the message is enough.
        code: the exit code that the worker ends with.
        step: the step it was in, or had finished last; None if that is not known.
        place: the line of the user's step that failed, as in messages.py, or "".
        has_peers: whether it is one of several workers.
    """

    worker: int
    time: float
    type: str
    message: str
    traceback: str
    code: int
    step: int | None = None
    place: str = ""
    has_peers: bool = True

    @property
    def follows(self) -> bool:
        """Whether this looks like a consequence of another worker's failure."""
        return self.has_peers and _follows(self.type, self.message)


@dataclasses.dataclass(frozen=True)
class End:
    """How a worker ended, as its parent saw it.

    Attributes:
        worker: its index.
        code: its exit code; -9 if signal 9 killed it.
        time: when its end was seen, in seconds of `time.time()`.
        asked: when the parent sent it the signal that may have ended it, or None.
        failure: the failure it recorded, or None.
    """

    worker: int
    code: int
    time: float
    asked: float | None = None
    failure: Failure | None = None

    @property
    def began(self) -> float:
        """When things went wrong, in seconds of `time.time()`."""
        return self.time if self.failure is None else self.failure.time

    @property
    def is_own(self) -> bool:
        """Whether neither a peer's failure nor the parent's signal explains it."""
        return _rank(self) == 0

    @property
    def exit_code(self) -> int:
        """The parent's exit code if this is the root cause."""
        code = self.code if self.failure is None else self.failure.code
        preempted, interrupted = 128 + signal.SIGTERM, 128 + signal.SIGINT
        return code if code in (1, 2, interrupted, preempted) else 1


def record(
    workdir: pathlib.Path,
    index: int,
    error: BaseException,
    code: int,
    step: int | None = None,
) -> None:
    """Writes `<workdir>/logs/worker-<index>.error.json`.

    Never raises, as that would hide the error; problems are reported on stderr.

    Args:
        workdir: the working folder of the run.
        index: the index of this worker.
        error: the exception that ends it.
        code: the exit code that it will end with.
        step: the step it is in, or has finished last.
    """
    try:
        lost = lost_peer(error) if has_peers() else None
        name = type(error).__name__
        cause = messages.cause(error)
        message = cause if lost is None else lost.removeprefix(f"{name}: ")
        content = {
            "worker": index,
            "time": time.time(),
            "type": name,
            "message": message[:_LONGEST_MESSAGE],
            "traceback": "" if lost else _traceback(error),
            "code": code,
            "step": step,
            "place": messages.place(error),
            "has_peers": has_peers(),
        }
        run_files.write_json(run_files.error(workdir, index), content)
    except Exception as problem:
        print(f"launch: the error could not be recorded: {problem}", file=sys.stderr)


def read(workdir: pathlib.Path, index: int) -> Failure | None:
    """Returns a worker's recorded failure; None if it is missing or malformed."""
    content = run_files.read_json(run_files.error(workdir, index))
    try:
        return None if content is None else Failure(**content)
    except TypeError:  # not its fields
        return None


def has_peers() -> bool:
    """Whether this process is a worker of a cluster, which may lose others."""
    return "TF_CONFIG" in os.environ


def lost_peer(error: BaseException) -> str | None:
    """Returns the line of an error that tells of a lost worker; None for others."""
    name, message = type(error).__name__, messages.cause(error)
    if not _follows(name, message):
        return None
    lines = (line for line in message.splitlines() if _SPEAKS_OF_PEERS.search(line))
    return f"{name}: {next(lines, message.partition(chr(10))[0]).strip()}"


def root_cause(ends: Sequence[End]) -> End | None:
    """Returns the end that caused the others, or None if all exit codes are 0."""
    failed = [end for end in ends if end.code != 0]
    return min(failed, key=lambda end: (_rank(end), end.began), default=None)


def failed_to_save(ends: Sequence[End]) -> End | None:
    """Returns the end of a worker that failed to save, or None.

    After a SIGTERM from outside, exit codes say little; recorded errors that do not
    follow from a peer's failure do.
    """
    stopped = (128 + signal.SIGINT, 128 + signal.SIGTERM)
    failed = [
        end
        for end in ends
        if end.failure and not end.failure.follows and end.failure.code not in stopped
    ]
    return min(failed, key=lambda end: end.began, default=None)


def _follows(type_name: str, message: str) -> bool:
    if type_name in _ALWAYS_FOLLOW:
        return True
    return type_name in _MAY_FOLLOW and bool(_SPEAKS_OF_PEERS.search(message))


def _rank(end: End) -> int:
    """0 for a cause, 1 if it follows from a peer, 2 if from the parent's signal."""
    if end.asked is not None and end.began > end.asked:
        return 2
    return int(end.failure is not None and end.failure.follows)


def _traceback(error: BaseException) -> str:
    if isinstance(error, _EXPLAIN_THEMSELVES) or error.__traceback__ is None:
        return ""
    return messages.without_colours("".join(traceback.format_exception(error)))
