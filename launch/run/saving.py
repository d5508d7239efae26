"""Saves the trained model to the working folder, and finds weights to evaluate."""

import pathlib
import warnings
from collections.abc import Callable

import keras
from ml_collections import ConfigDict

import distfit
from distfit.training import checkpoint
from launch import run_files
from launch.errors import RunError, UsageError
from launch.settings import checks

MODEL_FILE = "model.keras"
WEIGHTS_FILE = "model.weights.h5"
RECORD = "model.json"  # which epochs and step the file is of
CHECKPOINTS = "checkpoints"


class _Checkpoint(distfit.callbacks.Checkpoint):
    """Tells the supervisor of each checkpoint, on every worker.

    On another host than the chief's it cannot look into the folder.
    """

    def note_saved(self, step: int, epoch: int) -> None:
        super().note_saved(step, epoch)
        run_files.note_saved(step)


def checkpoints(config: ConfigDict) -> distfit.callbacks.Checkpoint | None:
    """The callback that saves as `--checkpoint_every` says; None if never."""
    every = checks.moments(config)
    if not every:
        return None
    return _Checkpoint(
        pathlib.Path(config.workdir, CHECKPOINTS),
        every=every,
        keep=config.keep,
        monitor=config.monitor,
        mode=config.mode,
        on_error=config.on_save_error,
    )


def save(
    model: keras.Model, folder: pathlib.Path, epochs: int, step: int | None
) -> str:
    """Saves the model, or if Keras cannot, its weights, and returns the file name.

    Keras saves a subclass with its own arguments only if it has a `get_config()`. The
    file is there as a whole or, if saving fails, as it was before.

    Args:
        model: the trained model.
        folder: the working folder.
        epochs: the epochs that were asked for.
        step: the step of the latest checkpoint, if there is one.

    Raises:
        RunError: it cannot be written.
    """
    whole, weights = folder / MODEL_FILE, folder / WEIGHTS_FILE
    try:
        try:
            _replace(whole, model.save)
            weights.unlink(missing_ok=True)  # of an earlier training
            name = MODEL_FILE
        except NotImplementedError:
            _replace(weights, model.save_weights)
            whole.unlink(missing_ok=True)
            name = WEIGHTS_FILE
        run_files.write_json(folder / RECORD, {"epochs": epochs, "step": step})
    except OSError as error:
        again = (
            "saves it"
            if step is not None
            else "trains it anew, as there are no checkpoints"
        )
        raise RunError(
            f"The model could not be saved ({error}). Received: --workdir={folder}. "
            f"Once that is mended, the same command {again}."
        ) from error
    return name


def _replace(file: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write` with another name of the same ending, and renames what it wrote."""
    draft = file.with_name(f".unfinished-{file.name}")
    try:
        write(draft)
        run_files.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def trained(folder: pathlib.Path) -> pathlib.Path | None:
    """The file that `save` wrote, or None."""
    files = [folder / name for name in (MODEL_FILE, WEIGHTS_FILE)]
    return next((file for file in files if file.is_file()), None)


def record(folder: pathlib.Path) -> tuple[int, int | None]:
    """Of how many epochs the trained model is, and of which step if that is known."""
    saved = run_files.read_json(folder / RECORD) or {}
    epochs, step = saved.get("epochs"), saved.get("step")
    return (
        epochs if isinstance(epochs, int) else 0,
        step if isinstance(step, int) else None,
    )


def load_weights(model: keras.Model, config: ConfigDict, which: str | None) -> str:
    """Loads weights of the working folder into a built model, and says which.

    Args:
        model: the model.
        config: the settings; `workdir`, `monitor` and `mode` say where to look.
        which: "model", "latest" or "best"; None for the model, if it is there and no
            later checkpoint, else for the latest checkpoint.

    Raises:
        UsageError: there are none, or they do not fit the model.
    """
    folder = pathlib.Path(config.workdir)
    file = trained(folder)
    if which is None:
        which = "model" if _is_latest(folder) else "latest"
    if which == "best" and config.monitor is None:
        raise UsageError(
            "The best checkpoint is that by a metric. Received: --weights=best, no "
            "--monitor. Give --monitor=val_loss, say, and --mode=max if more is better."
        )
    try:
        if which == "model":
            return _load_file(model, file, folder)
        best = which == "best"
        path = distfit.load_weights(
            model, folder / CHECKPOINTS, config.monitor if best else None, config.mode
        )
        return str(path.relative_to(folder))
    except FileNotFoundError as error:
        raise UsageError(
            "The working folder has no such weights. "
            f"Received: --workdir={folder}, weights={which}. Train with this --workdir "
            "first."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"The trained weights do not fit this model ({error}). "
            f"Received: --workdir={folder}. Use the settings it was trained with."
        ) from error


def _is_latest(folder: pathlib.Path) -> bool:
    """Whether the trained model is there, and no run has trained on since."""
    _, step = record(folder)
    steps = checkpoint.steps(folder / CHECKPOINTS)
    return trained(folder) is not None and (
        not steps or step is None or step >= steps[-1]
    )


def _load_file(
    model: keras.Model, file: pathlib.Path | None, folder: pathlib.Path
) -> str:
    if file is None:
        raise FileNotFoundError(folder / MODEL_FILE)
    with warnings.catch_warnings():
        # About the optimizers' state, which is not needed to evaluate.
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        model.load_weights(file)
    return file.name
