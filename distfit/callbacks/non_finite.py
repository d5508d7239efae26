"""Stops, or goes back, at a loss that is not finite."""

import itertools
import math
from typing import Any

import keras
import numpy as np

from distfit.training.finite import FiniteWatch, bad_replica

ACTIONS = ("stop", "rollback")


class NonFinite(keras.callbacks.Callback):
    """Stops training with an error at the first loss that is NaN or infinite.

    The error names the step and, where it can be determined, the replica whose rows
    gave the value. The check is part of the compiled step, and its result is read after
    every execution. Losses of the validation are checked at the end of each epoch.

    Args:
        action: "stop", or "rollback": `fit()` goes back to the last checkpoint with
            finite weights, and on from there without the batch of that step. It takes a
            `Checkpoint`. After ten such batches it stops, and where eager steps have
            no checkpoint yet.

    Attributes:
        skipped: The batches that were left out, as pairs of epoch and step from 1.

    Raises:
        ValueError: for another action.
    """

    in_step_with_others = True

    def __init__(self, action: str = "stop"):
        super().__init__()
        if action not in ACTIONS:
            raise ValueError(
                f"`action` must be one of {', '.join(ACTIONS)}. Received: "
                f"action={action!r}."
            )
        self.action = action
        self.watch: FiniteWatch | None = None  # Set by `fit()`.
        self.skipped: list[list[int]] = []
        self._epoch = 0
        self.bad_step = 0  # Of the epoch, from 1, once there is one.

    def get_state(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]

    def on_train_batch_end(self, batch, logs=None):
        if self.watch is None:
            return
        nth = self.watch.first()
        if nth is None:
            return
        step = self.bad_step = self._step_of_epoch(nth)
        replica = bad_replica(self.model)
        where = "" if replica is None else f" on replica {replica}"
        raise FloatingPointError(
            f"The loss is not finite. Received: NaN or infinity at step {step}{where}. "
            "Lower the learning rate, clip gradients, or look at the rows of that step."
        )

    def _step_of_epoch(self, nth: int) -> int:
        """The step of the epoch, from 1, that was the nth to be run."""
        skipped = {step for epoch, step in self.skipped if epoch == self._epoch}
        run = (step for step in itertools.count(1) if step not in skipped)
        return next(itertools.islice(run, nth - 1, None))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch + 1

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            if name.startswith("val_") and "loss" in name and np.ndim(value) == 0:
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"The validation loss is not finite. Received: {name}={value} "
                        f"at the end of epoch {epoch + 1}. Look at the validation data."
                    )
