"""Checkpoints on disk: each a folder that is there as a whole, with checksums.

    <folder>/step-120/tensors.index, tensors.data-00000-of-00001   the arrays
    <folder>/step-120/manifest.json                                everything else

A folder is written under another name, synced and renamed at the end, its manifest
last. Reading verifies every byte and runs no code.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import tensorflow as tf

FORMAT = 2
MANIFEST = "manifest.json"
_TENSORS = "tensors"
_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".unfinished-"
LEAST_KEPT = 2


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says which and why, in a line."""


class OtherFormatError(DamagedCheckpointError):
    """A checkpoint that another version of distfit can read."""


def write(
    folder: pathlib.Path,
    step: int,
    tensors: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
) -> pathlib.Path:
    """Writes a checkpoint and returns its folder.

    Args:
        folder: The folder of all checkpoints.
        step: The number of steps trained so far, which names the checkpoint.
        tensors: Arrays by name.
        manifest: What else there is, as JSON can hold it.

    Raises:
        OSError: it cannot be written; nothing that was there is changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, step)
    unfinished = folder / f"{_UNFINISHED}{path.name}"
    _remove(unfinished)
    unfinished.mkdir()
    try:
        _save(unfinished / _TENSORS, tensors)
        files = {file.name: _facts(file) for file in sorted(unfinished.iterdir())}
        content = {"format": FORMAT, "step": step, **manifest, "files": files}
        _write_json(unfinished / MANIFEST, content)
        _sync(unfinished)
        _replace(unfinished, path)
    except BaseException as error:
        _remove(unfinished)
        if isinstance(error, tf.errors.OpError):  # A full disk, say.
            raise OSError(f"{_cause(error)}: {str(path)!r}") from error
        raise
    _sync(folder)
    return path


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the arrays of a checkpoint.

    Raises:
        DamagedCheckpointError: it is incomplete, changed, or of another format.
    """
    manifest = read_manifest(path)
    try:
        return manifest, _arrays(path, manifest)
    except DamagedCheckpointError:
        if read_manifest(path) == manifest:
            raise
    return read(path)  # It was replaced meanwhile, by one of the same step.


