"""The first step of a contender, in a process of its own.

    python -m benchmarks.first_step_worker CONTENDER WORKLOAD REPLICAS

A line on stdin, an order, is answered by a line on stdout: `{"seconds": s, "logs":
{...}}` or `{"error": line}`.
"""

import json
import sys
import time
from typing import Any

from benchmarks import worker  # First, as it sets TensorFlow's environment.

# isort: split
import keras

import distfit
from benchmarks.workloads import WORKLOADS, Workload


def main(contender: str, workload: str, replicas: str) -> None:
    answers = worker.own_stdout()
    for _ in sys.stdin:
        try:
            answer = first_step(contender, WORKLOADS[workload], int(replicas))
        except Exception as error:  # An exception is the contender's result.
            answer = {"error": worker.first_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


def first_step(contender: str, workload: Workload, replicas: int) -> dict[str, Any]:
    """Times a new model until the end of its first step."""
    keras.utils.set_random_seed(0)
    with worker.make_strategy(contender, replicas).scope():
        model = keras.Model(*workload.network(keras))
        model.compile(
            optimizer=workload.optimizer(keras),
            loss=workload.loss(keras),
            metrics=[workload.metric(keras)],
        )
    x, y = workload.arrays()
    stop = _Stop()
    fit = distfit.fit if contender == "distfit" else keras.Model.fit
    start = time.perf_counter()
    fit(model, x, y, batch_size=workload.batch_size, verbose=0, callbacks=[stop])
    return {"seconds": stop.time - start, "logs": stop.logs}


class _Stop(keras.callbacks.Callback):
    """Stops after the first step and keeps its logs and the time."""

    def on_train_batch_end(self, batch, logs=None):
        self.logs = {name: float(value) for name, value in logs.items()}
        self.time = time.perf_counter()
        self.model.stop_training = True


if __name__ == "__main__":
    main(*sys.argv[1:])
