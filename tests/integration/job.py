"""The small job that every kind of cluster trains, and its results on one device."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 120  # a hard limit; each takes 10 to 20 on an idle machine

# The last of 7 batches has one row: fewer than there are replicas.
MODULE = """
import json
import os
import pathlib
import time

import distfit
import keras
import numpy as np
import tensorflow as tf


class Custom(distfit.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
        return {m.name: m.result() for m in self.metrics}


def build(config):
    inputs = keras.Input((3,))
    # No bias: its gradient would be zero except for rounding, which Adam amplifies.
    hidden = keras.layers.Dense(5, use_bias=False)(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    model = Custom(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(config.learning_rate), "mse")
    return model


def rows(config):
    x = np.random.normal(size=(49, 3)).astype("float32")
    return (x, x.sum(axis=1, keepdims=True) ** 2), (x[:9], x[:9, :1])


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 1000

    def __getitem__(self, i):
        time.sleep(0.01)
        return np.ones((8, 3), "float32"), np.ones((8, 1), "float32")


def endless(config):
    return Batches(), None


class Broken(Batches):
    def __getitem__(self, i):
        worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        if i == 20 and worker == 1:
            pathlib.Path("failed").touch()
            raise ValueError("a mistake in the data of worker 1")
        return super().__getitem__(i)


def broken(config):
    return Broken(), None
"""

FLAGS = ("--model=mine:build", "--batch_size=8", "--seed=3", "--learning_rate=0.05")


def write_module(folder: pathlib.Path) -> pathlib.Path:
    (folder / "mine.py").write_text(MODULE)
    return folder


def command(*flags: str, dataset: str = "rows", strategy: str = "multi_worker"):
    """Returns the command of a worker, with the Python of the tests."""
    fixed = (f"--strategy={strategy}", f"--dataset=mine:{dataset}", "--workdir=out")
    return [sys.executable, "-m", "launch", *FLAGS, *fixed, "--epochs=3", *flags]


def variables() -> dict[str, str]:
    """Returns what a worker needs in its environment."""
    return {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}


def epochs(folder: pathlib.Path, workdir: str = "out") -> list[dict]:
    lines = (folder / workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [entry for entry in found if "epoch" in entry]


@functools.cache
def on_one_device() -> list[dict]:
    """Returns the logs of the epochs on one device, in one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_module(pathlib.Path(name))
        subprocess.run(
            command(strategy="one_device"),
            cwd=folder,
            env={**os.environ, **variables()},
            check=True,
            capture_output=True,
            timeout=SECONDS,
        )
        return epochs(folder)


def check_as_on_one_device(folder: pathlib.Path, workdir: str = "out") -> None:
    several, one = epochs(folder, workdir), on_one_device()
    assert len(several) == len(one) == 3
    for a, b in zip(several, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
