"""One worker process: how it starts, is signalled, and ends with all it has started.

Each worker leads a session and a process group of its own. So a Ctrl-C reaches the
parent alone, which decides, and a SIGKILL to the group reaches what the worker has
started, such as processes that load data.

No worker outlives its parent, however that ends. Linux is asked to send SIGKILL to a
worker when the parent dies. And a guard, a shell that waits at a pipe which the
parent's end closes, sends SIGKILL to the groups that are left: that also reaches what
workers have started, and works where there is no such request.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process:
    """A worker that runs or has ended.

    Args:
        index: its place in the cluster.
        command: what it runs.
        environment: its environment variables.
        cores: what it may use of the CPU; empty: as this process.
        writing: descriptors for its output and its errors, or one for both.

    Attributes:
        index: its place in the cluster.
        pid: its process id, and that of its group.
        code: its exit code, negative for a signal; None while it runs.
        ended: when that was seen, in seconds as `time.time()` counts them.
    """

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        cores: tuple[int, ...],
        writing: Sequence[int],
    ) -> None:
        self.index = index
        self.code: int | None = None
        self.ended = 0.0
        self._signalled: dict[int, float] = {}
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=writing[0],
            stderr=writing[-1],
            start_new_session=True,
            preexec_fn=_before_exec(cores),
        )

        self.pid = self._popen.pid

    @property
    def asked(self) -> float | None:
        """When it was first sent a signal that may have ended it, or None.

        A SIGKILL that was not sent from here ends a worker for a reason of its own,
        whatever else it was sent.
        """
        if self.code == -signal.SIGKILL:
            return self._signalled.get(signal.SIGKILL)
        return min(self._signalled.values(), default=None)

    def send(self, number: int) -> None:
        """Sends a signal and lets the worker go on if it was stopped.

        SIGKILL is for the whole group. Others are for the worker alone: it looks after
        what it has started, and may need that in order to save.
        """
        if self.code is not None:  # its process id may be another process's by now
            return
        self._signalled.setdefault(number, time.time())
        if number == signal.SIGKILL:
            _send_group(self.pid, number)
        else:
            os.kill(self.pid, number)
            _send_group(self.pid, signal.SIGCONT)

    def poll(self) -> bool:
        """Returns whether it has ended since it was last asked about.

        What it has started ends with it.
        """
        if self.code is not None or not _has_ended(self._popen):
            return False
        # Before it is reaped: afterwards its id may be that of another group.
        _send_group(self.pid, signal.SIGKILL)
        self.wait()
        return True

    def wait(self) -> None:
        """Waits for its end."""
        self.code = self._popen.wait()
        self.ended = time.time()


class Guard:
    """Kills the groups of workers when this process has died before them."""

    # It reads the groups that are alive, again whenever one has ended, since a number
    # may come to be that of another group.
    _SCRIPT = "while read -r line; do groups=$line; done; kill -s KILL -- $groups"

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            ["/bin/sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )

    def watch(self, processes: Iterable[Process]) -> None:
        """Takes note of the workers that are alive."""
        groups = [f"-{p.pid}" for p in processes if p.code is None]
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it was killed, alone
                self._popen.stdin.write((" ".join(groups) + "\n").encode())

    def close(self) -> None:
        """Ends it; to be called when no worker is left."""
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdin is not None:
            self._popen.stdin.close()


def _before_exec(cores: tuple[int, ...]) -> Callable[[], None]:
    """Returns what the child does between fork and exec.

    There and not in the parent afterwards: threads inherit the cores of the one that
    starts them, and libraries start theirs at once. It is safe as the parent has a
    single thread when it forks, so no lock is held by another one. The request to Linux
    also refers to the thread that has forked, so that one must live as long as the
    parent; and what can be prepared is, so that the child calls little.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it had died before the request
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


def _has_ended(popen: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):  # macOS: reaps it
        return popen.poll() is not None
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, popen.pid, options) is not None


def _send_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        # macOS says "not permitted" of a group whose only member is a zombie.
        return
