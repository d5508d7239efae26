"""Copies the output of workers from their pipes to their logs and to the screen.

One thread reads the pipes and never waits for a worker: an unfinished line is kept
until its end arrives, while the others are read. Nor does it wait for the screen
(screen.py).
"""

import io
import itertools
import os
import pathlib
import select
import selectors
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from launch import run_files
from launch.errors import UsageError
from launch.supervisor.screen import Lines, Log, Screen

_CHUNK = 65536  # bytes; the capacity of a pipe on Linux
_KEPT = 65536  # bytes of the errors that were shown
_LAST_WORDS = 0.5  # seconds that output may take to arrive after an exit
_PATIENCE = 1.0  # seconds without a byte after which to give up a screen


class Outputs:
    """The output of all workers of a run.

    Args:
        workdir: the working folder of the run. Logs of an earlier run are moved aside;
            its workers' other files are removed.
        indices: the workers that there will be.
        tee: "chief" shows the output of the first as it is; "all" that of every worker,
            line by line, each prefixed with its worker.

    Raises:
        UsageError: the folder or a log cannot be created.

    Attributes:
        shown: the end of the chief's stderr, as far as it was shown.
    """

    def __init__(self, workdir: pathlib.Path, indices: Sequence[int], tee: str) -> None:
        open_standard_files()
        self._screen = Screen(1)
        # If both are the same file, such as a terminal, one Screen keeps their order.
        self._errors = self._screen if os.path.sameopenfile(1, 2) else Screen(2)
        self.shown = b""
        self._shows_errors = True
        self._tee = tee
        self._first = indices[0]
        self._logs = _open_logs(workdir, indices, self._errors.write)
        self._lines: dict[int, list[Lines]] = {}
        self._pipes: dict[int, list[_Pipe]] = {}
        self._selector = selectors.DefaultSelector()

    def connect(self, index: int) -> list[int]:
        """Opens the pipes of a worker.

        Returns:
            The write ends, which the caller closes: one for stdout and one for stderr,
            or one for both. With two, the screen can tell them apart, but the log has
            them in the order in which they arrive here.
        """
        shows = [self._screen.write, self._show_error][
            : 2 if index == self._first else 1
        ]
        ends = [os.pipe() for _ in shows]
        for (reading, _), show in zip(ends, shows, strict=True):
            pipe = _Pipe(reading, self._targets(index, show))
            self._pipes.setdefault(index, []).append(pipe)
            self._selector.register(reading, selectors.EVENT_READ, pipe)
        return [writing for _, writing in ends]

    def read(self, timeout: float) -> None:
        """Passes on the output that is available, after at most `timeout` seconds."""
        for key, _ in self._selector.select(timeout):
            if not key.data.read():  # closed before the worker ended
                self._selector.unregister(key.fd)

    def finish(self, index: int) -> None:
        """Passes on the last output of a worker that has ended."""
        for pipe in self._pipes.pop(index, []):
            if pipe.file in self._selector.get_map():
                self._selector.unregister(pipe.file)
            pipe.drain()
        for lines in self._lines.pop(index, []):
            lines.close()

    def mute_errors(self) -> None:
        """Hides the chief's stderr from the screen from now on."""
        self._shows_errors = False

    def flush(self, patience: float = _PATIENCE) -> bool:
        """Returns whether all output is shown; gives up when the screen takes no more.

        Args:
            patience: seconds without a byte after which to give up.
        """
        return all([s.flush(patience) for s in (self._screen, self._errors)])

    def say(self, text: str) -> None:
        """Prints a message to stderr, below the line that a progress bar or crash left.

        Args:
            text: whole lines, or an empty string.
        """
        if text:
            self._errors.write((b"\n" if self._errors.begun else b"") + text.encode())
            self._errors.flush(_PATIENCE)

    def close(self) -> None:
        """Passes on the remaining output, and closes all files."""
        for index in list(self._pipes):
            self.finish(index)
        for log in self._logs.values():
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
        return [log, show] if index == self._first else [log]


class _Pipe:
    """The read end of the pipe from a worker's stdout or stderr.

    Args:
        file: its descriptor.
        targets: functions that are called with the data.
    """

    def __init__(self, file: int, targets: list[Callable[[bytes], None]]) -> None:
        self.file = file
        self._targets = targets
        os.set_blocking(file, False)

    def read(self) -> bool:
        """Passes on the available data, and returns whether there was any."""
        try:
            data = os.read(self.file, _CHUNK)
        except BlockingIOError:
            return False
        for target in self._targets:
            target(data)
        return bool(data)

    def drain(self) -> None:
        """Passes on everything up to the end of file, and closes the pipe.

        Waits a little for the filter of a worker's last lines (quiet.py), but not
        forever: a process that the worker started, and that has left its group, may
        hold the pipe open, and even keep writing.
        """
        deadline = time.monotonic() + _LAST_WORDS
        while _can_read(self.file, deadline) and self.read():
            if time.monotonic() > deadline:
                break
        os.close(self.file)


def _can_read(file: int, deadline: float) -> bool:
    return bool(select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0])


def open_standard_files() -> None:
    """Opens those that were closed, as by `>&-`: a pipe would get their descriptors.

    Python has None for them in `sys`, which libraries do not expect.
    """
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def outlast_readers() -> None:
    """Lets this process go on when nobody reads what it prints any more.

    As after `| head`, or when a `tee` was killed: whatever prints next would fail.
    """
    sys.stdout, sys.stderr = _outlasting(sys.stdout), _outlasting(sys.stderr)


class _Outlasting(io.FileIO):
    """A file that goes nowhere once it is a pipe that nobody reads."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return super().write(data)


def _outlasting(stream: TextIO) -> TextIO:
    stream.flush()
    file = _Outlasting(stream.fileno(), "w", closefd=False)
    unbuffered = getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        file if unbuffered else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=bool(stream.line_buffering),
        write_through=unbuffered,
    )


def _open_logs(
    workdir: pathlib.Path, indices: Sequence[int], tell: Callable[[bytes], None]
) -> dict[int, Log]:
    # A worker of a cluster shares the folder with those of other hosts.
    who = "*" if len(indices) > 1 else str(indices[0])
    try:
        _set_logs_aside(workdir, who)
        run_files.clear(workdir, who)
        return {i: Log(run_files.log(workdir, i), tell) for i in indices}
    except OSError as error:
        raise UsageError(
            f"The working folder cannot be written to ({error.strerror}: "
            f"{error.filename}). Received: --workdir={workdir}. "
            "Give a writable folder; it is created if needed."
        ) from error


def _set_logs_aside(workdir: pathlib.Path, who: str) -> None:
    """Moves the logs of an earlier run to `logs-1`, or the next name that is free.

    So a run that is rejected a moment later, or evaluates, keeps the training's logs.
    """
    folder = workdir / run_files.FOLDER
    former = [path for path in folder.glob(f"worker-{who}.log") if path.stat().st_size]
    if not former:
        return
    names = (workdir / f"{run_files.FOLDER}-{i}" for i in itertools.count(1))
    aside = next(
        name
        for name in names
        if not any((name / path.name).exists() for path in former)
    )
    aside.mkdir(exist_ok=True)
    for path in former:
        path.rename(aside / path.name)
