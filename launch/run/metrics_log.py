"""The callback that writes the metrics of each epoch as a line of JSON."""

import json
import os
import pathlib
import time
from typing import Any

import keras
import numpy as np

import distfit
from launch import errors, run_files

FILE = "metrics.jsonl"


class MetricsLog(keras.callbacks.Callback):
    """Writes `{"epoch": 1, "seconds": 2.5, "loss": 0.1, ...}` after each epoch.

    Epochs count from 1, as in the progress bar. Place it after callbacks that add to
    the logs. A new training replaces an existing file with its first epoch; one that
    goes on from a checkpoint keeps the epochs before that.

    Args:
        path: the file; None on workers that do not write.
        non_finite: the callback that knows of batches that were left out: an epoch with
            some has an entry "skipped_steps", which count from 1.
    """

    def __init__(
        self, path: pathlib.Path | None, non_finite: distfit.callbacks.NonFinite
    ) -> None:
        super().__init__()
        self._non_finite = non_finite
        self._path = path
        self._lines = 0  # lines that are written and stay
        self._is_ready = False  # whether the file has these lines and no others
        self._epoch_began = 0.0

    def get_state(self) -> dict[str, Any]:
        elapsed = time.monotonic() - self._epoch_began
        return {"lines": self._lines, "seconds of the epoch": elapsed}

    def set_state(self, state: dict[str, Any]) -> None:
        self._lines = state["lines"]
        self._epoch_began = time.monotonic() - state["seconds of the epoch"]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch_began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seconds = round(time.monotonic() - self._epoch_began, 3)
        metrics = {k: np.asarray(v, float).tolist() for k, v in (logs or {}).items()}
        skipped = [step for e, step in self._non_finite.skipped if e == epoch + 1]
        notes = {"skipped_steps": skipped} if skipped else {}
        self.write({"epoch": epoch + 1, "seconds": seconds, **metrics, **notes})

    def write(self, entry: dict[str, Any]) -> None:
        """Adds a line, and is sure that it is on the disk.

        Raises:
            RunError: it cannot be written.
        """
        self._lines += 1
        if self._path is None:
            return
        try:
            if not self._is_ready:
                self._drop_later_lines(self._path)
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise errors.unwritten(self._path, error) from error

    def _drop_later_lines(self, path: pathlib.Path) -> None:
        text = path.read_text(errors="replace") if path.is_file() else ""
        lines = text.splitlines(keepends=True)
        run_files.write_text(path, "".join(lines[: self._lines - 1]))
        self._is_ready = True