def _arrays(path: pathlib.Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    for name, facts in manifest["files"].items():
        try:
            found = _facts(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{path / name}: {error.strerror}.") from error
        if found != facts:
            raise DamagedCheckpointError(
                f"{path / name} was changed: it has {found['size']} bytes with SHA-256 "
                f"{found['sha256'][:8]}..., and had {facts['size']} with "
                f"{facts['sha256'][:8]}...."
            )
    try:
        reader = tf.train.load_checkpoint(str(path / _TENSORS))
        names = reader.get_variable_to_shape_map()
        return {name: reader.get_tensor(name) for name in names}
    except (tf.errors.OpError, ValueError) as error:  # It was removed just now.
        raise DamagedCheckpointError(f"{path}: {error}") from error


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a checkpoint, verified; its files are not.

    Raises:
        DamagedCheckpointError: it is missing, changed, or of another format.
    """
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DamagedCheckpointError(f"{file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise DamagedCheckpointError(f"{file} is not a manifest of distfit.")
    if content["format"] != FORMAT:
        raise OtherFormatError(
            f"{file} has the format {content['format']!r}; this distfit reads {FORMAT}."
        )
    if content.pop("sha256", None) != _sha256_of(content):
        raise DamagedCheckpointError(f"{file} was changed: its SHA-256 differs.")
    if not _names_files(content.get("files")):
        raise DamagedCheckpointError(f"{file} does not say which files it is for.")
    return content


def _names_files(files: Any) -> bool:
    """Whether these are the facts of files in the folder of a manifest."""
    if not isinstance(files, dict) or f"{_TENSORS}.index" not in files:
        return False
    return all(
        os.path.basename(name) == name
        and isinstance(facts, dict)
        and isinstance(facts.get("sha256"), str)
        for name, facts in files.items()
    )


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def path_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    """The folder of the checkpoint of a step, in the folder of all."""
    return folder / f"step-{step}"


def manifests(folder: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps and their manifests, the latest first; damaged ones are left out."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(DamagedCheckpointError):
            yield step, read_manifest(path_of(folder, step))


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of which a folder has checkpoints, ascending; they may be damaged."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def recover(folder: pathlib.Path) -> None:
    """Ends what a killed process had begun: nothing unfinished stays.

    Only for who saves there: what another process is writing would be lost.
    """
    for path in folder.glob(f"{_UNFINISHED}*"):
        old = path.name.removeprefix(f"{_UNFINISHED}old-")
        if old != path.name and not (folder / old).exists():
            path.rename(folder / old)
        else:
            _discard(path)


@dataclasses.dataclass(frozen=True)
class Best:
    """Which checkpoints of the ends of epochs are the best.

    Attributes:
        monitor: A name in the logs; None: none are.
        mode: Whether the best is the "min" or the "max".
        keep: How many are kept.
    """

    monitor: str | None = None
    mode: str = "min"
    keep: int = 0

    def steps(self, folder: pathlib.Path) -> list[int]:
        """The steps of the best checkpoints, the best first; of equals the earliest."""
        values = {}
        for step, manifest in manifests(folder) if self.monitor else ():
            value = manifest.get("logs", {}).get(self.monitor, math.nan)
            if not math.isnan(value):
                values[step] = value if self.mode == "min" else -value
        return sorted(values, key=lambda step: (values[step], step))[: self.keep]


def prune(
    folder: pathlib.Path, keep: int, latest: int, best: Best | None = None
) -> None:
    """Removes all but the latest `keep` checkpoints, at least two, and the best.

    Call it once the latest has been read back. Later ones are damaged, or of another
    version of distfit: the training has gone on from one before them.
    """
    for step in steps(folder):
        if step > latest:
            _discard(path_of(folder, step))
    kept = set(best.steps(folder)) if best else set()
    for step in steps(folder)[: -max(keep, LEAST_KEPT)]:
        if step not in kept:
            _remove(path_of(folder, step))


def _save(prefix: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    names = sorted(tensors)
    with tf.device("CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.convert_to_tensor(tensors[name]) for name in names],
        )


def _cause(error: tf.errors.OpError) -> str:
    """The cause in a message "{{function_node ...}} <file>; <cause> [Op:SaveV2]"."""
    return re.sub(r"\{\{.*?\}\} (?:.*; )?| \[Op:.*", "", error.message)


def _facts(file: pathlib.Path) -> dict[str, Any]:
    """The size and checksum of a file, once it is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"size": opened.tell(), "sha256": digest}


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    content = json.loads(json.dumps(content))  # As it will be read.
    content["sha256"] = _sha256_of(content)
    with file.open("w") as opened:
        json.dump(content, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def _sha256_of(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _replace(source: pathlib.Path, target: pathlib.Path) -> None:
    if target.exists():  # The same step again: at the end of its epoch, say.
        old = target.with_name(f"{_UNFINISHED}old-{target.name}")
        _remove(old)
        target.rename(old)
        source.rename(target)
        _discard(old)
    else:
        source.rename(target)


def _sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: pathlib.Path) -> None:
    """Removes a checkpoint; one of another version of distfit is put aside."""
    if not _is_of_another_version(path):
        _remove(path)
        return
    name = path.name.removeprefix(f"{_UNFINISHED}old-")
    asides = (path.with_name(f"{name}.{n}.of-another-version") for n in count())
    path.rename(next(aside for aside in asides if not aside.exists()))


def _is_of_another_version(path: pathlib.Path) -> bool:
    try:
        read_manifest(path)
    except DamagedCheckpointError as error:
        return isinstance(error, OtherFormatError)
    return False


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
