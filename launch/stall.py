"""Ends a worker that makes no progress, and says which worker the others wait for.

A collective whose peer does not come waits for ever and without a word. So a thread of
each worker watches its main thread. It needs no parent and no connection: workers on
many hosts find who is behind in the progress files of their common working folder.
Without a common folder, each still says where it stands itself.
"""

import faulthandler
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from launch import failures, progress
from launch.progress import BETWEEN_STEPS, IN_STEP

__all__ = ["BETWEEN_STEPS", "IN_STEP", "StallError", "Watchdog", "enable_stack_dumps"]

_STDERR = 2  # not sys.stderr, which a library may have replaced
_WRITE_EVERY = 1.0  # seconds, at most: the folder may be on a network
_ALIVE_EVERY = 5.0  # seconds
# The file of TensorFlow through which a pipeline calls a generator or a py_function.
_CALLS_PYTHON = os.path.join("tensorflow", "python", "ops", "script_ops.py")


class StallError(Exception):
    """No progress for too long. It is recorded, never raised: nobody could catch it."""


class _Note(NamedTuple):
    step: int
    phase: str
    entered: int
    time: float  # as time.time() counts


def enable_stack_dumps() -> None:
    """Lets SIGUSR1, and a crash, write the Python stacks of all threads to stderr.

    That works in C, also when the main thread hangs in a native call.
    """
    faulthandler.enable(_STDERR, all_threads=True)
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)


class Watchdog:
    """A thread that ends this process when nothing is noted for too long.

    A context manager: it watches while it is entered. Where this process was itself
    stopped or starved, that time does not count; whoever sees from outside that it does
    not respond is another worker.

    Args:
        workdir: the working folder of the run, common to all workers; None: there is
            none, and nothing is written.
        index: the index of this worker.
        num_workers: how many workers there are.
        timeout: seconds; 0 or None: nothing is watched.
        clock: counts seconds.
        exit: ends the process at once, as a thread in a collective cannot be unwound.
        poll: seconds between two looks.
    """

    def __init__(
        self,
        workdir: pathlib.Path | None,
        index: int,
        num_workers: int,
        timeout: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        exit: Callable[[int], object] = os._exit,
        poll: float = 0.25,
    ) -> None:
        self._workdir = workdir
        self._index = index
        self._num_workers = num_workers
        self._timeout = timeout or 0.0
        self._clock = clock
        self._exit = exit
        self._poll = poll
        self._write_every = min(_WRITE_EVERY, self._timeout / 5)
        self._alive_every = min(_ALIVE_EVERY, self._timeout / 5)
        self._noted = _Note(0, "preparing", 0, time.time())
        self._seen: _Note | None = None
        self._idle = 0.0  # seconds since the last note, without those of being stopped
        self._looked = self._written = clock()
        self._written_note: _Note | None = None
        self._can_write = True
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._looked = self._written = self._clock()
            self.look()  # so that the others know of it from the first
            self._thread = threading.Thread(
                target=self._watch, name="watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def note(self, step: int, phase: str) -> None:
        """Takes note of progress; one assignment, so it costs about a microsecond.

        Args:
            step: the first step of the execution that begins, counted from 1, if the
                phase is "in a step"; otherwise the last step that is finished, or 0.
            phase: "in a step", "between steps", "preparing", "evaluating", "saving" ...
        """
        entered = self._noted.entered + (phase == IN_STEP)
        self._noted = _Note(step, phase, entered, time.time())

    def look(self) -> None:
        """What the thread does again and again: writes, and ends a stalled process."""
        now, noted = self._clock(), self._noted
        # A long time since the last look is one in which this process did not run.
        passed = min(now - self._looked, self._poll + 1.0)
        self._looked = now
        self._idle = self._idle + passed if noted is self._seen else 0.0
        self._seen = noted
        self._write_if_due(now, noted)
        if self._idle >= self._timeout:
            self._end(noted)

    def _watch(self) -> None:
        while not self._over.wait(self._poll):
            self.look()

    def _write_if_due(self, now: float, noted: _Note) -> None:
        changed = noted is not self._written_note
        wait = self._write_every if changed else self._alive_every
        first = self._written_note is None
        if self._workdir is None or not (first or now - self._written >= wait):
            return
        self._written, self._written_note = now, noted
        try:
            progress.write(self._workdir, self._progress(noted))
            self._can_write = True
        except OSError as error:
            if self._can_write:  # said once until it works again
                print(f"launch: no progress is kept: {error}", file=sys.stderr)
            self._can_write = False

    def _progress(self, noted: _Note) -> progress.Progress:
        return progress.Progress(
            worker=self._index,
            step=noted.step,
            phase=noted.phase,
            entered=noted.entered,
            time=noted.time,
            alive=time.time(),
            pid=os.getpid(),
            host=socket.gethostname(),
            reading=_makes_data(),
        )

    def _end(self, noted: _Note) -> None:
        """Writes the stacks, records why, and ends the process."""
        try:
            faulthandler.dump_traceback(_STDERR, all_threads=True)
            error = StallError(self._message(noted))
            if self._workdir is not None:
                failures.record(self._workdir, self._index, error, 1)
            print(f"launch: {error}", file=sys.stderr, flush=True)
        except Exception:  # it ends in any case
            traceback.print_exc()
        self._exit(1)

    def _message(self, noted: _Note) -> str:
        found = {self._index: self._progress(noted)}
        others = set(range(self._num_workers)) - set(found)
        if self._workdir is not None:
            for i in others:
                theirs = progress.read(self._workdir, i)
                if theirs is not None:
                    found[i] = theirs
        where = progress.explain(found, self._num_workers, self._timeout / 2)
        return (
            f"No progress for {self._timeout:g} s. Received: {where}. "
            f"See the stacks in {self._workdir or '.'}/logs/worker-*.log: "
            "a callback, the data or a native call may hang."
        )


def _makes_data() -> bool:
    """Whether Python code that makes data runs: TensorFlow calls it in its own threads.

    Where every pipeline has filled its buffers, the one that still runs is the one that
    the others wait for.
    """
    main = threading.main_thread().ident
    frames = [f for ident, f in sys._current_frames().items() if ident != main]
    return any(
        frame.f_code.co_filename.endswith(_CALLS_PYTHON)
        for innermost in frames
        for frame, _ in traceback.walk_stack(innermost)
    )
