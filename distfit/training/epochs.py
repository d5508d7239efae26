"""Epochs: steps until the data end or a callback stops, and their callbacks."""

from collections.abc import Callable, Collection

import keras

from distfit import _keras
from distfit.callbacks import CallbackList
from distfit.cluster import agreement, workers
from distfit.training import checks
from distfit.training.drivers import step_driver
from distfit.training.global_batches import GlobalBatches
from distfit.training.inputs import check_positive


def check_ready(model, method: str) -> None:
    """Raises a `ValueError` unless `method` can run the steps of a model."""
    checks.check_compiled(model, method)
    checks.check_in_scope(model)
    check_positive("steps_per_execution", model.steps_per_execution)


def callback_list(model, callbacks, verbose, epochs, steps, add_history=False):
    """The list of what a method takes as `callbacks`."""
    if isinstance(callbacks, keras.callbacks.CallbackList):  # With its own settings.
        return CallbackList(
            callbacks.callbacks,
            model=model,
            add_history=add_history,
            team=workers.of(model.distribute_strategy),
            **callbacks.params,
        )
    return CallbackList(
        callbacks,
        team=workers.of(model.distribute_strategy),
        add_history=add_history,
        add_progbar=verbose != 0,
        verbose=verbose,
        epochs=epochs,
        steps=steps,
        model=model,
    )


def run_test(
    model,
    batches: GlobalBatches,
    callbacks: CallbackList,
    after: Callable[[int, bool], None] = lambda step, more: None,
) -> dict:
    """Evaluates a model on all data, with its hooks, and returns the logs."""
    driver = step_driver(model, "test", batches)
    batches.restart()
    model.stop_evaluating = False
    callbacks.on_test_begin()
    logs = run_epoch(model, "test", driver, batches, callbacks, after=after)
    callbacks.on_test_end(logs)
    return logs


def run_epoch(
    model,
    kind: str,
    driver,
    batches: GlobalBatches,
    callbacks: CallbackList,
    step: int = 0,
    after: Callable[[int, bool], None] = lambda step, more: None,
    skipped: Collection[int] = (),
) -> dict[str, float]:
    """Runs an epoch and returns its logs.

    Args:
        model: The model.
        kind: `"train"` or `"test"`.
        driver: Its steps.
        batches: The data.
        callbacks: The callbacks.
        step: How many steps of it were run already, by a training that goes on here.
        after: Called with the number of steps run, and whether the data have more:
            after each execution if they have, and once after the last one.
        skipped: The steps, from 0, whose batches are left out.
    """
    if step == 0:
        driver.reset()
    compilation = _keras.compilation(model)

    def run(steps: int) -> int:
        if _keras.compilation(model) is not compilation:
            raise RuntimeError(
                "A model cannot be compiled while it trains. Received: a call of "
                f"`compile()` in a callback of {model.name!r}. End `fit()` first."
            )
        return driver.run(batches, steps)

    run_steps(
        model, kind, run, batches, callbacks, driver.results, step, after, skipped
    )
    return driver.results_of_epoch()


def run_steps(
    model,
    kind,
    run,
    batches,
    callbacks,
    read,
    step=0,
    after=lambda step, more: None,
    skipped=(),
) -> None:
    """Runs the steps of an epoch, `steps_per_execution` at a time."""
    several_workers = workers.of(model.distribute_strategy).count > 1
    stop = agreement.STOP_FLAGS[kind]
    total = batches.go_on_with_epoch() if step else batches.start_epoch()

    def has_more(step: int) -> bool:
        return (total is None or step < total) and batches.has_next()

    def has_stopped() -> bool:
        # A stop requested on one of several workers waits for the next `settle`.
        settled = callbacks.may_stop_alone[kind] or not several_workers
        return settled and bool(getattr(model, stop))

    if step and has_stopped():  # By the time of the checkpoint that it goes on from.
        total = step
    while has_more(step):
        if step in skipped:
            batches.skip_next()
            step += 1
            batches.ran(step)
            if has_more(step):
                after(step, True)
            continue
        steps = model.steps_per_execution
        if total is not None:
            steps = min(steps, total - step)
        steps = min([steps, *(skip - step for skip in skipped if skip > step)])
        callbacks.batch_begin(kind, step)
        step += run(steps)
        batches.ran(step)
        callbacks.batch_end(kind, step - 1, read)
        if callbacks.may_stop_alone[kind]:
            agreement.settle(model, kind, "the end of an execution")
        if has_more(step):
            after(step, True)
        if has_stopped():
            break
    after(step, False)
    batches.end_epoch(step)
    agreement.check_same_batches(model, kind, batches)
