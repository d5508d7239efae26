"""Why workers failed: each records its exception, and one of them is the root cause.

When one worker fails, the others' collectives fail after it. The root cause is the
earliest failure that does not follow from another one.
"""

import dataclasses
import pathlib
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from launch import run_files
from launch.errors import UsageError

_LONGEST_MESSAGE = 2000  # characters; TensorFlow appends whole graphs
# The message says all there is to say: what was given is wrong, NonFinite has found the
# step and the replica, or sys.exit() was given a text.
_EXPLAIN_THEMSELVES = (UsageError, FloatingPointError, SystemExit)

# What TensorFlow raises in a worker whose peer has gone.
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
        time: when it was recorded, in seconds as `time.time()` counts them.
        type: the name of the exception's class.
        message: what it says, at most 2000 characters.
        traceback: as Python prints it; empty where the message says it all.
        code: the exit code that the worker ends with.
    """

    worker: int
    time: float
    type: str
    message: str
    traceback: str
    code: int

    @property
    def follows(self) -> bool:
        """Whether this is what the failure of another worker looks like."""
        return _follows(self.type, self.message)


@dataclasses.dataclass(frozen=True)
class End:
    """How a worker ended, as its parent saw it.

    Attributes:
        worker: its index.
        code: its exit code; -9 if signal 9 has killed it.
        time: when that was seen, in seconds as `time.time()` counts them.
        asked: when the parent had sent it the signal that may have ended it, or None.
        failure: what it had recorded, or None.
    """

    worker: int
    code: int
    time: float
    asked: float | None = None
    failure: Failure | None = None

    @property
    def began(self) -> float:
        """When things went wrong, in seconds as `time.time()` counts them."""
        return self.time if self.failure is None else self.failure.time

    @property
    def is_own(self) -> bool:
        """Whether neither a peer's failure nor the parent explains it."""
        return _rank(self) == 0

    @property
    def exit_code(self) -> int:
        """The code that the parent ends with if this is the root cause."""
        code = self.code if self.failure is None else self.failure.code
        preempted, interrupted = 128 + signal.SIGTERM, 128 + signal.SIGINT
        return code if code in (1, 2, interrupted, preempted) else 1


def record(workdir: pathlib.Path, index: int, error: BaseException, code: int) -> None:
    """Writes `<workdir>/logs/worker-<index>.error.json`.

    Never raises, since that would hide the error: what goes wrong is said on stderr.

    Args:
        workdir: the working folder of the run.
        index: the index of this worker.
        error: what ends it.
        code: the exit code that it will end with.
    """
    try:
        content = {
            "worker": index,
            "time": time.time(),
            "type": type(error).__name__,
            "message": without_colours(str(error))[:_LONGEST_MESSAGE],
            "traceback": _traceback(error),
            "code": code,
        }
        run_files.write_json(run_files.error(workdir, index), content)
    except Exception as problem:
        print(f"launch: the error could not be recorded: {problem}", file=sys.stderr)


def read(workdir: pathlib.Path, index: int) -> Failure | None:
    """Returns what a worker has recorded; None if that is nothing, or unreadable."""
    content = run_files.read_json(run_files.error(workdir, index))
    try:
        return None if content is None else Failure(**content)
    except TypeError:  # not its fields
        return None


def lost_peer(error: BaseException) -> str | None:
    """Returns what an error says of the loss of another worker, if that is its cause.

    TensorFlow says it in one line among dozens about its graph.
    """
    name, message = type(error).__name__, str(error)
    if not _follows(name, message):
        return None
    lines = (line for line in message.splitlines() if _SPEAKS_OF_PEERS.search(line))
    return f"{name}: {next(lines, message.partition(chr(10))[0]).strip()}"


def root_cause(ends: Sequence[End]) -> End | None:
    """Returns the end that the others follow from, or None if all ended with 0."""
    failed = [end for end in ends if end.code != 0]
    return min(failed, key=lambda end: (_rank(end), end.began), default=None)


def failed_to_save(ends: Sequence[End]) -> End | None:
    """Returns the end of a worker that was to save and could not, or None.

    Once all have been sent SIGTERM from outside, ends say little; errors that are
    recorded and follow from no peer do.
    """
    stopped = (128 + signal.SIGINT, 128 + signal.SIGTERM)
    failed = [
        end
        for end in ends
        if end.failure and not end.failure.follows and end.failure.code not in stopped
    ]
    return min(failed, key=lambda end: end.began, default=None)


def without_colours(text: str) -> str:
    """Returns text without the escape sequences that Keras colours it with."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def _follows(type_name: str, message: str) -> bool:
    if type_name in _ALWAYS_FOLLOW:
        return True
    return type_name in _MAY_FOLLOW and bool(_SPEAKS_OF_PEERS.search(message))


def _rank(end: End) -> int:
    """0 for a cause, 1 for what follows from a peer, 2 for what the parent has done."""
    if end.asked is not None and end.began > end.asked:
        return 2
    return int(end.failure is not None and end.failure.follows)


def _traceback(error: BaseException) -> str:
    if isinstance(error, _EXPLAIN_THEMSELVES) or error.__traceback__ is None:
        return ""
    return without_colours("".join(traceback.format_exception(error)))
