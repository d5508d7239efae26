"""One contender on one workload and number of replicas: a process that takes orders.

    python -m benchmarks.worker CONTENDER WORKLOAD REPLICAS BATCHES

Each line on stdin, `{"fused": k}`, is answered by a line on stdout: the time of an
epoch with k steps per execution, `{"seconds_per_step": s, "logs": {...}}`, or
`{"error": line}`. The first order for a k is answered by `{}`: the model is built and
traced, and trained for an epoch. Between orders the process is idle.

If TF_CONFIG lists workers, this is one of them, with one replica, and REPLICAS is their
number. The parent gives the same orders to all.
"""

import dataclasses
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # The replicas are virtual CPU devices.

import tensorflow as tf

from benchmarks import contenders
from benchmarks.workloads import WORKLOADS
from distfit import create_strategy


def main(contender: str, workload: str, replicas: str, batches: str) -> None:
    answers = own_stdout()
    work = dataclasses.replace(WORKLOADS[workload], fixed=batches == "fixed")
    if "TF_CONFIG" in os.environ:
        work = work.on_workers(int(replicas))
        threading.Thread(target=_end_with_parent, daemon=True).start()
    times = _Times(contender, work, int(replicas))
    for line in sys.stdin:
        try:
            answer = times.epoch(**json.loads(line))
        except Exception as error:  # An exception is the contender's result.
            answer = {"error": first_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


class _Times:
    """Times epochs, with a separate model for each k."""

    def __init__(self, contender: str, workload, replicas: int):
        self.contender = contender
        self.workload = workload
        self.strategy: tf.distribute.Strategy | None = None
        if contender != "torch_ddp":
            self.strategy = make_strategy(contender, replicas)
        self.trainers: dict[int, Callable] = {}

    def epoch(self, fused: int) -> dict[str, Any]:
        if fused not in self.trainers:
            self.trainers[fused] = self._prepare(fused)
            return {}
        start = time.perf_counter()
        logs = self.trainers[fused]()
        seconds = time.perf_counter() - start
        return {"seconds_per_step": seconds / self.workload.epoch_steps, "logs": logs}

    def _prepare(self, fused: int) -> Callable:
        steps = self.workload.epoch_steps
        if steps % fused:
            raise ValueError(
                "An epoch must consist of whole executions. "
                f"Received: {fused} fused steps. Choose a divisor of {steps}."
            )
        train = contenders.load(self.contender)(self.workload, self.strategy, fused)
        train()
        return train


def make_strategy(contender: str, replicas: int) -> tf.distribute.Strategy:
    """The same strategy for all contenders, to compare loops and not reductions.

    One replica has the default strategy, with which stock Keras and a hand-written loop
    are fastest; several have distfit's choice of how CPU devices exchange tensors.
    Several workers have TensorFlow's; distfit's function for it also makes the workers
    agree on random numbers, which is not part of a step.
    """
    if "TF_CONFIG" in os.environ:
        if contender == "distfit":
            return create_strategy("multi_worker")
        return tf.distribute.MultiWorkerMirroredStrategy()
    if replicas == 1:
        return tf.distribute.get_strategy()
    return create_strategy("mirrored", virtual_devices=replicas)


def _end_with_parent() -> None:
    """Ends the process when its parent has ended.

    It may be in a step at that time, waiting for a worker that is gone.
    """
    hangup = select.poll()
    hangup.register(0, 0)
    hangup.poll()
    os._exit(1)


def own_stdout():
    """The stream for answers; from now on libraries print to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # After this one, TensorFlow lists the Python trace and only then what is wrong.
    if lines[0] == "Graph execution error:":
        causes = [line for line in lines if line.startswith("(0)")]
        lines = [cause.removeprefix("(0)").strip() for cause in causes] or lines
    return f"{type(error).__name__}: {lines[0]}"


if __name__ == "__main__":
    main(*sys.argv[1:])
