"""What an earlier run has left in the working folder, and whether this one goes on."""

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
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
# What --fresh moves aside; logs are moved by the supervisor.
_RESULTS = (
    configuration.FILE,
    metrics_log.FILE,
    saving.MODEL_FILE,
    saving.WEIGHTS_FILE,
    saving.CHECKPOINTS,
    "samples",
)


def set_aside(folder: pathlib.Path) -> None:
    """Moves the results of an earlier run to `earlier-1`, or the next free name.

    Raises:
        UsageError: the folder cannot be written to.
    """
    found = [folder / name for name in _RESULTS if (folder / name).exists()]
    if not found:
        return
    names = (folder / f"earlier-{i}" for i in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    try:
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
    except OSError as error:
        raise UsageError(
            f"The earlier run cannot be moved aside ({error.strerror}). "
            f"Received: --fresh --workdir={folder}. Give another folder."
        ) from error
    print(f"The earlier run is in {aside} now.", flush=True)


def check(config: ml_collections.ConfigDict) -> bool:
    """Checks that this run can go on from what there is, if there is anything.

    Returns:
        Whether the earlier run has finished, with as many epochs as this one asks for.

    Raises:
        UsageError: it cannot go on, or would be another run.
    """
    folder = pathlib.Path(config.workdir)
    manifest = _latest_manifest(folder / saving.CHECKPOINTS)
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
    if model is not None and _is_complete(manifest, recorded, config):
        return True
    if manifest is None:
        raise UsageError(
            "The run in the working folder has finished and left no checkpoints to go "
            f"on from. Received: {changed['epochs']}, --workdir={folder}. "
            "Give --fresh to start anew."
        )
    shown = [text for name, text in changed.items() if name != "workdir"]
    if shown:
        print(f"Going on with other settings: {', '.join(shown)}.", flush=True)
    return False


def _is_complete(
    manifest: Mapping[str, Any] | None,
    recorded: Mapping[str, Any],
    config: ml_collections.ConfigDict,
) -> bool:
    """Whether nothing is left to train."""
    if manifest is None:
        return recorded.get("epochs") == config.epochs
    return manifest["stops"] or manifest["epoch"] >= config.epochs


def _changed(
    recorded: Mapping[str, Any], config: ml_collections.ConfigDict
) -> dict[str, str]:
    """The settings that differ, each as "epochs=3, which was 2"."""
    now = json.loads(config.to_json_best_effort())
    return {
        name: f"{name}={now.get(name)}, which was {recorded.get(name)}"
        for name in sorted(now.keys() | recorded.keys())
        if now.get(name) != recorded.get(name)
    }


def _latest_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    return next(_manifests(folder), None)


def _manifests(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    for step in reversed(checkpoint.steps(folder)):
        try:
            yield checkpoint.read_manifest(folder / f"step-{step}")
        except checkpoint.DamagedCheckpointError:
            continue  # `fit()` names it and passes it over
