"""A worker process: starts it, signals it, and kills it with all that it has started.

Each worker leads its own session and process group. So Ctrl-C reaches the parent alone,
which decides, and a SIGKILL to the group also reaches the processes that the worker has
started, such as data loaders.

No worker outlives its parent, however that ends. Linux is asked to send SIGKILL to a
worker when its parent dies. In addition a guard, a shell that reads from a pipe until
the parent's end closes it, sends SIGKILL to the groups that are left: that also reaches
processes that workers have started, and works on other systems.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process:
    """A worker process, running or ended.

    Args:
        index: its rank in the cluster.
        command: the command line to run.
        environment: its environment variables.
        cores: the CPU cores it may use; empty: those of this process.
        writing: descriptors for its stdout and stderr, or one for both.

    Attributes:
        index: its rank in the cluster.
        pid: its process id, and that of its group.
        code: its exit code, negative for a signal; None while it runs.
        ended: when its end was seen, in seconds of `time.time()`.
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

        A SIGKILL that was not sent from here has a cause of its own, whatever other
        signals were sent.
        """
        if self.code == -signal.SIGKILL:
            return self._signalled.get(signal.SIGKILL)
        return min(self._signalled.values(), default=None)

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped by a signal, as far as Linux tells."""
        try:
            text = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        # "pid (name) state ...", where the name may have parentheses.
        return text.rpartition(")")[2].split()[:1] in (["T"], ["t"])

    def send(self, number: int) -> None:
        """Sends a signal, and resumes the worker if it was stopped.

        SIGKILL goes to the whole group. Other signals go to the worker alone, which
        manages the processes it has started, and may need them in order to save.
        """
        if self.code is not None:  # its process id may be reused by now
            return
        self._signalled.setdefault(number, time.time())
        if number == signal.SIGKILL:
            _send_group(self.pid, number)
        else:
            os.kill(self.pid, number)
            _send_group(self.pid, signal.SIGCONT)

    def poll(self) -> bool:
        """Returns whether it has ended since the last call.

        Then the processes that it has started are killed.
        """
        if self.code is not None or not _has_ended(self._popen):
            return False
        # Before it is reaped: afterwards its id may be reused for another group.
        _send_group(self.pid, signal.SIGKILL)
        self.wait()
        return True

    def wait(self) -> None:
        """Waits for its end, and keeps the exit code."""
        self.code = self._popen.wait()
        self.ended = time.time()


class Guard:
    """Kills the process groups of workers if this process dies before them."""

    # It reads the living groups, again whenever one has ended, as ids are reused.
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
        """Sends the guard the groups that are alive."""
        groups = [f"-{p.pid}" for p in processes if p.code is None]
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # the guard was killed
                self._popen.stdin.write((" ".join(groups) + "\n").encode())

    def close(self) -> None:
        """Ends the guard; call it when no worker is left."""
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdin is not None:
            self._popen.stdin.close()


def _before_exec(cores: tuple[int, ...]) -> Callable[[], None]:
    """Returns the function that the child calls between fork and exec.

    The cores are set there, not by the parent afterwards: threads inherit the cores of
    the thread that starts them, and libraries start theirs at once. It is safe as the
    parent has a single thread when it forks, so no other thread holds a lock. The
    request to Linux refers to the thread that forks, so that must live as long as the
    parent. What can be prepared is prepared before, so that the child calls little.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the request
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
        # macOS says "not permitted" for a group whose only member is a zombie.
        return
