"""Measures how long training waits for its data."""

from typing import Any

import keras

from distfit.training.data_clock import DataClock


class DataWait(keras.callbacks.Callback):
    """Measures how long the steps of `fit()` wait for their data, on this worker.

    What is read beside a step, ahead of its use, counts only as far as it takes longer.
    With a `dataset_fn` it is also the wait for the rows of other workers.
    """

    in_step_with_others = True

    def __init__(self) -> None:
        super().__init__()
        self._clock: DataClock | None = None
        self._counted = 0.0  # By clocks before, less what this one had counted before.

    @property
    def seconds_waited(self) -> float:
        """The seconds in all calls of `fit()` so far."""
        return self._counted + (self._clock.seconds if self._clock else 0.0)

    def get_state(self) -> dict[str, Any]:
        return {"seconds": self.seconds_waited}

    def set_state(self, state: dict[str, Any]) -> None:
        self._counted += state["seconds"] - self.seconds_waited

    def use(self, clock: DataClock | None) -> None:
        """Takes the clock of compiled steps, until `fit()` ends; called by `fit()`."""
        counted = self.seconds_waited
        self._clock = clock
        self._counted = counted - (clock.seconds if clock else 0.0)
