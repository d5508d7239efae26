"""The callback that reports a worker's progress to its watchdog."""

from typing import Any

import keras

from launch.watchdog import stall


class Heartbeat(keras.callbacks.Callback):
    """Notes the start and end of every execution, in training and in evaluation.

    Args:
        watchdog: the watchdog of this worker.
    """

    in_step_with_others = True  # it neither reads logs nor stops anything

    def __init__(self, watchdog: stall.Watchdog) -> None:
        super().__init__()
        self._watchdog = watchdog
        self._before = 0  # steps of the finished epochs
        self._last = 0  # last step of the last finished execution

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._watchdog.note(self._before + batch + 1, stall.IN_STEP)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._last = self._before + batch + 1
        self._watchdog.note(self._last, stall.BETWEEN_STEPS)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._before = self._last

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._watchdog.note(self._last, stall.IN_STEP)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._watchdog.note(self._last, "evaluating")
