"""Processes that carry a mark in their environment, which their children inherit.

So a test finds, and kills, exactly the processes that it started, also those that left
their parent, as daemons of Slurm and Ray do.
"""

import contextlib
import os
import pathlib
import secrets
import signal
import time
from collections.abc import Iterator

_NAME = "DISTFIT_TEST_MARK"


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[dict[str, str]]:
    """Yields an environment with a unique mark; then kills processes that have it."""
    mark = secrets.token_hex(8)
    try:
        yield {**os.environ, **variables, _NAME: mark}
    finally:
        kill_all(mark)


def left(environ: dict[str, str], within: float = 0.0) -> dict[int, str]:
    """Returns the processes, by id, that still have this mark after `within` s."""
    deadline = time.monotonic() + within
    while (found := _with(environ[_NAME])) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def kill_all(mark: str) -> None:
    """Kills until none is left: one may just have started another."""
    while found := _with(mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _with(mark: str) -> dict[int, str]:
    wanted = f"{_NAME}={mark}".encode()
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            # A process that has ended, but was not waited for, has no environment.
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes()
                found[int(folder.name)] = command.replace(b"\0", b" ").decode()
    return found
