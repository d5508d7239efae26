"""Files that Keras callbacks write: on several workers, only the chief's remain."""

import contextlib
import io
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Iterable, Iterator

import keras
import tensorflow as tf
from keras.callbacks import BackupAndRestore

from distfit import _keras

_PATHS: dict[type, tuple[str, ...]] = {
    keras.callbacks.ModelCheckpoint: ("filepath",),
    keras.callbacks.CSVLogger: ("filename",),
    keras.callbacks.TensorBoard: ("log_dir",),
    BackupAndRestore: ("backup_dir", *_keras.BACKUP_PATHS),
}


def _paths_of(callback: keras.callbacks.Callback) -> tuple[str, ...]:
    """The attributes of a Keras callback that hold the paths it writes to."""
    return next((p for cls, p in _PATHS.items() if isinstance(callback, cls)), ())


def move_paths(
    callbacks: Iterable[keras.callbacks.Callback], until: contextlib.ExitStack
) -> None:
    """Redirects callbacks to a temporary folder `until` the stack is closed."""
    folder = until.enter_context(tempfile.TemporaryDirectory())
    for callback in callbacks:
        for name in _paths_of(callback):
            path = getattr(callback, name)
            until.callback(setattr, callback, name, path)
            setattr(callback, name, _path_in(folder, path))


def _path_in(folder: str, path: str) -> str:
    moved = os.path.join(folder, os.path.relpath(path, os.sep))
    os.makedirs(os.path.dirname(moved), exist_ok=True)
    return moved


def packed_backups(callbacks: Iterable[keras.callbacks.Callback]) -> bytes:
    """The files that callbacks have backed up, as a zip archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name, path in _backup_files(callbacks):
            if tf.io.gfile.exists(path):
                files.writestr(name, tf.io.gfile.GFile(path, "rb").read())
    return archive.getvalue()


def unpack_backups(
    archive: bytes, callbacks: Iterable[keras.callbacks.Callback]
) -> None:
    """Unpacks the chief's backups to where callbacks look for their own."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name, path in _backup_files(callbacks):
            if name in files.namelist():
                pathlib.Path(path).write_bytes(files.read(name))


def _backup_files(
    callbacks: Iterable[keras.callbacks.Callback],
) -> Iterator[tuple[str, str]]:
    """The name and path of each file of a backup."""
    backing_up = (c for c in callbacks if isinstance(c, BackupAndRestore))
    for number, callback in enumerate(backing_up):
        for attribute in _keras.BACKUP_PATHS:
            yield f"{number}/{attribute}", getattr(callback, attribute)
