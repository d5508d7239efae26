"""Runs several workers on this host: starts them, watches them, ends them together.

Each worker gets the same arguments, TF_CONFIG with the addresses of all and its own
index, its share of the cores and GPUs, the path of its log, and PYTHONUNBUFFERED,
without which its output would come late and, if it is killed, not at all. The workers
answer by their output and by files, see run_files.py. This process never imports
TensorFlow.

How a run ends:

- All workers exit with 0: so does this process. One that finishes early does not stop
  the others.
- One fails: it exits with another code, dies by a signal, or records its error and
  hangs. The others get SIGTERM, and SIGKILL after `GRACE`, as a collective that waits
  for a dead peer may wait forever. The root cause is printed last.
- One stops making progress: the workers' watchdogs detect that (stall.py). The others
  dump their stacks to their logs before they end.
- SIGINT (Ctrl-C): the workers get it too, and have `stop_timeout` to save; a second one
  kills them at once. Exit code 130.
- SIGTERM or SIGHUP: the workers get SIGTERM, and have as long. Exit code 143, or that
  of a worker that failed to save. SIGUSR1, which Slurm can send some time before, has
  no such limit.
- This process is killed: processes.py makes sure that no worker is left.

A signal that was ignored at startup, as by nohup, stays ignored. A screen that nobody
reads prevents none of this.
"""

import collections
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from launch import run_files
from launch.cluster import hardware, local
from launch.supervisor import failure_report, out_of_memory, root_cause
from launch.supervisor.output import Outputs
from launch.supervisor.processes import Guard, Process
from launch.supervisor.restarts import Restarts
from launch.watchdog import signals

GRACE = 3.0  # seconds from SIGTERM to SIGKILL once a worker has failed
SETTLE = 1.0  # seconds to wait for the cause of a failure that may follow from it
STACKS = 0.5  # seconds that workers have to dump their stacks
_POLL = 0.05  # seconds
_TOLD = 1000  # failures, at most, as a variable of the environment has 128 KiB

_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM
_SAVED = (0, _INTERRUPTED, _TERMINATED)  # exit codes of workers that could save


def run(
    arguments: Sequence[str],
    *,
    num_workers: int | None,
    workdir: pathlib.Path,
    index: int | None = None,
    tee: str = "chief",
    max_restarts: int = 0,
    stop_timeout: float = signals.SAVING,
    command: Sequence[str] | None = None,
) -> int:
    """Runs `command` with `arguments` once for each worker, until all have ended.

    Call it from the main thread of a process that has no other.

    Args:
        arguments: the command line that workers and this process share.
        num_workers: how many workers to start as a cluster on this host; None for one
            process with the environment of this one, alone or a worker of a cluster.
        workdir: their logs go to its folder `logs`.
        index: the index of that one process in its cluster, or None.
        tee: "chief" shows the output of the first worker as it is; "all" that of every
            worker, line by line, each prefixed with its worker.
        max_restarts: how often to start all again in a row, see restarts.py.
        stop_timeout: how many seconds the workers have to save after a signal.
        command: what to run, by default `python -m launch`.

    Returns:
        The exit code for this process.

    Raises:
        UsageError: the working folder or the GPUs are unsuitable; nothing was started.
    """
    command = [*(command or (sys.executable, "-m", "launch")), *arguments]
    if sys.stdout is not None:  # closed by `>&-`
        sys.stdout.flush()
    restarts = Restarts(max_restarts)
    more = {
        run_files.RUN_VARIABLE: f"{socket.gethostname()} {os.getpid()} {time.time()}"
    }
    failures: collections.deque[tuple[float, ...]] = collections.deque(maxlen=_TOLD)
    received: list[int] = []
    # A group has a handler of its own. This one is for what comes between two of them.
    with _handlers(lambda number, _: received.append(number)):
        while True:
            began = time.time()
            group = _run_once(
                command, num_workers, workdir, index, tee, more, received, stop_timeout
            )
            code, cause = group.tell()
            if cause is None:
                return code
            pause = restarts.after(cause, group.latest_saved)
            if pause is None:
                if restarts.reason:
                    group.say(f"launch: not started again: {restarts.reason}\n")
                return code
            failures.append((began, cause.began, time.time()))
            more[run_files.RESTART_VARIABLE] = json.dumps([*failures])
            group.say(f"launch: starting again in {pause:g} s: {restarts.reason}\n")
            _wait(pause, received)
            if received:
                return group.tell_of_signal(received[0])


