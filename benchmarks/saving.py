"""What checkpoints cost: the pause of a save, and the way back from a kill.

    python -m benchmarks.saving

The pause is the time in which training waits for a save, beside the time of a step and
of the whole save, which goes on in the background: medians of several saves of dense
models of different sizes with Adam. The way back is the time from SIGKILL to one of two
workers until the first step of the next start has ended.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

SIZES = (256, 1024, 2048)  # width of the two hidden layers
COMMAND = [
    *(sys.executable, "-m", "launch", "--model=mnist_cnn", "--num_workers=2"),
    *("--max_restarts=1", "--epochs=100", "--checkpoint_every=20steps"),
    *("--workdir=run", "--verbose=0"),
]
TIMEOUT = 240.0  # seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args(argv)
    print("| megabytes | step, ms | pause, ms | whole save, ms |")
    print("|--:|--:|--:|--:|")
    for size in given.sizes:
        row = pause(size)
        print("| " + " | ".join(f"{value:.1f}" for value in row) + " |", flush=True)
    if given.kills:
        seconds = sorted(way_back() for _ in range(given.kills))
        shown = ", ".join(f"{each:.1f}" for each in seconds)
        print(f"\nFrom SIGKILL to the end of the next step: {shown} s")


def pause(width: int, saves: int = 7) -> tuple[float, float, float, float]:
    """Megabytes of a checkpoint; milliseconds of a step, a pause and a whole save."""
    import keras
    import numpy as np

    import distfit

    class Saves(distfit.callbacks.Checkpoint):
        def save(self, step: int, write: Any) -> None:
            super().save(step, write)
            began = time.perf_counter()
            self.join()  # So that no save waits for the one before it.
            whole.append(time.perf_counter() - began)

    class Times(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self._began = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            steps.append(time.perf_counter() - self._began)

    steps: list[float] = []
    whole: list[float] = []
    model = distfit.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(32 * 5 * saves, 64)).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Saves(folder, every="5steps")
        model.fit(
            x, x[:, :1], batch_size=32, verbose=0, callbacks=[Times(), checkpoints]
        )
        newest = max(pathlib.Path(folder).iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    paused = (checkpoints.paused - sum(whole)) / len(whole)
    return (
        size,
        1e3 * statistics.median(steps[1:]),
        1e3 * max(paused, 0.0),
        1e3 * (statistics.median(whole) + max(paused, 0.0)),
    )


def way_back() -> float:
    """Seconds from a kill to the end of the first step after it."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            COMMAND,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            first = _wait_for(folder, lambda place: place["step"] > 60)
            began = time.time()
            os.kill(first["pid"], signal.SIGKILL)
            again = _wait_for(
                folder,
                lambda place: place["pid"] != first["pid"] and place["entered"] > 4,
            )
            return again["time"] - began
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _wait_for(folder: str, reached: Any) -> dict[str, Any]:
    """The place of worker 1, once it is one of those."""
    path = pathlib.Path(folder, "run", "logs", "worker-1.progress.json")
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            place = json.loads(path.read_text())
        except (OSError, ValueError):
            place = {"step": 0, "pid": None, "entered": 0}
        if reached(place):
            return place
        time.sleep(0.02)
    raise TimeoutError(f"Worker 1 does not get there within {TIMEOUT} s.")


if __name__ == "__main__":
    main()
