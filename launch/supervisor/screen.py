"""Where the output of workers goes: the screen, raw or line by line, and log files."""

import os
import pathlib
import select
import threading
from collections.abc import Callable
from typing import BinaryIO

_AT_ONCE = 4096  # bytes; small, so that a slow reader shows progress
_MOST_WAITING = 2**24  # bytes
_NOTE = b"\nlaunch: %d bytes were dropped from the screen; the logs have them.\n"


class Screen:
    """Stdout or stderr, or both in one, which somebody may read.

    A thread writes to it, so a reader that is slow or stopped, such as `less` or a
    terminal after Ctrl-S, holds up no worker. Output beyond 16 MiB is dropped with a
    note. After the reader has gone, all is dropped without a note. The logs have
    everything.

    The thread starts with the first write, when the workers have been forked.

    Attributes:
        begun: whether the last line is unfinished.
    """

    def __init__(self, file: int) -> None:
        self.begun = False
        self._file = file
        self._waiting = bytearray()
        self._dropped = 0  # bytes
        self._is_open = True
        self._changed = threading.Condition()  # guards the above
        self._thread = threading.Thread(target=self._write_on, daemon=True)

    def write(self, data: bytes) -> None:
        """Accepts all data without waiting."""
        with self._changed:
            if not data or not self._is_open:
                return
            if self._dropped or len(self._waiting) > _MOST_WAITING:
                self._dropped += len(data)
                return
            self._waiting += data
            self.begun = not data.endswith(b"\n")
            self._changed.notify_all()
        if self._thread.ident is None:
            self._thread.start()

    def flush(self, patience: float) -> bool:
        """Returns whether all is written; gives up after `patience` idle seconds."""
        with self._changed:
            while self._waiting:
                if not self._changed.wait(patience):
                    return False
            return True

    def _write_on(self) -> None:
        while self._is_open:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = bytes(self._waiting[:_AT_ONCE])
            written = self._write(data)
            with self._changed:
                if written is None:
                    self._is_open, self._dropped = False, 0
                    self._waiting.clear()
                else:
                    del self._waiting[:written]
                if self._dropped and not self._waiting:
                    self._waiting += _NOTE % self._dropped
                    self._dropped, self.begun = 0, False
                self._changed.notify_all()

    def _write(self, data: bytes) -> int | None:
        """Returns how many bytes were written; None if writing has failed for good."""
        while True:
            try:
                return os.write(self._file, data)
            except BlockingIOError:  # another program made the terminal non-blocking
                select.select([], [self._file], [])
            except OSError:
                return None


class Lines:
    """Passes on whole lines, each with a prefix.

    A progress bar redraws its line after a carriage return: only its last state passes.
    """

    def __init__(self, prefix: bytes, show: Callable[[bytes], None]) -> None:
        self._prefix = prefix
        self._show = show
        self._begun = b""

    def write(self, data: bytes) -> None:
        """Passes on the lines that end in `data`, and keeps an unfinished one."""
        *lines, begun = (self._begun + data).split(b"\n")
        # Overwritten text is dropped, as an epoch's bar may take megabytes. A carriage
        # return at the very end may yet turn out to be part of a line's end.
        self._begun = begun[begun.rfind(b"\r", 0, len(begun) - 1) + 1 :]
        self._show(b"".join(map(self._line, lines)))

    def close(self) -> None:
        """Passes on a last line that is unfinished."""
        if self._begun:
            self._show(self._line(self._begun))
            self._begun = b""

    def _line(self, line: bytes) -> bytes:
        return self._prefix + line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"


class Log:
    """The log file of a worker's stdout and stderr.

    Args:
        path: the file; an existing one is replaced.
        tell: called with a message if it cannot be written to.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: pathlib.Path, tell: Callable[[bytes], None]) -> None:
        self._path = path
        self._tell = tell
        self._file: BinaryIO | None = path.open("wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Writes all data; if that fails, says so once and drops what follows."""
        while data and self._file is not None:
            try:
                data = data[self._file.write(data) :]
            except OSError as error:
                self._tell(f"launch: {self._path}: {error}; log ends here.\n".encode())
                self.close()

    def close(self) -> None:
        """Closes the file; later output is dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None
