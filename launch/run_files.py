"""The files that the workers of a run write: `<workdir>/logs/worker-<i>.*`.

Each file is written by one process. The JSON files are written atomically, so another
process, possibly on another host, can read them at any time.
"""

import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

# The path of the worker's log, set in workers that the supervisor starts. The output of
# other workers goes wherever their own launcher sends it.
LOG_VARIABLE = "DISTFIT_WORKER_LOG"
# What the supervisor tells workers that it starts again, of each start before: when it
# began, when it failed and when all workers had ended.
RESTART_VARIABLE = "DISTFIT_RESTART"
RUN_VARIABLE = "DISTFIT_RUN"  # The same in all starts by one supervisor.
FOLDER = "logs"
_KINDS = ("log", "error.json", "progress.json", "saved.json")


def log(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """The stdout and stderr of worker `index`."""
    return workdir / FOLDER / f"worker-{index}.log"


def error(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """The exception that ended worker `index`."""
    return workdir / FOLDER / f"worker-{index}.error.json"


def progress(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """The progress of worker `index`."""
    return workdir / FOLDER / f"worker-{index}.progress.json"


def note_saved(step: int) -> None:
    """Tells the supervisor, if there is one, the step of the latest checkpoint.

    Without this file, a failure counts as one more in a row: no reason to fail.
    """
    if log := os.environ.get(LOG_VARIABLE):
        with contextlib.suppress(OSError):
            write_json(pathlib.Path(log).with_suffix(".saved.json"), {"step": step})


def latest_saved(workdir: pathlib.Path, indices: Iterable[int]) -> int:
    """The step of the latest checkpoint that these workers know of, or 0."""
    found = (read_json(log(workdir, i).with_suffix(".saved.json")) for i in indices)
    return max((each.get("step", 0) for each in found if each is not None), default=0)


def clear(workdir: pathlib.Path, who: str = "*") -> None:
    """Makes the folder, and removes the files that an earlier run's workers left there.

    Args:
        workdir: the working folder.
        who: the index of the worker, or a pattern of such.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for kind in _KINDS:
        for path in folder.glob(f"worker-{who}.{kind}"):
            path.unlink(missing_ok=True)


def clear_worker(workdir: pathlib.Path, index: int) -> None:
    """Removes the files that worker `index` of an earlier run left for other workers.

    If that fails, so will writing, and the worker reports that when it tries.
    """
    for path in (error(workdir, index), progress(workdir, index)):
        with contextlib.suppress(OSError):
            path.unlink()


def write_json(
    path: pathlib.Path, content: Mapping[str, Any], *, lasts: bool = True
) -> None:
    """Writes a file atomically, replacing any existing one.

    Args:
        path: the file.
        content: what it will hold.
        lasts: whether it must be there after a crash of the host, which takes a while.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(content) + "\n", lasts=lasts)


def write_text(path: pathlib.Path, text: str, *, lasts: bool = True) -> None:
    """As `write_json`, for text.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two threads of a worker may write the same file.
    draft = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        draft.write_text(text)
        if lasts:
            replace(draft, path)
        else:
            os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to report
            draft.unlink(missing_ok=True)
        raise


def replace(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a file of the same folder, so that either is on the disk as a whole.

    Raises:
        OSError: that is not possible.
    """
    _sync(draft)
    os.replace(draft, path)
    _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of a file; None if it is missing or malformed."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
