"""Ends a worker that makes no progress, and reports which worker held up the others.

A collective whose peer is missing waits forever without a word. So a thread of each
worker watches its main thread. It needs no parent and no connection: workers on several
hosts find out who is behind from the progress files in their shared working folder.
Without a shared folder, each still reports its own progress. The folder may hang, too,
so the thread that watches leaves files to another one.
"""

import contextlib
import faulthandler
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

from launch import run_files
from launch.supervisor import root_cause
from launch.watchdog import forced_exit, progress
from launch.watchdog.progress import BETWEEN_STEPS, IN_STEP, STAGES

__all__ = ["BETWEEN_STEPS", "IN_STEP", "StallError", "Watchdog", "enable_stack_dumps"]

TIMEOUT = 1800.0  # seconds, by default
_STDERR = 2  # not sys.stderr, which a library may have replaced
_WRITE_EVERY = 1.0  # seconds; not more often: the folder may be on a network
_ALIVE_EVERY = 5.0  # seconds
_FOLDER_ANSWERS = 3.0  # seconds, after which it counts as hung
_CLOCKS_DIFFER = 10.0  # seconds, at most, between two hosts
_LATER_IN_C = 30.0  # seconds; the watchdog, which says why, comes first
# The file of TensorFlow through which input pipelines call generators and py_functions.
_CALLS_PYTHON = os.path.join("tensorflow", "python", "ops", "script_ops.py")


class StallError(Exception):
    """No progress for too long. Recorded but never raised: nothing could catch it."""


class _Note(NamedTuple):
    step: int
    phase: str
    entered: int
    time: float  # of time.time()


def enable_stack_dumps() -> None:
    """Makes SIGUSR2 and crashes dump the Python stacks of all threads to stderr.

    C code does that, so it works even if the main thread hangs in a native call.
    """
    stderr = os.dup(_STDERR)  # quiet.py replaces it for a while
    faulthandler.enable(stderr, all_threads=True)
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR2, stderr, all_threads=True)


