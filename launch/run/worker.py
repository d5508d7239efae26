"""One process of a run: configuration -> strategy, data, model -> fit or evaluate.

Only files of this folder, and watchdog/heartbeat.py, need TensorFlow. Every worker of a
cluster runs all of it; only the chief reports and writes.
"""

import contextlib
import logging
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

import distfit
from distfit.cluster import workers
from launch.cluster.discovery import Cluster
from launch.errors import RunError, UsageError
from launch.run import (
    earlier,
    input_errors,
    ledger,
    metrics_log,
    saving,
    setup,
    summary,
    verification,
)
from launch.run.metrics_log import MetricsLog
from launch.settings import configuration
from launch.settings.flags import CommandLine
from launch.watchdog import progress, signals
from launch.watchdog.heartbeat import Heartbeat
from launch.watchdog.watch import Watch

_LOADED = time.time()


def run(
    command_line: CommandLine,
    model: str,
    cluster: Cluster | None,
    watch: Watch,
) -> bool:
    """Runs the command and prints a summary.

    Args:
        command_line: the parsed command line.
        model: the resolved model.
        cluster: the cluster that this process is a worker of, if any.
        watch: what looks after this process from here on.

    Returns:
        False if `verify` found differences, otherwise True.

    Raises:
        UsageError: the input is invalid; nothing was trained.
    """
    if command_line.command == "verify":
        return verification.run(command_line, model)
    with watch.watchdog as watchdog:
        with input_errors.as_usage_errors():
            made = setup.prepare(command_line, model, cluster, watchdog)
        watchdog.note(0, progress.BEFORE_STEPS)
        does = train if command_line.command == "train" else evaluate
        rows = does(made, command_line, watch)
        distfit.wait_for_all(made.strategy)  # Leaving early would fail the others.
    if cluster is None or cluster.is_chief:
        print(summary.table({**_description(made), **rows}))
    return True


def train(run: setup.Run, command_line: CommandLine, watch: Watch) -> dict[str, Any]:
    """Trains, writes the results to the working folder and returns what to report."""
    _show_information()
    checkpoints = saving.checkpoints(run.config)
    non_finite = distfit.callbacks.NonFinite(run.config.on_non_finite)
    fresh, finished = _look_back(run, command_line.cluster.get("fresh", False))
    if finished:
        return {
            "finished": "before; give more --epochs to go on, or --fresh to start anew",
            "results": run.folder,
        }
    began: list[float] = []

    def begin(epoch: int, logs: Any) -> None:
        # Only once fit() has accepted everything: a rejected run must not overwrite an
        # earlier one.
        if not began and run.writes:
            configuration.write(run.config)
        began.append(time.monotonic())

    def prepare(logs: Any) -> None:
        if run.writes:
            earlier.enter(run.folder)
        if fresh and run.writes:
            earlier.set_aside(run.folder)

    log = MetricsLog(run.folder / metrics_log.FILE if run.writes else None, non_finite)
    times = ledger.Ledger(watch.began, _LOADED, checkpoints)
    callbacks = [
        keras.callbacks.LambdaCallback(on_train_begin=prepare, on_epoch_begin=begin),
        Heartbeat(watch.watchdog),
        non_finite,
        *run.callbacks,
        *([checkpoints] if checkpoints else []),
        times,
        log,
    ]
    with (
        input_errors.as_usage_errors(unless=lambda: bool(began)),
        _stops_gently(checkpoints, watch.signals, run.writes),
    ):
        history = distfit.fit(
            run.model,
            **_named(run.train),
            **_options(run),
            epochs=run.config.epochs,
            steps_per_epoch=run.config.steps_per_epoch,
            validation_data=run.validation if _evaluates(run.model) else None,
            callbacks=callbacks,
            resume_from=None if fresh else run.folder / saving.CHECKPOINTS,
        )
    seconds = round(time.monotonic() - began[0], 1) if began else 0.0
    done = {"epochs": len(history.epoch), "seconds": seconds}
    last = {name: values[-1] for name, values in history.history.items()}
    watch.watchdog.note(0, "saving")
    step = checkpoints.saved_step if checkpoints else None
    with _folder_to_save_in(run) as folder:
        saved = saving.save(run.model, folder, run.config.epochs, step)
    spent = times.end()
    log.write({"ledger": spent})
    return {
        **done,
        **last,
        "time": f"{ledger.text(spent)} (seconds)",
        "saved": saved,
        "results": run.folder,
    }