def _run_once(
    command: Sequence[str],
    num_workers: int | None,
    workdir: pathlib.Path,
    index: int | None,
    tee: str,
    more: Mapping[str, str],
    received: list[int],
    stop_timeout: float,
) -> "_Group":
    """Starts the workers, and returns when all have ended."""
    if num_workers is None:
        indices: Sequence[int] = [index or 0]
        shares = [hardware.Share((), None)]
        environments = [{**os.environ, "PYTHONUNBUFFERED": "1"}]
    else:
        indices = range(num_workers)
        shares = hardware.divide(num_workers)
        environments = local.environments(shares)
    outputs = Outputs(workdir, indices, tee)
    alone = num_workers is None and index is None
    with _Group(workdir, outputs, received, alone, stop_timeout) as group:
        for each, share, environment in zip(indices, shares, environments, strict=True):
            log = run_files.log(workdir, each).absolute()
            environment |= {run_files.LOG_VARIABLE: str(log), **more}
            group.start(each, [*command], environment, share.cores)
        group.watch()
    return group


def _wait(seconds: float, received: Sequence[int]) -> None:
    """Returns after so many seconds, or as soon as a signal has been received."""
    end = time.monotonic() + seconds
    while not received and time.monotonic() < end:
        time.sleep(_POLL)


