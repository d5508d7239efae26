"""What an earlier run has left in the working folder, and whether this one goes on."""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from distfit.training import checkpoint
from launch import run_files
from launch.errors import UsageError
from launch.run import metrics_log, saving
from launch.settings import configuration

# Settings that change neither the model nor what it learns from.
_MAY_CHANGE = {
    *("epochs", "workdir", "data_dir", "verbose"),
    *("strategy", "virtual_devices"),  # Another number of replicas: equal to rounding.
    *("checkpoint_every", "keep", "monitor", "mode"),
    *("on_save_error", "on_non_finite"),
}
_LOCK = ".lock"
_ASIDE = f"{run_files.FOLDER}/set-aside.json"
_RUN = run_files.RUN_VARIABLE
# What --fresh moves aside.
_RESULTS: tuple[str, ...] = (
    configuration.FILE,
    metrics_log.FILE,
    saving.MODEL_FILE,
    saving.WEIGHTS_FILE,
    saving.RECORD,
    saving.CHECKPOINTS,
    "samples",
)
# The same without a supervisor, which moves logs, also those of earlier starts.
_LOGS = (f"{run_files.FOLDER}-[0-9]*", f"{run_files.FOLDER}/worker-*.log")


def set_aside(folder: pathlib.Path) -> None:
    """Moves the results of an earlier run to `earlier-1`, or the next free name.

    Raises:
        UsageError: the folder cannot be written to.
    """
    patterns = _RESULTS
    if run_files.LOG_VARIABLE not in os.environ:
        patterns += _LOGS
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    names = (folder / f"earlier-{i}" for i in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    try:
        if found:
            aside.mkdir()
        for path in found:
            moved = aside / path.relative_to(folder)
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)
        # Last: a start that is killed before it leaves the rest to the next one.
        run_files.write_json(folder / _ASIDE, {"run": os.environ.get(_RUN)})
    except OSError as error:
        raise UsageError(
            f"The earlier run cannot be moved aside ({error.strerror}). "
            f"Received: --fresh --workdir={folder}. Give another folder."
        ) from error
    if found:
        print(f"The earlier run is in {aside} now.", flush=True)


def was_set_aside(folder: pathlib.Path) -> bool:
    """Whether an earlier start of this run, by the same supervisor, has done that."""
    done = run_files.read_json(folder / _ASIDE) or {}
    return _RUN in os.environ and done.get("run") == os.environ[_RUN]


def enter(folder: pathlib.Path) -> None:
    """Makes the folder if needed, and locks it.

    Raises:
        UsageError: it cannot be made, or another run is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise configuration.unwritable(folder, error) from error
    lock(folder)


def lock(folder: pathlib.Path) -> None:
    """Keeps other runs out of the working folder until this process ends.

    A folder that is not there yet is not made. Where the file system has no locks
    there is none.

    Raises:
        UsageError: another run is at work there.
    """
    if folder in _held or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        file = _held[folder] = (folder / _LOCK).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            _held.pop(folder).close()
            raise UsageError(
                "Another run is at work in the working folder. "
                f"Received: --workdir={folder}. Wait for its end, or give another one."
            ) from error


_held: dict[pathlib.Path, Any] = {}  # an open file keeps its lock


def check(config: ml_collections.ConfigDict) -> bool:
    """Checks that this run can go on from what there is, if there is anything.

    Returns:
        Whether the earlier run has finished, with as many epochs as this one asks for.

    Raises:
        UsageError: it cannot go on, or would be another run.
    """
    folder = pathlib.Path(config.workdir)
    manifest = _latest_manifest(folder)
    model = saving.trained(folder)
    if manifest is None and model is None:
        return False
    recorded = run_files.read_json(folder / configuration.FILE)
    if recorded is None:
        raise UsageError(
            "The working folder has results of a run without its settings: "
            f"{configuration.FILE} is missing or malformed. Received: "
            f"--workdir={folder}. Give --fresh to start anew, or another --workdir."
        )
    changed = _changed(recorded, config)
    if refused := [text for name, text in changed.items() if name not in _MAY_CHANGE]:
        raise UsageError(
            f"The run in the working folder has other settings. Received: "
            f"{', '.join(refused)}, --workdir={folder}. Give the same settings to go "
            "on, or --fresh to start anew."
        )
    _check_epochs(manifest, folder, config)
    if model is not None and _is_complete(manifest, folder, config):
        return True
    if manifest is None:
        raise UsageError(
            "The run in the working folder has finished and left no checkpoints to go "
            f"on from. Received: epochs={config.epochs}, --workdir={folder}. "
            "Give --fresh to start anew."
        )
    tell_changes("Going on", recorded, config)
    return False


def tell_changes(
    doing: str, recorded: Mapping[str, Any], config: ml_collections.ConfigDict
) -> None:
    """Prints which settings differ from those that are recorded, if any do.

    Args:
        doing: what is done with them, as "Going on".
        recorded: those of the earlier run.
        config: those of this one.
    """
    changed = _changed(recorded, config)
    shown = [text for name, text in changed.items() if name != "workdir"]
    if shown:
        print(f"{doing} with other settings: {', '.join(shown)}.", flush=True)


def _is_complete(
    manifest: Mapping[str, Any] | None,
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
) -> bool:
    """Whether the model that is there is the end of as many epochs as are asked for."""
    epochs, step = saving.record(folder)
    if epochs >= config.epochs:
        return True
    if manifest is None or manifest["step of the epoch"] > 0:
        return False
    return any(manifest["stops"]) and step == manifest["step"]


def _check_epochs(
    manifest: Mapping[str, Any] | None,
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
) -> None:
    """Raises a `UsageError` where more was trained than is asked for."""
    if manifest is None:
        begun, _ = saving.record(folder)
    else:
        begun = manifest["epoch"] + bool(manifest["step of the epoch"])
    if begun > config.epochs:
        raise UsageError(
            "The run in the working folder has trained for longer. Received: epochs="
            f"{config.epochs}, and epoch {begun} had begun. Give --epochs={begun} or "
            "more, or --fresh to start anew."
        )


def _changed(
    recorded: Mapping[str, Any], config: ml_collections.ConfigDict
) -> dict[str, str]:
    """The settings that differ, each as "epochs=3, which was 2", in one line."""
    now = json.loads(config.to_json_best_effort())
    # A setting that the earlier run did not know had its default.
    before = {**json.loads(configuration.defaults().to_json_best_effort()), **recorded}
    return {
        name: f"{name}={now.get(name)!r}, which was {before.get(name)!r}"
        for name in sorted(now.keys() | before.keys())
        if _text(now.get(name)) != _text(before.get(name))
    }


def _text(value: Any) -> str:
    """A setting as text, in which a NaN equals another and objects have no address."""
    return re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True))


def _latest_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        # `fit()` names those that are damaged, and passes them over as well.
        found = checkpoint.manifests(folder / saving.CHECKPOINTS)
        return next((manifest for _, manifest in found), None)
    except OSError as error:
        raise UsageError(
            f"The checkpoints cannot be read ({error.strerror}). "
            f"Received: --workdir={folder}. Give a readable folder."
        ) from error