def _show_information() -> None:
    """Prints what distfit logs as information: where it goes on, if not verbose."""
    logger = logging.getLogger("distfit")
    logger.setLevel(logging.INFO)
    logger.addFilter(_printed)  # A handler would have to show the warnings as well.


def _printed(record: logging.LogRecord) -> bool:
    """Prints information; whether a record is to be logged still."""
    if record.levelno == logging.INFO:
        print(record.getMessage(), flush=True)
    return record.levelno != logging.INFO


def _look_back(run: setup.Run, fresh: bool) -> tuple[bool, bool]:
    """Whether to start anew, and whether nothing is left to train.

    Both as the chief finds it in the working folder.

    Raises:
        UsageError: on all workers, if the run cannot go on from what there is.
    """
    finished, error = False, ""
    try:
        if run.writes:
            earlier.lock(run.folder)
            fresh = fresh and not earlier.was_set_aside(run.folder)
            finished = not fresh and earlier.check(run.config)
    except UsageError as problem:
        error = str(problem)
    team = workers.of(run.strategy)
    told = team.from_chief("the earlier run", (fresh, finished, error))
    fresh, finished, error = told
    if error:
        raise UsageError(error)
    return fresh, finished


@contextlib.contextmanager
def _stops_gently(
    checkpoints: distfit.callbacks.Checkpoint | None,
    stop_signals: signals.Signals,
    writes: bool,
) -> Iterator[None]:
    """Lets the first signal save and end the training, where it is saved at all."""
    if checkpoints is None:
        yield
        return
    try:
        with stop_signals.asking(checkpoints.request_stop):
            yield
    except SystemExit:
        if writes and checkpoints.is_stopping and checkpoints.latest is not None:
            how = (
                "Saved to"
                if checkpoints.has_stopped
                else "Ended at once; the latest is"
            )
            again = "the same command goes on from there"
            print(f"{how} {checkpoints.latest}: {again}.", flush=True)
        raise
    except distfit.callbacks.SaveError as error:
        raise RunError(str(error)) from error


@contextlib.contextmanager
def _folder_to_save_in(run: setup.Run) -> Iterator[pathlib.Path]:
    """The working folder on the chief, a temporary one elsewhere: all have to save."""
    if run.writes:
        yield run.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


def evaluate(run: setup.Run, command_line: CommandLine, watch: Watch) -> dict[str, Any]:
    """Evaluates the weights in the working folder and returns what to report."""
    if run.validation is None or not _evaluates(run.model):
        raise UsageError(
            "This model cannot be evaluated: it has no loss and no test_step, or there "
            f"is no validation data. Received: model={run.config.model!r}, "
            f"dataset={run.config.dataset!r}. Add what is missing."
        )
    if run.writes:
        recorded = configuration.recorded(run.folder)
        earlier.tell_changes("Evaluating", recorded, run.config)
    data = _named(run.validation)
    with input_errors.as_usage_errors():
        if not run.model.built:  # a subclass creates its weights when it sees data
            batch_size = run.config.batch_size
            distfit.evaluate(
                run.model, **data, batch_size=batch_size, steps=1, verbose=0
            )
        loaded = saving.load_weights(run.model, run.config, command_line.weights)
        results = distfit.evaluate(
            run.model,
            **data,
            **_options(run),
            callbacks=[Heartbeat(watch.watchdog)],
            return_dict=True,
        )
    return {"dataset": run.config.dataset, "weights": loaded, **results}


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
