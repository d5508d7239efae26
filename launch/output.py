"""Takes what workers write from their pipes to their logs and to the screen.

The pipes are read by one thread, which never waits for a worker: a line that has
begun is kept until its end comes, and others go on meanwhile.
"""

import os
import pathlib
import selectors
from collections.abc import Callable

from launch import run_files
from launch.errors import UsageError
from launch.screen import Lines, Log, Screen

_CHUNK = 65536  # bytes; what a pipe holds on Linux


class Outputs:
    """The output of all workers of a run.

    Args:
        workdir: the working folder of the run; what is left of a former one is removed.
        num_workers: how many there will be.
        tee: "chief": the screen gets what worker 0 writes, as it writes it; "all": what
            every worker writes, line by line behind its name.

    Raises:
        UsageError: the folder or a log cannot be made.

    Attributes:
        screen: standard output of this process.
        errors: standard error of this process.
    """

    def __init__(self, workdir: pathlib.Path, num_workers: int, tee: str) -> None:
        self.screen = Screen(1)
        self.errors = Screen(2)
        self._tee = tee
        self._logs = _open_logs(workdir, num_workers)
        self._lines: list[Lines] = []
        self._pipes: dict[int, list[_Pipe]] = {}
        self._selector = selectors.DefaultSelector()

    def connect(self, index: int) -> list[int]:
        """Opens the pipes of a worker.

        Returns:
            The ends to write to, which the caller closes: one for output and one for
            errors, or one for both. Two tell them apart on the screen, but their order
            in the log is that in which they come here.
        """
        screens = [self.screen, self.errors] if index == 0 else [self.screen]
        ends = [os.pipe() for _ in screens]
        for (reading, _), screen in zip(ends, screens, strict=True):
            pipe = _Pipe(reading, self._targets(index, screen))
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

    def close(self) -> None:
        """Passes on lines without an end, and closes what is open."""
        for index in list(self._pipes):
            self.finish(index)
        for lines in self._lines:
            lines.close()
        for log in self._logs:
            log.close()
        self._selector.close()

    def _targets(self, index: int, screen: Screen) -> list[Callable[[bytes], None]]:
        targets: list[Callable[[bytes], None]] = [self._logs[index].write]
        if self._tee == "all":
            self._lines.append(Lines(b"[worker %d] " % index, screen.write))
            targets.append(self._lines[-1].write)
        elif index == 0:
            targets.append(screen.write)
        return targets


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
        """Passes on all that is there, and closes the pipe.

        Does not wait for its end: a process that the worker has started and that has
        left its group may hold it open, and even write on.
        """
        for _ in range(16):  # a pipe holds at most a megabyte
            if not self.read():
                break
        os.close(self.file)


def _open_logs(workdir: pathlib.Path, num_workers: int) -> list[Log]:
    try:
        run_files.clear(workdir)
        return [Log(run_files.log(workdir, i)) for i in range(num_workers)]
    except OSError as error:
        raise UsageError(
            f"The working folder cannot be written to ({error.strerror}: "
            f"{error.filename}). Received: --workdir={workdir}. "
            "Give a folder that can; it is made if need be."
        ) from error
