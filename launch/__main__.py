"""python -m launch [train|evaluate|verify] --flag=value ...: `train` is the default.

This process is a worker of the cluster that cluster/discovery.py finds. Without a
cluster it does all the work itself, or, with --num_workers, starts and supervises
workers without importing TensorFlow.

Exit codes: 0 success; 1 training failed, or `verify` found differences; 2 invalid
input, nothing was trained; 130 interrupted; 143 terminated (SIGTERM).
"""

import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import ml_collections

from launch import messages, run_files
from launch.cluster import discovery
from launch.cluster.discovery import Cluster
from launch.errors import RunError, UsageError
from launch.run import quiet
from launch.settings import checks, configuration, flags
from launch.settings.flags import CommandLine
from launch.supervisor import root_cause
from launch.supervisor.output import open_standard_files, outlast_readers
from launch.watchdog import signals, stall
from launch.watchdog.watch import Watch

_BEGAN = time.time()

Record = Callable[[BaseException], None]


def main(arguments: Sequence[str]) -> int:
    """Runs a command line and returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(flags.help_text())
        return 0
    try:
        return _run(arguments)
    except (UsageError, RunError, FloatingPointError) as error:
        return _fail(_code(error), str(error))
    except KeyboardInterrupt as error:
        return _fail(_code(error), "interrupted")
    except SystemExit as end:  # a signal, or sys.exit() in user code
        if end.code == _code(KeyboardInterrupt()):  # it has saved first
            return _fail(_code(end), "interrupted")
        if isinstance(end.code, int | None):
            return _code(end)
        return _fail(_code(end), str(end.code))
    except Exception as error:
        if root_cause.has_peers() and (lost := root_cause.lost_peer(error)):
            return _fail(_code(error), f"another worker is gone ({lost})")
        traceback.print_exc()
        what = messages.line(messages.cause(error), messages.place(error))
        return _fail(_code(error), f"failed with {type(error).__name__}: {what}")


def _run(arguments: Sequence[str]) -> int:
    # User modules are looked up in the folder where the command is started.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    command_line = flags.parse(arguments)
    config = configuration.preview(command_line)
    found = _find_cluster(command_line, config)
    is_supervised = run_files.LOG_VARIABLE in os.environ
    if not is_supervised and (
        (found is None and "num_workers" in command_line.cluster)
        or command_line.cluster.get("max_restarts")
    ):
        return _supervise(arguments, command_line, config, found)
    if found is not None and found.evaluator:
        print("Workers evaluate the validation data: nothing to do for an evaluator.")
        return 0
    return _join(found, command_line, config)


def _find_cluster(
    command_line: CommandLine, config: ml_collections.ConfigDict
) -> Cluster | None:
    if command_line.command == "verify":  # it makes its own replicas in one process
        return None
    given = command_line.cluster
    found = discovery.discover(
        os.environ,
        workers=given.get("workers"),
        worker_index=given.get("worker_index"),
        num_workers=given.get("num_workers"),
    )
    checks.check_cluster(config, found, given.get("num_workers"))
    return found


def _supervise(
    arguments: Sequence[str],
    command_line: CommandLine,
    config: ml_collections.ConfigDict,
    found: Cluster | None,
) -> int:
    """Starts the workers of this host, or this one process, and starts them again."""
    from launch.supervisor import supervisor

    given = command_line.cluster
    return supervisor.run(
        arguments,
        num_workers=given.get("num_workers") if found is None else None,
        index=found.index if found is not None else None,
        workdir=pathlib.Path(config.workdir),
        tee=given.get("tee", flags.TEES[0]),
        max_restarts=given.get("max_restarts", 0),
        stop_timeout=_stop_timeout(command_line),
    )


def _join(
    found: Cluster | None, command_line: CommandLine, config: ml_collections.ConfigDict
) -> int:
    """Does the work of this process, alone or as one worker of a cluster."""
    index = found.index if found is not None else 0
    num_workers = found.num_workers if found is not None else 1
    timeout = _stall_timeout(num_workers, command_line)
    if found is not None or timeout:
        stall.enable_stack_dumps()
    if num_workers == 1 and run_files.LOG_VARIABLE not in os.environ:
        # Nobody reads what a process that nobody looks after would write.
        watchdog = stall.Watchdog(None, index, num_workers, timeout)
        return _work(command_line, config, found, watchdog, _unrecorded)
    workdir = pathlib.Path(config.workdir)
    run_files.clear_worker(workdir, index)
    watchdog = stall.Watchdog(workdir, index, num_workers, timeout)
    record = _recorder(workdir, index, watchdog)
    return _work(command_line, config, found, watchdog, record)


def _stall_timeout(num_workers: int, command_line: CommandLine) -> float | None:
    """Returns the seconds without progress that end this process, if any do.

    By default they do not end the only one, which may be in a debugger.
    """
    given = command_line.cluster
    if num_workers > 1 or given.get("max_restarts"):
        return given.get("stall_timeout", stall.TIMEOUT)
    return given.get("stall_timeout")


def _stop_timeout(command_line: CommandLine) -> float:
    """Returns the seconds in which a run saves after a signal."""
    return command_line.cluster.get("stop_timeout", signals.SAVING) or math.inf


def _recorder(workdir: pathlib.Path, index: int, watchdog: stall.Watchdog) -> Record:
    """Returns a function that records what ends this worker, and at which step."""

    def record(error: BaseException) -> None:
        if _code(error) != 0:
            root_cause.record(workdir, index, error, _code(error), watchdog.step)

    return record


def _unrecorded(error: BaseException) -> None:
    """For a process that nobody looks after: what it prints is enough."""


def _work(
    command_line: CommandLine,
    config: ml_collections.ConfigDict,
    found: Cluster | None,
    watchdog: stall.Watchdog,
    record: Record,
) -> int:
    try:
        seconds = _stop_timeout(command_line)
        with signals.raised(record, saving=seconds) as heard:
            if found is not None:
                if found.is_chief:
                    print(found, flush=True)
                discovery.check_reachable(found)
                os.environ.update(found.environment())
            with quiet.tensorflow_import():
                from launch.run import worker
            watch = Watch(watchdog, heard, _BEGAN)
            done = worker.run(command_line, config.model, found, watch)
            return 0 if done else 1
    except BaseException as error:
        record(error)
        raise


def _code(error: BaseException) -> int:
    """Returns the exit code of a process that an error ends."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    return 1


def _fail(code: int, message: str) -> int:
    """Prints one line to stderr, without the colours that Keras adds."""
    line = " ".join(messages.without_colours(message).split())
    print("launch:", line, file=sys.stderr)
    return code


def _exit(code: int) -> None:
    """Exits the process; a failed worker exits without waiting for the others.

    TensorFlow's shutdown would wait for half a minute or more, and so may threads that
    make data.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if closed, as by `>&-`
            stream.flush()
    if code != 0 and "TF_CONFIG" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    open_standard_files()
    outlast_readers()
    _exit(main(sys.argv[1:]))
