"""What must be there before a step is compiled, and is checked before any work."""

import warnings
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from distfit import _keras, metrics, strategy


def build_layers(model: keras.Model, spec: Any) -> None:
    """Builds the layers of a subclassed model for batches of the given spec.

    A model without a `call`, or with one that takes something else than a batch, as
    that of a GAN may, is built by its step from parts that are built.
    """
    parts = [layer for layer in _keras.layers_of(model) if layer is not model]
    if model.built or (parts and all(layer.built for layer in parts)):
        return
    if type(model).call is keras.Model.call:
        return
    x = spec[0] if isinstance(spec, tuple) else spec
    with model.distribute_strategy.scope():
        model(tree.map_structure(_symbolic, x))


def _symbolic(spec: tf.TensorSpec) -> keras.KerasTensor:
    return keras.KerasTensor(spec.shape, spec.dtype.name)


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The optimizers that are attributes of a model."""
    found: dict[int, keras.optimizers.Optimizer] = {}
    for value in vars(model).values():
        items = value.values() if isinstance(value, dict) else [value]
        for item in value if isinstance(value, list | tuple) else items:
            if isinstance(item, keras.optimizers.Optimizer):
                found[id(item)] = item
    return list(found.values())


def check_compiled(model: keras.Model, method: str) -> None:
    """Raises a `ValueError` if `compile()` was not called."""
    if not model.compiled:
        raise ValueError(
            f"You must call `compile()` before calling `{method}()`. Received: a model "
            f"{model.name!r} that is not compiled."
        )


def check_in_scope(model: keras.Model) -> None:
    """Raises a `ValueError` naming what was built outside the strategy's scope."""
    used = model.distribute_strategy
    if used.num_replicas_in_sync == 1:
        return
    strategy.check_created_in_scope(used, f"The model {model.name!r}", model.weights)
    for optimizer in optimizers_of(model):
        what = f"The optimizer {optimizer.name!r}"
        strategy.check_created_in_scope(used, what, optimizer.variables)
    for metric in metrics.all_of(model):
        what = f"The metric {metric.name!r}"
        strategy.check_created_in_scope(used, what, metric.variables)


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
            "`metrics`, so it is never reset: it will mix epochs. Add it to the "
            "`metrics` property.",
            stacklevel=2,
        )
