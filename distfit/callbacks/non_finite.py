"""Stops at a loss that is not finite."""

import keras

from distfit.training.finite import FiniteWatch, bad_replica


class NonFinite(keras.callbacks.Callback):
    """Stops training with an error at the first loss that is NaN or infinite.

    The error names the step and, where it can be determined, the replica whose rows
    gave the value. The check is part of the compiled step, and its result is read after
    every execution.
    """

    in_step_with_others = True

    def __init__(self):
        super().__init__()
        self.watch: FiniteWatch | None = None  # Set by `fit()`.

    def on_train_batch_end(self, batch, logs=None):
        if self.watch is None:
            return
        step = self.watch.first()
        if step is None:
            return
        replica = bad_replica(self.model)
        where = "" if replica is None else f" on replica {replica}"
        raise FloatingPointError(
            f"The loss is not finite. Received: NaN or infinity at step {step}{where}. "
            "Lower the learning rate, clip gradients, or look at the rows of that step."
        )
