"""Keeps TensorFlow's banners off the screen, without importing it.

If TF_CPP_MIN_LOG_LEVEL is set, it alone decides what is shown.
"""

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# INFO lines of TensorFlow's C++ code, and the header that comes before them.
_BANNER = re.compile(r"I\d{4} |WARNING: All log messages before absl::InitializeLog")
# Writes lines that match its argument to stdout, and all others to stderr.
_FILTER = """
import re, sys
for line in sys.stdin.buffer:
    matches = re.match(sys.argv[1].encode(), line)
    file = (sys.stdout if matches else sys.stderr).buffer
    file.write(line)
    file.flush()
"""


@contextlib.contextmanager
def tensorflow_import() -> Iterator[None]:
    """Wraps the first import of TensorFlow.

    Sets its log levels, and holds back the banners that it writes to stderr before it
    reads its log level. They are shown if the import fails. Other lines are shown at
    once.
    """
    if _LEVEL in os.environ:
        yield
        return
    os.environ[_LEVEL] = "3"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # In a container, when process 1 ends, so do all others, including the filter.
    if sys.stderr is None or os.getpid() == 1:
        yield
    else:
        with _without_banners():
            yield


@contextlib.contextmanager
def _without_banners() -> Iterator[None]:
    """Sends stderr through a filter.

    The filter is a process, as a thread would not survive a crash in C, which is when
    the last lines matter. It has its own session, so that signals to this one spare it.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with tempfile.TemporaryFile() as banners:
        command = [sys.executable, "-I", "-S", "-c", _FILTER, _BANNER.pattern]
        reading, writing = os.pipe()
        filtering = subprocess.Popen(
            command, stdin=reading, stdout=banners, start_new_session=True
        )
        os.dup2(writing, 2)
        os.close(reading)
        os.close(writing)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)  # closes the pipe, which ends the filter
            os.close(screen)
            filtering.wait()
            if failed:
                banners.seek(0)
                sys.stderr.write(banners.read().decode(errors="replace"))
