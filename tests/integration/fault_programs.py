"""Three small programs for `python -m launch`, and a callback that disturbs them once.

FAULT=<kind>:<worker>:<place> says what goes wrong where. The place is a step; as a
negative number an epoch, after its end; or "validation" of the second epoch. The file
FAULT_DONE is made when it has: once is enough.
"""

import json
import os
import pathlib
import resource
import signal
import time

import keras
import numpy as np
from keras import layers

import distfit
from distfit.models.gan import GAN
from distfit.models.masked_lm import LENGTH, VOCABULARY, MaskedLM

BATCH, STEPS, EPOCHS = 8, 6, 3


def build_gan(config):
    discriminator = keras.Sequential(
        [keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(8), layers.Dense(1)]
    )
    generator = keras.Sequential(
        [keras.Input((4,)), layers.Dense(36), layers.Reshape((6, 6, 1))]
    )
    model = GAN(discriminator, generator, latent_dim=4)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.01), loss)
    return model


def build_cnn(config):
    model = distfit.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(4),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def build_lm(config):
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 8)(tokens)
    x = layers.LayerNormalization()(x + layers.Dropout(0.2)(layers.Dense(8)(x)))
    model = MaskedLM(keras.Model(tokens, layers.Dense(VOCABULARY)(x)))
    model.compile(keras.optimizers.Adam(0.01, gradient_accumulation_steps=2))
    return model


def images(config):
    generator = np.random.default_rng(1)
    rows = BATCH * STEPS - 3  # The last batch of an epoch is shorter.
    x = generator.normal(size=(rows, 6, 6, 1)).astype("float32")
    y = generator.integers(4, size=rows)
    return (x, y), (x[:10], y[:10])


def digits(config):
    return images(config)[0][0], None


def tokens(config):
    generator = np.random.default_rng(2)
    rows = generator.integers(2, VOCABULARY, size=(BATCH * STEPS - 3, LENGTH))
    return rows.astype("int32"), None


PROGRAMS = {
    "gan": ("build_gan", "digits"),
    "cnn": ("build_cnn", "images"),
    "lm": ("build_lm", "tokens"),
}
VALIDATED = {"cnn"}


def callbacks(config):
    stopping = keras.callbacks.EarlyStopping(
        "d_loss" if "gan" in config.model else "loss",
        mode="min",
        patience=2,
        min_delta=10.0,  # Nothing counts as better: it ends after the third epoch.
        start_from_epoch=0,
    )
    return [stopping, Fault()]


class Fault(keras.callbacks.Callback):
    """Does what FAULT says, at that place, on that worker, unless it was done."""

    in_step_with_others = True

    def __init__(self):
        super().__init__()
        self.step = 0
        self.validates = ""

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self._disturb(self.step)

    def on_epoch_end(self, epoch, logs=None):
        self._disturb(-(epoch + 1))

    def on_epoch_begin(self, epoch, logs=None):
        self.validates = "validation" if epoch == 1 else ""

    def on_test_batch_begin(self, batch, logs=None):
        self._disturb(self.validates)

    def _disturb(self, place):
        kind, worker, wanted = os.environ.get("FAULT", "none:0:0").split(":")
        task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {"index": 0})
        done = pathlib.Path(os.environ.get("FAULT_DONE", "done"))
        if wanted == str(place) and int(worker) == task["index"] and not done.exists():
            done.touch()
            KINDS[kind]()


def _raise():
    raise RuntimeError("a fault of the test")


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def _stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def _pause():
    time.sleep(5)  # The test does something meanwhile.


def _segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def _kill_supervisor():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # It takes this process along.


def _terminate_supervisor():
    os.kill(os.getppid(), signal.SIGTERM)


def _interrupt_supervisor():
    os.kill(os.getppid(), signal.SIGINT)


def _kill_in_save():
    """Kills this process as soon as a checkpoint has begun to be written."""
    folder = pathlib.Path(os.environ["FAULT_CHECKPOINTS"])

    def wait_and_kill():
        while not any(folder.glob(".unfinished-*")):
            pass
        _kill()

    import threading

    threading.Thread(target=wait_and_kill, daemon=True).start()


def _fill_disk():
    """From now on no file can grow beyond a size that a checkpoint has."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))


KINDS = {
    "exception": _raise,
    "kill": _kill,
    "pause": _pause,
    "segfault": _segfault,
    "terminate": _terminate,
    "stop": _stop,
    "kill supervisor": _kill_supervisor,
    "terminate supervisor": _terminate_supervisor,
    "interrupt supervisor": _interrupt_supervisor,
    "kill in save": _kill_in_save,
    "full disk": _fill_disk,
}
