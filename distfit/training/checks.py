"""Checks of a model before its steps are compiled."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from distfit import _keras


def optimizers_of(
    model: keras.Model, inner: bool = False
) -> list[keras.optimizers.Optimizer]:
    """The optimizers that are attributes of a model, and on request those in them."""
    found: dict[int, keras.optimizers.Optimizer] = {}
    for value in vars(model).values():
        items = value.values() if isinstance(value, dict) else [value]
        for item in value if isinstance(value, list | tuple) else items:
            if isinstance(item, keras.optimizers.Optimizer):
                found[id(item)] = item
    outer = list(found.values())
    return [o for each in outer for o in _keras.with_inner(each)] if inner else outer


def learning_rates(model: keras.Model) -> list[keras.Variable]:
    """The learning rates that can be set: a schedule is the same everywhere."""
    optimizers = optimizers_of(model, inner=True)
    rates = (getattr(each, "learning_rate", None) for each in optimizers)
    return list({id(r): r for r in rates if isinstance(r, keras.Variable)}.values())


def runs_eagerly(model: keras.Model) -> bool:
    """Whether the model or TensorFlow is set to run steps eagerly."""
    return model.run_eagerly or tf.config.functions_run_eagerly()


def check_compiled(model: keras.Model, method: str) -> None:
    """Raises a `ValueError` if `compile()` was not called."""
    if not model.compiled:
        raise ValueError(
            f"You must call `compile()` before calling `{method}()`. Received: a model "
            f"{model.name!r} that is not compiled."
        )


def check_runs_steps(model: keras.Model, kind: str) -> None:
    """Raises a `ValueError` if a model overrides `make_{kind}_function`."""
    if _is_overridden(model, f"make_{kind}_function"):
        raise ValueError(
            f"distfit runs `{kind}_step` itself and would ignore the model's own "
            f"`make_{kind}_function`. Received: {type(model).__name__}, which "
            f"overrides it. Put what it does into `{kind}_step`."
        )


def outside_of_scopes(method: Callable) -> Callable:
    """Lets a method run as outside of `strategy.scope()`, where it is called within.

    Raises:
        ValueError: when called with a model made outside of the scope.
    """

    @functools.wraps(method)
    def run(model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if not tf.distribute.in_cross_replica_context():
            return method(model, *args, **kwargs)
        strategy = model.distribute_strategy
        with _keras.outside_of_scopes():
            if model.distribute_strategy is not strategy:
                raise _outside(model, strategy, "a call within the scope")
            return method(model, *args, **kwargs)

    return run


def check_in_scope(model: keras.Model) -> None:
    """Raises a `ValueError` if a model was built outside the scope of its strategy.

    Single variables from outside are fine: each worker has one copy of them.
    """
    strategy = model.distribute_strategy
    values = [_keras.underlying(variable) for variable in model.variables]
    created = strategy.extended.variable_created_in_scope
    if values and not any(created(value) for value in values):
        raise _outside(model, strategy, f"variable {model.variables[0].path!r}")


def _outside(
    model: keras.Model, strategy: tf.distribute.Strategy, received: str
) -> ValueError:
    return ValueError(
        f"The model {model.name!r} was built outside the scope of the strategy. "
        f"Received: {received} and strategy {type(strategy).__name__} with "
        f"{strategy.num_replicas_in_sync} replica(s). Create it inside "
        "`with strategy.scope():`."
    )


_STEPS = (
    *("train_step", "test_step", "predict_step"),
    *("compute_loss", "compute_metrics", "get_metrics_result"),
)


# LossScaleOptimizer is left out: its first step runs before it has a loss scale.
_OPTIMIZERS = {
    value for value in vars(keras.optimizers).values() if isinstance(value, type)
}.difference([keras.optimizers.LossScaleOptimizer])


def does_the_same_again(model: keras.Model, made: list[tf.Variable]) -> bool:
    """Whether the steps of a model are certain to do the same a second time.

    True for the steps of `keras.Model` itself, if they created only the variables that
    `compile()` leaves to the first step.

    Args:
        model: The model.
        made: The variables that a step created, or their copies.
    """
    if any(name in vars(model) or _is_overridden(model, name) for name in _STEPS):
        return False
    optimizer = model.optimizer
    if type(optimizer) not in _OPTIMIZERS:
        return False
    compiled = set(model.metrics).difference(_keras.tracked_metrics(model))
    variables = [*optimizer.variables]
    for metric in compiled:
        variables += metric.variables
    expected: set[int] = set()
    for variable in map(_keras.underlying, variables):
        copies = model.distribute_strategy.experimental_local_results(variable)
        expected.update(map(id, [variable, *copies]))
    return expected.issuperset(map(id, made))


def _is_overridden(model: keras.Model, name: str) -> bool:
    return getattr(type(model), name) is not getattr(keras.Model, name)


def check_metrics(model: keras.Model) -> None:
    """Checks that metrics are updated by the step and will be reset.

    Raises:
        ValueError: if metrics were compiled that the step never updates.
    """
    for metric in model.metrics:
        if isinstance(metric, _keras.CompileMetrics) and not metric.built:
            raise ValueError(
                "Metrics were passed to `compile()` that the step never updates. "
                f"Received: {type(model).__name__} with "
                f"metrics={_keras.metrics_of(metric)}. Call "
                "`self.compute_metrics(x, y, y_pred)` in the step, or leave them "
                "out of `compile()`."
            )
    missing = set(_keras.tracked_metrics(model)) - set(model.metrics)
    for name in sorted(metric.name for metric in missing):
        warnings.warn(
            f"The metric {name!r} is an attribute of the model but not in its "
            "`metrics`, so it is never reset and accumulates over all epochs. Add it "
            "to the `metrics` property.",
            stacklevel=2,
        )


def states_of_metrics(model: keras.Model) -> list[tf.Variable]:
    """The variables of all metrics of a model, which only steps change."""
    states = [v for metric in metrics_of(model) for v in metric.variables]
    return [_keras.underlying(state) for state in states]


def metrics_of(model: keras.Model) -> list[keras.metrics.Metric]:
    """All metrics of a model, including those missing from its `metrics`."""
    return list(dict.fromkeys([*model.metrics, *_keras.tracked_metrics(model)]))
