"""One process of a run: configuration -> strategy, data, model -> fit or evaluate.

Only this file, setup.py, saving.py, metrics_log.py, verification.py and
watchdog/heartbeat.py need TensorFlow. Every worker of a cluster runs all of it; only
the chief reports and writes.
"""

import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

import distfit
from launch.cluster.discovery import Cluster
from launch.errors import UsageError
from launch.run import input_errors, saving, setup, summary, verification
from launch.run.metrics_log import MetricsLog
from launch.settings import configuration
from launch.settings.flags import CommandLine
from launch.watchdog import progress, stall
from launch.watchdog.heartbeat import Heartbeat

METRICS_FILE = "metrics.jsonl"


def run(
    command_line: CommandLine,
    model: str,
    cluster: Cluster | None,
    watchdog: stall.Watchdog,
) -> bool:
    """Runs the command and prints a summary.

    Args:
        command_line: the parsed command line.
        model: the resolved model.
        cluster: the cluster that this process is a worker of, if any.
        watchdog: watches this process from here on.

    Returns:
        False if `verify` found differences, otherwise True.

    Raises:
        UsageError: the input is invalid; nothing was trained.
    """
    if command_line.command == "verify":
        return verification.run(command_line, model)
    with watchdog:
        with input_errors.as_usage_errors():
            made = setup.prepare(command_line, model, cluster, watchdog)
        watchdog.note(0, progress.BEFORE_STEPS)
        does = train if command_line.command == "train" else evaluate
        rows = does(made, watchdog)
        distfit.wait_for_all(made.strategy)  # Leaving early would fail the others.
    if cluster is None or cluster.is_chief:
        print(summary.table({**_description(made), **rows}))
    return True


def train(run: setup.Run, watchdog: stall.Watchdog) -> dict[str, Any]:
    """Trains, writes the results to the working folder and returns what to report."""
    began: list[float] = []

    def begin(logs: Any) -> None:
        # Only once fit() has accepted everything: a rejected run must not overwrite an
        # earlier one.
        began.append(time.monotonic())
        if run.writes:
            configuration.write(run.config)

    callbacks = [
        keras.callbacks.LambdaCallback(on_train_begin=begin),
        Heartbeat(watchdog),
        distfit.callbacks.NonFinite(),
        *run.callbacks,
    ]
    if run.writes:
        callbacks.append(MetricsLog(run.folder / METRICS_FILE))
    with input_errors.as_usage_errors(unless=lambda: bool(began)):
        history = distfit.fit(
            run.model,
            **_named(run.train),
            **_options(run),
            epochs=run.config.epochs,
            steps_per_epoch=run.config.steps_per_epoch,
            validation_data=run.validation if _evaluates(run.model) else None,
            callbacks=callbacks,
        )
    seconds = round(time.monotonic() - began[0], 1)
    done = {"epochs": len(history.epoch), "seconds": seconds}
    last = {name: values[-1] for name, values in history.history.items()}
    watchdog.note(0, "saving")
    with _folder_to_save_in(run) as folder:
        saved = saving.save(run.model, folder)
    return {**done, **last, "saved": saved, "results": run.folder}


@contextlib.contextmanager
def _folder_to_save_in(run: setup.Run) -> Iterator[pathlib.Path]:
    """The working folder on the chief, a temporary one elsewhere: all have to save."""
    if run.writes:
        yield run.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


def evaluate(run: setup.Run, watchdog: stall.Watchdog) -> dict[str, Any]:
    """Evaluates the weights in the working folder and returns what to report."""
    if run.validation is None or not _evaluates(run.model):
        raise UsageError(
            "This model cannot be evaluated: it has no loss and no test_step, or there "
            f"is no validation data. Received: model={run.config.model!r}, "
            f"dataset={run.config.dataset!r}. Add what is missing."
        )
    data = _named(run.validation)
    with input_errors.as_usage_errors():
        if not run.model.built:  # a subclass creates its weights when it sees data
            batch_size = run.config.batch_size
            distfit.evaluate(
                run.model, **data, batch_size=batch_size, steps=1, verbose=0
            )
        saving.load_weights(run.model, run.folder)
        return distfit.evaluate(
            run.model,
            **data,
            **_options(run),
            callbacks=[Heartbeat(watchdog)],
            return_dict=True,
        )


def _named(data: Any) -> dict[str, Any]:
    """Names the parts of a tuple of up to x, y, sample_weight, or of x alone."""
    if not isinstance(data, tuple):
        data = (data,)
    return dict(zip(("x", "y", "sample_weight"), data, strict=False))


def _options(run: setup.Run) -> dict[str, Any]:
    verbose = run.config.verbose
    if verbose is None:  # a progress bar needs a terminal
        verbose = 1 if sys.stdout.isatty() else 2
    return {"batch_size": run.config.batch_size, "verbose": verbose}


def _evaluates(model: keras.Model) -> bool:
    """Whether `evaluate()` has something to compute; a GAN, say, has no single loss."""
    own = ("test_step", "compute_loss")
    overridden = any(
        getattr(type(model), name) is not getattr(keras.Model, name) for name in own
    )
    return overridden or model.loss is not None


def _description(run: setup.Run) -> dict[str, Any]:
    return {
        "model": run.config.model,
        "strategy": _strategy_name(run),
        "replicas": run.strategy.num_replicas_in_sync,
        "global batch": run.config.batch_size,
    }


def _strategy_name(run: setup.Run) -> str:
    several = isinstance(run.strategy, tf.distribute.MultiWorkerMirroredStrategy)
    # The __name__ of TensorFlow's class is a different one.
    return "MultiWorkerMirroredStrategy" if several else type(run.strategy).__name__