class Watchdog:
    """Ends this process if no progress is noted for too long.

    A context manager: within it, threads watch this worker and write its progress. Time
    in which this process was stopped or starved does not count; the other workers
    report that it does not respond.

    Args:
        workdir: the working folder of the run, shared by all workers; None: nothing is
            written. Files older than this watchdog count as an earlier run's.
        index: the index of this worker.
        num_workers: how many workers there are.
        timeout: seconds; 0 or None: no watchdog.
        clock: returns the time in seconds.
        exit: ends the process at once, as a thread in a collective cannot be unwound.
        poll: seconds between two checks.
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
        self._made = time.time()
        self._seen: _Note | None = None
        self._idle = 0.0  # seconds since the last note, excluding time stopped
        self._looked = self._written = clock()
        self._written_note: _Note | None = None
        self._can_write = True
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            # So that the others know of this worker from the start.
            forced_exit.within(_FOLDER_ANSWERS, self.write)
            self._looked = self._clock()
            self._start("watchdog", self.look)
            self._start("progress", self.write)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(1.0)  # not forever: the folder may hang

    @contextlib.contextmanager
    def in_native_call(self) -> Iterator[None]:
        """Watches a call that holds Python's global interpreter lock (GIL).

        Only C code can end that: it dumps the stacks, but reports and records nothing.
        """
        if self._timeout:
            seconds = self._timeout + _LATER_IN_C
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def note(self, step: int, phase: str) -> None:
        """Notes progress; a single assignment, so it takes about a microsecond.

        Args:
            step: if the phase is "in a step", the first step of the execution that
                begins, from 1; otherwise the last finished step, or 0.
            phase: "in a step", "between steps", "preparing", "evaluating", "saving" ...
        """
        entered = self._noted.entered + (phase in STAGES)
        self._noted = _Note(step, phase, entered, time.time())

    @property
    def step(self) -> int:
        """The step that was noted last."""
        return self._noted.step

    def look(self) -> None:
        """Ends the process if it has stalled; one thread calls this repeatedly."""
        now, noted = self._clock(), self._noted
        # A long gap since the last check is time in which this process did not run.
        passed = min(now - self._looked, self._poll + 1.0)
        self._looked = now
        self._idle = self._idle + passed if noted is self._seen else 0.0
        self._seen = noted
        if self._idle >= self._timeout:
            # The report goes to the folder and to stderr, which may both hang.
            forced_exit.at_once(1, lambda: self._say_why(noted), exit=self._exit)

    def write(self) -> None:
        """Writes this worker's progress; the other thread calls this repeatedly."""
        now, noted = self._clock(), self._noted
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
            if self._can_write:  # reported once until it works again
                print(f"launch: cannot write progress: {error}", file=sys.stderr)
            self._can_write = False

    def _start(self, name: str, do: Callable[[], None]) -> None:
        def again_and_again() -> None:
            while not self._over.wait(self._poll):
                do()

        thread = threading.Thread(target=again_and_again, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

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

    def _say_why(self, noted: _Note) -> None:
        """Dumps the stacks, and reports and records why this worker ends."""
        with open(_STDERR, "wb", closefd=False) as stderr:
            stderr.write(_stacks())
        # The supervisor resumes a stopped worker once one has recorded the stall: what
        # the others see from then on is no longer what it was.
        if forced_exit.within(_FOLDER_ANSWERS, self._is_told_of):
            return
        error = StallError(self._message(noted))
        print(f"launch: {error}", file=sys.stderr, flush=True)
        if self._workdir is not None:
            root_cause.record(self._workdir, self._index, error, 1, noted.step)

    def _message(self, noted: _Note) -> str:
        own, alone = self._progress(noted), self._num_workers == 1
        others = forced_exit.within(_FOLDER_ANSWERS, self._places_of_others)
        if alone:
            where = f"{own}{', making its data' * own.reading}"
        elif others is None:
            where = progress.explain({self._index: own}, 1, 0.0)
            where += f"; the folder {self._workdir} does not respond"
        else:
            found = {**others, self._index: own}
            where = progress.explain(found, self._num_workers, self._timeout / 2)
        may = (
            "workers may start late, have ended for good, or not reach each other"
            if own.joins
            else "a callback, the data or a native call may hang"
        )
        return (
            f"No progress for {self._timeout:g} s. Received: {where}. "
            f"See the stacks in {_where_stacks_are(alone)}: {may}."
        )

    def _is_told_of(self) -> bool:
        """Whether the supervisor of this host reports what another worker has seen."""
        if self._workdir is None or run_files.LOG_VARIABLE not in os.environ:
            return False
        others = set(range(self._num_workers)) - {self._index}
        found = [root_cause.read(self._workdir, i) for i in others]
        return any(
            f is not None and f.type == "StallError" and f.time > self._made
            for f in found
        )

    def _places_of_others(self) -> dict[int, progress.Progress]:
        if self._workdir is None:
            return {}
        others = set(range(self._num_workers)) - {self._index}
        found = {i: progress.read(self._workdir, i) for i in others}
        oldest = self._made - _CLOCKS_DIFFER
        return {i: p for i, p in found.items() if p is not None and p.alive > oldest}


def _where_stacks_are(alone: bool) -> str:
    log = os.environ.get(run_files.LOG_VARIABLE)
    if log is None:
        return "stderr" if alone else "each worker's stderr"
    return log if alone else str(pathlib.Path(log).parent / "worker-*.log")


def _stacks() -> bytes:
    """Returns the Python stacks of all threads.

    They go through a file: faulthandler holds the GIL while it writes, and stderr may
    be a pipe that nobody reads.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _makes_data() -> bool:
    """Whether Python code of the input pipeline runs, in a thread of TensorFlow.

    Once all other pipelines have filled their buffers, the one that still runs is the
    one that the others wait for.
    """
    main = threading.main_thread().ident
    frames = [f for ident, f in sys._current_frames().items() if ident != main]
    return any(
        frame.f_code.co_filename.endswith(_CALLS_PYTHON)
        for innermost in frames
        for frame, _ in traceback.walk_stack(innermost)
    )
