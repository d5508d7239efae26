"""Where the output of workers goes: the screen, as it is or line by line, and logs."""

import os
import pathlib
import select
import sys
from collections.abc import Callable
from typing import BinaryIO

_KEPT = 65536  # bytes of what was shown


class Screen:
    """Standard output or error of this process, written without a buffer.

    When it cannot be written any more (its reader has gone), what comes is dropped:
    the logs have it, and the run goes on.

    Attributes:
        shown: the last of what was written.
    """

    def __init__(self, file: int) -> None:
        self.shown = b""
        self._file = file
        self._open = True

    def mute(self) -> None:
        """Drops what comes from now on."""
        self._open = False

    def write(self, data: bytes) -> None:
        """Writes all of it, and waits where the screen is slow."""
        if self._open:
            self.shown = (self.shown + data)[-_KEPT:]
        while data and self._open:
            try:
                data = data[os.write(self._file, data) :]
            except BlockingIOError:  # another program has made the terminal so
                select.select([], [self._file], [], 1.0)
            except OSError:
                self._open = False


class Lines:
    """Passes whole lines on, each behind a prefix.

    A progress bar redraws its line behind a carriage return: its last state is passed.
    """

    def __init__(self, prefix: bytes, show: Callable[[bytes], None]) -> None:
        self._prefix = prefix
        self._show = show
        self._begun = b""

    def write(self, data: bytes) -> None:
        """Passes the lines on that end in `data`, and keeps what has begun."""
        *lines, begun = (self._begun + data).split(b"\n")
        # What is drawn over is let go, as an epoch's bar may take megabytes. A return
        # at the very end may yet turn out to be a line's end.
        self._begun = begun[begun.rfind(b"\r", 0, len(begun) - 1) + 1 :]
        self._show(b"".join(map(self._line, lines)))

    def close(self) -> None:
        """Passes a last line on that has no end."""
        if self._begun:
            self._show(self._line(self._begun))
            self._begun = b""

    def _line(self, line: bytes) -> bytes:
        return self._prefix + line.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"


class Log:
    """The file with what a worker has written, to standard output and error."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file: BinaryIO | None = path.open("wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Writes all of it; says so once if that cannot be done, and goes on."""
        while data and self._file is not None:
            try:
                data = data[self._file.write(data) :]
            except OSError as error:
                print(f"launch: {self._path}: {error}; it ends here.", file=sys.stderr)
                self.close()

    def close(self) -> None:
        """Closes the file; what comes later is dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None
