"""Where the workers of a run leave what they say: `<workdir>/logs/worker-<i>.*`.

Each file has one writer. The small JSON files appear whole or not at all, so that
another process, maybe on another host, can read them at any time.
"""

import contextlib
import json
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

# Set in workers that the local launcher starts: the path of the log of each. Others
# write where whatever has started them sends it.
LOG_VARIABLE = "DISTFIT_WORKER_LOG"
FOLDER = "logs"
_KINDS = ("log", "error.json", "progress.json")


def log(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """What worker `index` writes to its standard output and error."""
    return workdir / FOLDER / f"worker-{index}.log"


def error(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """The exception that ended worker `index`."""
    return workdir / FOLDER / f"worker-{index}.error.json"


def progress(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """How far worker `index` is."""
    return workdir / FOLDER / f"worker-{index}.progress.json"


def clear(workdir: pathlib.Path) -> None:
    """Makes the folder, and removes what the workers of a former run have left there.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for kind in _KINDS:
        for path in folder.glob(f"worker-*.{kind}"):
            path.unlink(missing_ok=True)


def clear_worker(workdir: pathlib.Path, index: int) -> None:
    """Removes what worker `index` of a former run has left for the other workers.

    Where it cannot, the worker cannot write either, and says so when it tries.
    """
    for path in (error(workdir, index), progress(workdir, index)):
        with contextlib.suppress(OSError):
            path.unlink()


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a file in one move; one that is there is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two threads of a worker may write the same file.
    draft = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        draft.write_text(json.dumps(content) + "\n")
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to report
            draft.unlink(missing_ok=True)
        raise


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns what a file holds, or None: there is none, or it is broken."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
