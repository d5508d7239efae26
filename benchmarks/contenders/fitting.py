"""Epochs of one long `fit`, one at a time, so that the setup of `fit` counts once."""

import queue
import threading


class Fit:
    """A `fit` in a thread of its own that waits to be called before each epoch.

    A call runs it until it waits again, and returns the logs of the epoch.

    Args:
        keras: Keras 3 or tf_keras.
        model: A compiled model.
        workload: The `Workload`.
    """

    def __init__(self, keras, model, workload):
        self._model = model
        self._arguments = {
            "x": workload.dataset(),
            "steps_per_epoch": workload.epoch_steps,
            "epochs": 1_000_000,
            "verbose": 0,
            "callbacks": [
                keras.callbacks.LambdaCallback(
                    on_epoch_begin=self._wait, on_epoch_end=self._keep
                )
            ],
        }
        self._orders = queue.SimpleQueue()
        self._results = queue.SimpleQueue()
        self._logs = None
        threading.Thread(target=self._run, daemon=True).start()
        self._result()

    def __call__(self) -> dict:
        self._orders.put("go")
        return self._result()

    def _result(self):
        result = self._results.get()
        if isinstance(result, Exception):
            raise result
        return result

    # In the thread.

    def _run(self) -> None:
        try:
            self._model.fit(**self._arguments)
        except Exception as error:  # For the caller to raise.
            self._results.put(error)

    def _wait(self, epoch, logs=None) -> None:
        self._results.put(self._logs)
        self._orders.get()

    def _keep(self, epoch, logs=None) -> None:
        self._logs = {name: float(value) for name, value in logs.items()}
