"""Goes on with a training: what a checkpoint holds, and how it is taken up again."""

import dataclasses
import io
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import distfit
from distfit.cluster.workers import Workers
from distfit.training import checkpoint, state

_LOGGER = logging.getLogger("distfit")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        path: Its folder.
        manifest: What it says; see `Training.frozen`.
        arrays: Its arrays by name.
    """

    path: pathlib.Path
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]


# Says why a checkpoint cannot be used, or "".
Usable = Callable[[Saved], str]


def load(
    team: Workers,
    folder: Any,
    is_good: Usable = lambda saved: "",
    owned: Sequence[pathlib.Path] = (),
) -> Saved | None:
    """The latest good checkpoint of a folder, as the chief reads it, on all workers.

    A damaged one is named and passed over.

    Args:
        team: The workers; all of them call this at the same place.
        folder: A folder of checkpoints, or None.
        is_good: Says why a checkpoint that is not damaged cannot be used, or "".
        owned: The folders that this training saves to. What a kill has left unfinished
            there is tidied up; in others, a training may be at work.

    Returns:
        None if no folder is given or nothing was saved yet.

    Raises:
        ValueError: on every worker, if all there are are damaged, or the folder cannot
            be read.
    """
    if not team.any("fit(), which may go on", folder is not None):
        return None
    own, error = b"", ""
    if team.is_chief:
        try:
            path = pathlib.Path(folder)
            if path.resolve() in [each.resolve() for each in owned]:
                checkpoint.recover(path)
            own = _packed(_latest(path, is_good))
        except (OSError, TypeError, ValueError) as problem:
            error = str(problem)
    error = team.from_chief("the checkpoint", error)
    if error:
        raise ValueError(error)
    return _unpacked(team.gather("the checkpoint", own)[0])


def non_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The weights and optimizers' variables, among arrays, that are not finite."""
    return [
        name
        for name, value in arrays.items()
        if name.startswith(("model/", "optimizer"))
        and value.dtype.kind in "fV"
        and not np.isfinite(value.astype("float64")).all()
    ]


def _latest(folder: pathlib.Path, is_good: Usable = lambda saved: "") -> Saved | None:
    if checkpoint.is_name(folder.name):
        raise ValueError(
            "`resume_from` is the folder of all checkpoints; the latest good one is "
            f"taken. Received: resume_from={str(folder)!r}. Give its parent."
        )
    return _first_good(folder, lambda: checkpoint.steps(folder)[::-1], is_good)


def _first_good(
    folder: pathlib.Path,
    find: Callable[[], list[int]],
    is_good: Usable = lambda saved: "",
) -> Saved | None:
    """The first checkpoint that can be used, of the steps that `find()` returns."""
    errors = []
    for step in (steps := find()):
        path = checkpoint.path_of(folder, step)
        try:
            saved = Saved(path, *checkpoint.read(path))
            error = is_good(saved)
        except checkpoint.DamagedCheckpointError as problem:
            error = str(problem)
        if not error:
            return saved
        if path.exists():
            _LOGGER.warning("A checkpoint is passed over: %s", error)
        errors.append(error)
    if errors and find() != steps:  # A training at work has saved, and removed these.
        return _first_good(folder, find, is_good)
    if errors:
        raise checkpoint.DamagedCheckpointError(
            f"No checkpoint can be used. Received: {' '.join(errors)} Start anew in "
            "another folder."
        )
    return None


def load_weights(
    model: keras.Model,
    folder: str | pathlib.Path,
    monitor: str | None = None,
    mode: str = "min",
) -> pathlib.Path:
    """Loads the weights of a checkpoint into a built model.

    Args:
        model: A model of the same layers.
        folder: The folder of the checkpoints.
        monitor: A name in the logs of epochs: the weights of the best by it are taken;
            None: those of the latest good checkpoint.
        mode: Whether the best is the "min" or the "max".

    Returns:
        The folder of the checkpoint that was taken.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: all are damaged, or the weights do not fit the model.
    """
    folder = pathlib.Path(folder)
    if monitor is None:
        saved = _latest(folder)
    else:
        best = checkpoint.Best(monitor, mode, sys.maxsize)
        saved = _first_good(folder, lambda: best.steps(folder))
    if saved is None:
        raise FileNotFoundError(f"There is no checkpoint with {monitor}: {folder}")
    variables = state.variables_of_model(model)
    own = {n: tuple(v.shape) for n, v in variables.items()}
    theirs = {n: saved.arrays[n].shape for n in own if n in saved.arrays}
    count = sum(name.startswith("model/") for name in saved.arrays)
    if own != theirs or len(own) != count:
        raise ValueError(
            f"{saved.path} has the weights of another model. Received: "
            f"{model.name!r} with {len(own)} variables of the shapes "
            f"{list(own.values())}. Build the model that was trained."
        )
    for name, variable in variables.items():
        variable.assign(saved.arrays[name])
    return saved.path


def _packed(saved: Saved | None) -> bytes:
    if saved is None:
        return b""
    file = io.BytesIO()
    # Bytes, since NumPy's files know no bfloat16.
    raw = {k: np.frombuffer(v.tobytes(), "uint8") for k, v in saved.arrays.items()}
    types = {k: [v.dtype.name, v.shape] for k, v in saved.arrays.items()}
    head = json.dumps([str(saved.path), saved.manifest, types]).encode()
    np.savez(file, **{"head": np.frombuffer(head, "uint8"), **raw})  # type: ignore[arg-type]
    return file.getvalue()


def _unpacked(data: bytes) -> Saved | None:
    if not data:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        path, manifest, types = json.loads(file["head"].tobytes())
        arrays = {
            name: np.frombuffer(
                file[name].tobytes(), tf.as_dtype(dtype).as_numpy_dtype
            ).reshape(shape)
            for name, (dtype, shape) in types.items()
        }
    return Saved(pathlib.Path(path), manifest, arrays)


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    return {
        "distfit": distfit.__version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
    }


def check_same(saved: Saved, kind: str, facts: dict[str, Any]) -> None:
    """Checks that a checkpoint is one of this model and these data.

    Args:
        saved: The checkpoint.
        kind: Which facts of the manifest to compare.
        facts: Those of this training, as JSON gives them back.

    Raises:
        ValueError: listing what differs.
    """
    before = saved.manifest[kind]
    differ = [
        f"{name} is {facts.get(name)!r} and was {before.get(name)!r}"
        for name in sorted(facts.keys() | before.keys())
        if facts.get(name) != before.get(name)
    ]
    if differ:
        raise ValueError(
            f"The checkpoint {saved.path} is of another training. Received: "
            f"{'; '.join(differ)}. Give the same model and data, or start anew in "
            "another folder."
        )


def keep_rows_before(epoch: int, callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Lets each CSVLogger go on with the rows of the epochs before this one."""
    for callback in callbacks:
        if not isinstance(callback, keras.callbacks.CSVLogger):
            continue
        file = pathlib.Path(callback.filename)
        if not file.is_file():
            continue
        callback.append = True
        with file.open(newline="") as opened:  # The ends of lines stay as they are.
            head, *rows = opened.readlines() or [""]
        kept = [row for row in rows if int(row.split(callback.sep)[0]) < epoch]
        unfinished = file.with_name(f".{file.name}")
        unfinished.write_text("".join([head, *kept]), newline="")
        unfinished.replace(file)
