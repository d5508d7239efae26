"""The report of the root cause: the last lines that a failed run prints."""

import os
import pathlib
import signal
from collections.abc import Sequence

from launch import messages, run_files
from launch.supervisor.root_cause import End, Failure

# The last line is their message alone: it says what to change, or names the workers.
_WITHOUT_A_WORKER = ("UsageError", "RunError", "FloatingPointError", "StallError")
# Raised to end the process, by a signal or by sys.exit().
_EXITS = ("SystemExit", "KeyboardInterrupt")
_LAST_LINES = 15
_HEADING = "Traceback (most recent call last):\n"
_LONGEST_LINE = 500  # characters of a message; the traceback is printed above it


def text(
    end: End,
    workdir: pathlib.Path,
    *,
    shown: str = "",
    out_of_memory: bool = False,
    silent: Sequence[str] = (),
    alone: bool = False,
) -> str:
    """Returns the report: a traceback or the end of a log, then the cause.

    Args:
        end: the root cause.
        workdir: the working folder of the run.
        shown: the end of what stderr already shows, which is not repeated.
        out_of_memory: whether the kernel has killed a process for lack of memory.
        silent: the workers that had neither ended nor recorded an error by then, such
            as "worker 1 (stopped)".
        alone: whether this is a run of one process, which is no worker.
    """
    log = run_files.log(workdir, end.worker)
    who = "the process" if alone else f"worker {end.worker}"
    if end.failure is None:
        above = f"{who.capitalize()}, the end of {log}:\n{_tail(log)}"
        return f"{above}launch: {who} {_death(end, out_of_memory)}\n"
    if end.failure.follows and silent:
        return f"{_lost(end.failure, silent)}\n"
    code = str(end.failure.code)
    if end.failure.type in _EXITS and end.failure.message in ("", code):
        if end.failure.code == 128 + signal.SIGTERM and not alone:
            # They stop at one step, whichever of them got the signal.
            return f"launch: a worker got SIGTERM: all stop with exit code {code}\n"
        return f"launch: {who} ended with exit code {code}\n"
    how = "lost another worker" if end.failure.follows else "failed first"
    line = _last_line(end.failure, f"{who} {'failed' if alone else how}")
    if shown.endswith(line + "\n") or _tells_of_stall(end.failure, shown):
        return ""
    traceback = end.failure.traceback.rstrip()
    # What a process prints begins some frames further out than what it has recorded.
    frames = traceback.rpartition(_HEADING)[2]
    if not traceback or frames in messages.without_colours(shown):
        return line + "\n"
    return f"{who.capitalize()} (see {log}):\n{traceback}\n{line}\n"


def _tells_of_stall(failure: Failure, shown: str) -> bool:
    """Whether the chief has just reported the stall that another worker recorded first.

    Both had looked before either had recorded it, and saw the same.
    """
    last = shown.rstrip("\n").rpartition("\n")[2]
    return failure.type == "StallError" and last.startswith("launch: No progress for ")


def _lost(failure: Failure, silent: Sequence[str]) -> str:
    """Names those that others have lost: they have no error of their own to report."""
    message = " ".join(failure.message.split())[:_LONGEST_LINE]
    return (
        f"launch: {', '.join(silent)} did not answer, and worker {failure.worker} "
        f"ended with {failure.type}: {message}"
    )


def _last_line(failure: Failure, who_failed: str) -> str:
    message = " ".join(failure.message.split())
    if failure.type in _WITHOUT_A_WORKER:
        return f"launch: {message}"
    if len(message) > _LONGEST_LINE:
        message = message[:_LONGEST_LINE] + " ..."
    what = messages.line(message, failure.place)
    which = f"launch: {who_failed}, with {failure.type}"
    return f"{which}: {what}" if what else which


def _death(end: End, out_of_memory: bool) -> str:
    """Describes the end of a process that recorded no error."""
    if end.code >= 0:
        return f"ended with exit code {end.code}, and recorded no error"
    killed = f"was killed by {_signal_name(-end.code)}"
    if end.code != -signal.SIGKILL:
        return killed
    if out_of_memory:
        return f"{killed}: out of memory, according to the kernel's count of such kills"
    return f"{killed}, perhaps by the kernel because memory ran out"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: pathlib.Path) -> str:
    """Returns the last lines of a log, each with a newline, or "" if there are none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "".join(line + "\n" for line in lines[-_LAST_LINES:])
