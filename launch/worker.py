"""One process of a run: configuration -> strategy, data, model -> fit or evaluate.

With parts.py, saving.py, metrics_log.py and verification.py the only files here that
need TensorFlow.
"""

import sys
import time
from typing import Any

import keras

import distfit
from launch import configuration, parts, refusals, saving, summary, verification
from launch.errors import UsageError
from launch.flags import CommandLine
from launch.metrics_log import MetricsLog

METRICS_FILE = "metrics.jsonl"


def run(command_line: CommandLine, model: str) -> bool:
    """Does what the command line asks for and prints a summary.

    Args:
        command_line: what was asked for.
        model: the model that it comes down to.

    Returns:
        Whether all is well: `verify` may find that it is not.

    Raises:
        UsageError: something given is wrong; nothing was trained.
    """
    if command_line.command == "verify":
        return verification.run(command_line, model)
    with refusals.as_usage_errors():
        made = parts.prepare(command_line, model)
    rows = train(made) if command_line.command == "train" else evaluate(made)
    print(summary.table({**_description(made), **rows}))
    return True


def train(run: parts.Run) -> dict[str, Any]:
    """Trains, writes the results to the working folder and returns what to report."""
    log = MetricsLog(run.folder / METRICS_FILE)
    # Not before fit() has accepted everything: a refused run leaves an older one alone.
    keep = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: configuration.write(run.config)
    )
    began = time.monotonic()
    with refusals.as_usage_errors(unless=lambda: log.began):
        history = run.model.fit(
            **_named(run.train),
            **_options(run),
            epochs=run.config.epochs,
            steps_per_epoch=run.config.steps_per_epoch,
            validation_data=run.validation if _evaluates(run.model) else None,
            callbacks=[keep, distfit.callbacks.NonFinite(), *run.callbacks, log],
        )
    seconds = round(time.monotonic() - began, 1)
    done = {"epochs": len(history.epoch), "seconds": seconds}
    last = {name: values[-1] for name, values in history.history.items()}
    saved = saving.save(run.model, run.folder)
    return {**done, **last, "saved": saved, "results": run.folder}


def evaluate(run: parts.Run) -> dict[str, Any]:
    """Evaluates the weights in the working folder and returns what to report."""
    if run.validation is None or not _evaluates(run.model):
        raise UsageError(
            "This model cannot be evaluated: it has no loss and no test_step, or there "
            f"is no validation data. Received: model={run.config.model!r}, "
            f"dataset={run.config.dataset!r}. Add what is missing."
        )
    data = _named(run.validation)
    with refusals.as_usage_errors():
        if not run.model.built:  # a subclass makes its weights when it sees data
            batch_size = run.config.batch_size
            run.model.evaluate(**data, batch_size=batch_size, steps=1, verbose=0)
        saving.load_weights(run.model, run.folder)
        return run.model.evaluate(**data, **_options(run), return_dict=True)


def _named(data: Any) -> dict[str, Any]:
    """Names what `fit()` takes: a tuple of up to x, y, sample_weight, or x alone."""
    if not isinstance(data, tuple):
        data = (data,)
    return dict(zip(("x", "y", "sample_weight"), data, strict=False))


def _options(run: parts.Run) -> dict[str, Any]:
    verbose = run.config.verbose
    if verbose is None:  # a bar needs a terminal to redraw itself on
        verbose = 1 if sys.stdout.isatty() else 2
    return {"batch_size": run.config.batch_size, "verbose": verbose}


def _evaluates(model: distfit.Model) -> bool:
    """Whether `evaluate()` has something to compute; a GAN, say, has no single loss."""
    own = ("test_step", "compute_loss")
    overridden = any(
        getattr(type(model), name) is not getattr(distfit.Model, name) for name in own
    )
    return overridden or model.loss is not None


def _description(run: parts.Run) -> dict[str, Any]:
    return {
        "model": run.config.model,
        "strategy": type(run.strategy).__name__,
        "replicas": run.strategy.num_replicas_in_sync,
        "global batch": run.config.batch_size,
    }
