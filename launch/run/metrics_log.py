"""The callback that writes the metrics of each epoch as a line of JSON."""

import json
import pathlib
import time
from typing import Any

import keras
import numpy as np


class MetricsLog(keras.callbacks.Callback):
    """Writes `{"epoch": 1, "seconds": 2.5, "loss": 0.1, ...}` after each epoch.

    Epochs count from 1, as in the progress bar. Place it after callbacks that add to
    the logs. An existing file is replaced when training begins.
    """

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path
        self._epoch_began = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self.path.write_text("")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch_began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seconds = round(time.monotonic() - self._epoch_began, 3)
        metrics = {k: np.asarray(v, float).tolist() for k, v in (logs or {}).items()}
        line = json.dumps({"epoch": epoch + 1, "seconds": seconds, **metrics})
        with self.path.open("a") as file:
            file.write(line + "\n")
