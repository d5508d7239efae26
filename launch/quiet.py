"""Keeps the banners of TensorFlow off the screen; imports none of it.

Whoever sets TF_CPP_MIN_LOG_LEVEL gets everything that TensorFlow says at that level.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# Informational lines of TensorFlow's C++ code, and the header that comes before them.
_BANNER = re.compile(r"I\d{4} |WARNING: All log messages before absl::InitializeLog")


@contextlib.contextmanager
def tensorflow_import() -> Iterator[None]:
    """Surrounds the first import of TensorFlow.

    Sets its log levels, and holds back what is written to stderr meanwhile: the library
    greets before it looks at its log level. What is no banner is passed on afterwards,
    and all of it when the import fails.
    """
    if _LEVEL in os.environ:
        yield
        return
    os.environ[_LEVEL] = "3"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with _held_stderr() as lines:
        yield
    sys.stderr.writelines(line for line in lines if not _BANNER.match(line))


@contextlib.contextmanager
def _held_stderr() -> Iterator[list[str]]:
    """Sends stderr to a file; when it ends, the list that it yields has the lines."""
    sys.stderr.flush()
    lines: list[str] = []
    screen = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield lines
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            held.seek(0)
            lines += held
            if failed:
                sys.stderr.writelines(lines)