class _Group:
    """The workers, and the plan to end them.

    Args:
        workdir: their working folder.
        outputs: what passes on their output.
        received: the signals to this process, to which the group adds.
        alone: whether it is one process, which is no worker.
        stop_timeout: how many seconds the workers have to save after a signal.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        outputs: Outputs,
        received: list[int],
        alone: bool,
        stop_timeout: float,
    ) -> None:
        self._workdir = workdir
        self._stop_timeout = stop_timeout
        self._outputs = outputs
        self._processes: list[Process] = []
        self._ends: list[root_cause.End] = []
        self._received = received
        self._alone = alone
        self._first_received = 0.0
        self._silent: list[str] = []  # workers that the others may have lost
        self._answered: int | None = None  # the signal that ends the group
        self._failing_since: float | None = None
        # When to send which signal to the workers that are left, once the group ends.
        self._plan: collections.deque[tuple[float, int]] | None = None
        self._memory_kills = out_of_memory.kills()
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "_Group":
        self._cleanup.callback(self._outputs.close)
        self._guard = self._cleanup.enter_context(contextlib.closing(Guard()))
        self._cleanup.enter_context(_handlers(self._receive))
        self._cleanup.callback(self._kill_and_wait)
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves no worker running, whatever has happened."""
        self._cleanup.close()

    def start(
        self,
        index: int,
        command: list[str],
        environment: dict[str, str],
        cores: tuple[int, ...],
    ) -> None:
        """Starts a worker, unless a termination signal has already arrived."""
        if self._received:
            return
        writing = self._outputs.connect(index)
        try:
            process = Process(index, command, environment, cores, writing)
        finally:
            for file in writing:
                os.close(file)
        self._processes.append(process)
        self._guard.watch(self._processes)

    def watch(self) -> None:
        """Returns when all workers have ended, by themselves or as planned."""
        while self._running():
            self._outputs.read(_POLL)
            for process in self._running():
                if process.poll():
                    self._note_end(process)
            self._decide()
            while self._plan and self._plan[0][0] <= time.monotonic():
                self._send(self._plan.popleft()[1])
        # After success, wait for a slow screen; a failure waits for no screen.
        while not self._received and all(end.code == 0 for end in self._ends):
            if self._outputs.flush(_POLL):
                break

    def tell(self) -> tuple[int, root_cause.End | None]:
        """Prints why the run ended, as the last lines.

        Returns:
            The exit code; and the root cause, if it was a failure, not a signal.
        """
        if not self._ends:  # a signal came before any worker started
            self._answered = next(iter(self._received), None)
        if self._answered == signal.SIGINT:
            return self.tell_of_signal(self._answered), None
        if self._answered is None:
            cause = root_cause.root_cause(self._ends)
        else:
            cause = root_cause.failed_to_save(self._ends)
        if cause is not None:
            self.say(self._report(cause))
            return cause.exit_code, None if self._answered else cause
        if self._answered is not None:
            return self.tell_of_signal(self._answered), None
        return 0, None

    def tell_of_signal(self, number: int) -> int:
        """Prints that a signal ended the run, and returns the exit code."""
        is_interrupt = number == signal.SIGINT
        self.say(f"launch: {'interrupted' if is_interrupt else 'terminated'}\n")
        return _INTERRUPTED if is_interrupt else _TERMINATED

    @property
    def latest_saved(self) -> int:
        """The step of the latest checkpoint that its workers knew of, or 0."""
        workers = (end.worker for end in self._ends)
        return run_files.latest_saved(self._workdir, workers)

    def say(self, text: str) -> None:
        """Prints whole lines to stderr."""
        self._outputs.say(text)

    def _running(self) -> list[Process]:
        return [process for process in self._processes if process.code is None]

    def _note_end(self, process: Process) -> None:
        self._outputs.finish(process.index)
        self._guard.watch(self._processes)
        code = 0 if process.code is None else process.code
        failure = root_cause.read(self._workdir, process.index)
        self._ends.append(
            root_cause.End(process.index, code, process.ended, process.asked, failure)
        )

    def _decide(self) -> None:
        """Plans the end of the group as soon as there is a reason for it."""
        if self._plan is None:
            if self._received:
                self._answer(self._received[0])
            elif self._is_failing():
                self._fail()
        elif any(end.code not in _SAVED for end in self._ends):
            # The workers that are left cannot save any more: that takes all of them.
            latest = time.monotonic() + GRACE
            moved = [(min(due, latest), number) for due, number in self._plan]
            self._plan = collections.deque(moved)

    def _answer(self, number: int) -> None:
        self._answered = number
        if number == signal.SIGINT:
            self._outputs.mute_errors()  # each would report the interrupt
        passed_on = signal.SIGTERM if number == signal.SIGHUP else number
        limit = signals.time_to_save(number, self._stop_timeout)
        self._schedule((0.0, passed_on), (limit, signal.SIGKILL))

    def _fail(self) -> None:
        if self._has_stalled():
            self._schedule(
                (0.0, signal.SIGUSR2),  # see stall.enable_stack_dumps
                (STACKS, signal.SIGTERM),
                (STACKS + GRACE, signal.SIGKILL),
            )
            return
        self._silent = [
            f"worker {process.index}{' (stopped)' * process.is_stopped}"
            for process in self._running()
            if root_cause.read(self._workdir, process.index) is None
        ]
        cause = root_cause.root_cause(self._ends)
        preempted = cause is not None and cause.exit_code == _TERMINATED
        grace = self._stop_timeout if preempted else GRACE  # The others save as well.
        self._schedule((0.0, signal.SIGTERM), (grace, signal.SIGKILL))

    def _schedule(self, *steps: tuple[float, int]) -> None:
        now = time.monotonic()
        self._plan = collections.deque((now + delay, number) for delay, number in steps)

    def _is_failing(self) -> bool:
        """Whether a worker has failed, and the cause has had time to show."""
        if any(end.code != 0 and end.is_own for end in self._ends):
            return True
        recorded = any(
            run_files.error(self._workdir, process.index).exists()
            for process in self._running()
        )
        if not recorded and all(end.code == 0 for end in self._ends):
            return False
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        return now - self._failing_since >= SETTLE

    def _has_stalled(self) -> bool:
        found = [root_cause.read(self._workdir, p.index) for p in self._processes]
        return any(f is not None and f.type == "StallError" for f in found)

    def _send(self, number: int) -> None:
        for process in self._running():
            process.send(number)

    def _kill_and_wait(self) -> None:
        self._send(signal.SIGKILL)
        for process in self._running():
            process.wait()

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._received and now - self._first_received < signals.SAME_SIGNAL:
            return
        self._first_received = self._first_received or now
        self._received.append(number)
        if len(self._received) > 1:
            self._send(signal.SIGKILL)

    def _report(self, cause: root_cause.End) -> str:
        before, after = self._memory_kills, out_of_memory.kills()
        return failure_report.text(
            cause,
            self._workdir,
            shown=self._outputs.shown.decode(errors="replace"),
            silent=self._silent,
            alone=self._alone,
            out_of_memory=before is not None and after is not None and after > before,
        )


@contextlib.contextmanager
def _handlers(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Sends external signals to `handler`, except those that are ignored."""
    former = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            former[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in former.items():
            signal.signal(number, earlier)
