"""Takes what workers write from their pipes to their logs and to the screen.

The pipes are read by one thread, which never waits for a worker: a line that has
begun is kept until its end comes, and others go on meanwhile. It does not wait for the
screen either (screen.py).
"""

import itertools
import os
import pathlib
import select
import selectors
import time
from collections.abc import Callable

from launch import run_files
from launch.errors import UsageError
from launch.supervisor.screen import Lines, Log, Screen

_CHUNK = 65536  # bytes; what a pipe holds on Linux
_KEPT = 65536  # bytes of what was shown as errors
_LAST_WORDS = 0.5  # seconds that they may take to come after the end of a worker
_PATIENCE = 1.0  # seconds without a byte after which a screen is given up at the end


class Outputs:
    """The output of all workers of a run.

    Args:
        workdir: the working folder of the run. Logs of a former run are set aside;
            what else its workers have left is removed.
        num_workers: how many there will be.
        tee: "chief": the screen gets what worker 0 writes, as it writes it; "all": what
            every worker writes, line by line behind its name.

    Raises:
        UsageError: the folder or a log cannot be made.

    Attributes:
        shown: the last of what the chief has written as errors and was shown so.
    """

    def __init__(self, workdir: pathlib.Path, num_workers: int, tee: str) -> None:
        _open_standard_files()
        self._screen = Screen(1)
        # What is one for who looks at it, as a terminal is, has one order.
        self._errors = self._screen if os.path.sameopenfile(1, 2) else Screen(2)
        self.shown = b""
        self._shows_errors = True
        self._tee = tee
        self._logs = _open_logs(workdir, num_workers, self._errors.write)
        self._lines: dict[int, list[Lines]] = {}
        self._pipes: dict[int, list[_Pipe]] = {}
        self._selector = selectors.DefaultSelector()

    def connect(self, index: int) -> list[int]:
        """Opens the pipes of a worker.

        Returns:
            The ends to write to, which the caller closes: one for output and one for
            errors, or one for both. Two tell them apart on the screen, but their order
            in the log is that in which they come here.
        """
        shows = [self._screen.write, self._show_error][: 2 if index == 0 else 1]
        ends = [os.pipe() for _ in shows]
        for (reading, _), show in zip(ends, shows, strict=True):
            pipe = _Pipe(reading, self._targets(index, show))
            self._pipes.setdefault(index, []).append(pipe)
            self._selector.register(reading, selectors.EVENT_READ, pipe)
        return [writing for _, writing in ends]

    def read(self, timeout: float) -> None:
        """Passes on what is there; waits for it for at most `timeout` seconds."""
        for key, _ in self._selector.select(timeout):
            if not key.data.read():  # closed before the worker has ended
                self._selector.unregister(key.fd)

    def finish(self, index: int) -> None:
        """Passes on the last that a worker has written which has ended."""
        for pipe in self._pipes.pop(index, []):
            if pipe.file in self._selector.get_map():
                self._selector.unregister(pipe.file)
            pipe.drain()
        for lines in self._lines.pop(index, []):
            lines.close()

    def mute_errors(self) -> None:
        """Keeps from the screen what the chief writes as errors from now on."""
        self._shows_errors = False

    def flush(self, patience: float = _PATIENCE) -> bool:
        """Returns whether the screen has it all; gives up when it takes nothing more.

        Args:
            patience: how many seconds it may take nothing.
        """
        return all([s.flush(patience) for s in (self._screen, self._errors)])

    def say(self, text: str) -> None:
        """Shows a message as an error: a progress bar or a death may have left a line.

        Args:
            text: whole lines, or nothing.
        """
        if text:
            self._errors.write((b"\n" if self._errors.begun else b"") + text.encode())
            self._errors.flush(_PATIENCE)

    def close(self) -> None:
        """Passes on what there is, and closes what is open."""
        for index in list(self._pipes):
            self.finish(index)
        for log in self._logs:
            log.close()
        self._selector.close()
        self.flush()

    def _show_error(self, data: bytes) -> None:
        if self._shows_errors:
            self.shown = (self.shown + data)[-_KEPT:]
            self._errors.write(data)

    def _targets(
        self, index: int, show: Callable[[bytes], None]
    ) -> list[Callable[[bytes], None]]:
        log = self._logs[index].write
        if self._tee == "all":
            lines = Lines(b"[worker %d] " % index, show)
            self._lines.setdefault(index, []).append(lines)
            return [log, lines.write]
        return [log, show] if index == 0 else [log]


class _Pipe:
    """The end to read of a worker's standard output or error.

    Args:
        file: its descriptor.
        targets: called with what is read.
    """

    def __init__(self, file: int, targets: list[Callable[[bytes], None]]) -> None:
        self.file = file
        self._targets = targets
        os.set_blocking(file, False)

    def read(self) -> bool:
        """Passes on what is there, and returns whether there was something."""
        try:
            data = os.read(self.file, _CHUNK)
        except BlockingIOError:
            return False
        for target in self._targets:
            target(data)
        return bool(data)

    def drain(self) -> None:
        """Passes on all up to its end, and closes the pipe.

        Waits a little for what passes on a worker's last words (quiet.py), but not for
        ever: a process that the worker has started and that has left its group may hold
        the pipe open, and even write on.
        """
        deadline = time.monotonic() + _LAST_WORDS
        while _can_read(self.file, deadline) and self.read():
            if time.monotonic() > deadline:
                break
        os.close(self.file)


def _can_read(file: int, deadline: float) -> bool:
    return bool(select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0])


def _open_standard_files() -> None:
    """Opens those that were closed, as by `>&-`: a pipe would get their numbers."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)


def _open_logs(
    workdir: pathlib.Path, num_workers: int, tell: Callable[[bytes], None]
) -> list[Log]:
    try:
        _set_logs_aside(workdir)
        run_files.clear(workdir)
        return [Log(run_files.log(workdir, i), tell) for i in range(num_workers)]
    except OSError as error:
        raise UsageError(
            f"The working folder cannot be written to ({error.strerror}: "
            f"{error.filename}). Received: --workdir={workdir}. "
            "Give a folder that can; it is made if need be."
        ) from error


def _set_logs_aside(workdir: pathlib.Path) -> None:
    """Moves the logs of a former run to `logs-1`, or the first such name that is free.

    A run that is refused a moment later, or evaluates, leaves those of the training.
    """
    folder = workdir / run_files.FOLDER
    former = [path for path in folder.glob("worker-*.log") if path.stat().st_size]
    if not former:
        return
    names = (workdir / f"{run_files.FOLDER}-{i}" for i in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    aside.mkdir()
    for path in former:
        path.rename(aside / path.name)
