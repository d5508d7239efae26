"""Every private Keras name that distfit touches, each with its reason.

Nothing else in the package imports from `keras.src` or uses a private attribute of a
Keras object. `tests/test_keras.py` fails when a name moves or when Keras changes what
is relied on.

| names | why |
|---|---|
| `get_data_adapter`, `ArrayDataAdapter` | arrays, datasets, PyDatasets, generators, \
data frames, torch loaders: Keras makes each a `tf.data.Dataset`, with its own checks |
| `train_validation_split`, `class_weight_to_sample_weights` | `validation_split` and \
`class_weight`, as Keras means them |
| `apply_mask`, `squeeze_or_expand_to_same_rank` | masks and weights of a loss |
| `CompileLoss`, `CompileMetrics` | where `compile()` keeps losses and metrics |
| `BaseOptimizer` | the update loops that know nothing of tf.distribute |
| `Functional`, `functional_init_arguments` | what `Model(inputs, outputs)` is |
| `_loss_module`, `_seed_module`, `global_state` | see below, where they are used |
| `concat`, `join_batches`, `to_numpy` | predictions of any kind, joined |
| `pythonify_logs`, `is_default` | logs as numbers; hooks that do nothing |
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import trainer as _tensorflow_trainer
from keras.src.losses import loss as _loss_module
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank
from keras.src.models.functional import Functional
from keras.src.models.model import functional_init_arguments
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.random import seed_generator as _seed_module
from keras.src.trainers.compile_utils import CompileLoss, CompileMetrics
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter_utils import (
    class_weight_to_sample_weights,
)
from keras.src.utils.python_utils import is_default, pythonify_logs

concat = _tensorflow_trainer.concat
join_batches = _tensorflow_trainer.potentially_ragged_concat
to_numpy = _tensorflow_trainer.convert_to_np_if_not_ragged

__all__ = [
    "ArrayDataAdapter",
    "CompileLoss",
    "CompileMetrics",
    "Functional",
    "apply_mask",
    "class_weight_to_sample_weights",
    "concat",
    "functional_init_arguments",
    "get_data_adapter",
    "join_batches",
    "pythonify_logs",
    "squeeze_or_expand_to_same_rank",
    "to_numpy",
    "train_validation_split",
]


# --- Models: what stock `fit()` and `evaluate()` ask of them.


def initial_epoch(model: keras.Model) -> int | None:
    """The epoch at which a callback, such as BackupAndRestore, wants to begin."""
    return model._initial_epoch


def should_evaluate(model: keras.Model, epoch: int, validation_freq: Any) -> bool:
    """Whether validation is due after an epoch."""
    return model._should_eval(epoch, validation_freq)


def in_order_of_metrics(model: keras.Model, logs: dict) -> Any:
    """Logs as a list, or a number if there is one, as `evaluate()` returns them."""
    return model._flatten_metrics_in_order(logs)


def wrap_losses(compile_loss: CompileLoss, wrap: Callable) -> None:
    """Replaces the loss of every output, once it is known which outputs there are."""
    compile_loss._flat_losses = [
        entry._replace(loss=wrap(entry.loss)) for entry in compile_loss._flat_losses
    ]


def metrics_of(compile_metrics: CompileMetrics) -> Any:
    """The metrics as they were passed to `compile()`."""
    return compile_metrics._user_metrics or compile_metrics._user_weighted_metrics


# --- Losses: Keras divides by the number of replicas, and multiplies again to report.


def set_aside_loss_scaling(when: Callable[[], bool]) -> None:
    """Makes Keras's own scaling by the number of replicas the identity where `when()`.

    Inside a distfit step a loss is already that of the global batch. Outside of one,
    Keras's behaviour is untouched.
    """
    for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
        setattr(_loss_module, name, _unless(when, getattr(_loss_module, name)))


def _unless(when: Callable[[], bool], scale: Callable) -> Callable:
    @functools.wraps(scale)
    def gated(value):
        return value if when() else scale(value)

    return gated


def intercept_losses(when: Callable[[], bool], wrap: Callable) -> None:
    """Calls `wrap(loss)` in place of any `keras.losses.Loss` where `when()`.

    This reaches losses that are no attributes of a model. One that a layer calls stays
    what it is: what the layer adds with `add_loss` is made global later.
    """
    call = keras.losses.Loss.__call__

    @functools.wraps(call)
    def intercepted(self, y_true, y_pred, sample_weight=None):
        own_call = type(self).__call__ is not keras.losses.Loss.__call__
        unreduced = getattr(self, "reduction", None) in (None, "none")
        if own_call or unreduced or _in_layer_call() or not when():
            return call(self, y_true, y_pred, sample_weight)
        return wrap(self)(y_true, y_pred, sample_weight)

    keras.losses.Loss.__call__ = intercepted


def _in_layer_call() -> bool:
    return global_state.get_global_attribute("current_call_ctx") is not None


def mask_of(tensor: Any) -> Any:
    """The mask that a layer attached to its output, or None."""
    return getattr(tensor, "_keras_mask", None)


# --- Layers: the losses of a forward pass, kept on the layers themselves.


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and all its layers, nested ones included."""
    return list(model._flatten_layers())


def replace_losses(when: Callable[[], bool], collect: Callable) -> None:
    """Makes `layer.losses`, for every layer and model, `collect(layer)` where `when()`.

    A step may read them from the model or from a part of it, such as an encoder.
    """
    stock = keras.layers.Layer.losses.fget

    def losses(self):
        """List of scalar losses from `add_loss`, regularizers and sublayers."""
        if when() and not self._losses_override:
            return collect(self)
        return stock(self)

    keras.layers.Layer.losses = property(losses)


def own_losses(layer: keras.layers.Layer) -> list:
    """What `add_loss` and the activity regularizer of this one layer added."""
    return layer._get_own_losses()


def regularization_losses(model: keras.Model) -> list:
    """The penalties of the model's regularised weights."""
    return model._get_regularization_losses()


def layer_losses(model: keras.Model) -> list[tuple]:
    """A snapshot of the losses collected so far, to hand to `set_layer_losses`.

    Replicas are traced by threads that take turns at every collective, and all of them
    collect into the same lists: each must find its own again.
    """
    return [(layer, list(layer._losses)) for layer in layers_of(model)]


def set_layer_losses(snapshot: list[tuple]) -> None:
    """Puts back the losses of a `layer_losses` snapshot."""
    for layer, losses in snapshot:
        layer._losses[:] = losses


def set_moments(layer: keras.layers.BatchNormalization, moments: Callable) -> None:
    """Makes `moments(layer, inputs, mask)` the source of a layer's statistics."""
    layer._moments = types.MethodType(moments, layer)


def own_moments(layer: keras.layers.BatchNormalization, inputs, mask) -> Any:
    """The statistics of the rows at hand, as the class of the layer takes them."""
    return type(layer)._moments(layer, inputs, mask)


def reduction_axes(layer: keras.layers.BatchNormalization) -> list[int]:
    """The axes over which a BatchNormalization takes its statistics."""
    return list(layer._reduction_axes)


# --- Metrics.


def tracked_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Every metric that is an attribute of the model or of one of its layers."""
    return [m for layer in layers_of(model) for m in layer._metrics]


# --- Optimizers.

_PLAIN = {
    "_backend_update_step": BaseOptimizer._backend_update_step,
    "_apply_weight_decay": BaseOptimizer._apply_weight_decay,
    "_overwrite_model_variables_with_average_value": (
        BaseOptimizer._overwrite_model_variables_with_average_value
    ),
    "_backend_increment_gradient_accumulators": (
        BaseOptimizer._backend_increment_gradient_accumulators
    ),
}
_PLAIN_LOSS_SCALE = {
    "_tf_apply": keras.optimizers.LossScaleOptimizer._common_apply,
}


@contextlib.contextmanager
def plain_updates(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Lets an optimizer update the local copies of variables, as on one device.

    The methods that Keras overrides for tf.distribute would aggregate once more, and
    cannot run inside a `tf.cond`. For the time of the block their backend-agnostic
    originals stand in, and the class's own `apply` for one that was adapted.
    """
    replaced = [(target, dict(vars(target))) for target, _ in _plain(optimizer)]
    try:
        for target, methods in _plain(optimizer):
            for name, function in {**methods, "apply": type(target).apply}.items():
                target.__dict__[name] = functools.partial(function, target)
        yield
    finally:
        for target, attributes in replaced:
            for name in (*_PLAIN, *_PLAIN_LOSS_SCALE, "apply"):
                target.__dict__.pop(name, None)
                if name in attributes:
                    target.__dict__[name] = attributes[name]


def _plain(optimizer: Any) -> list[tuple[Any, dict]]:
    """The optimizer, and the one inside a LossScaleOptimizer, with their methods."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = optimizer.inner_optimizer
        return [(optimizer, _PLAIN_LOSS_SCALE), (inner, _PLAIN)]
    return [(optimizer, _PLAIN)]


# --- Randomness.


def offset_seeds(offset: Callable[[], Any]) -> None:
    """Adds `offset()` to every seed that a `SeedGenerator` hands out, unless None.

    The state of the generator stays what it is on one device, equal on all replicas:
    nothing has to be done after building, saving or restoring it.
    """
    draw = _seed_module.SeedGenerator.next

    @functools.wraps(draw)
    def next_with_offset(self, *args, **kwargs):
        seed = draw(self, *args, **kwargs)
        shift = offset()
        if shift is None:
            return seed
        return seed + tf.stack([tf.cast(shift, seed.dtype), tf.zeros((), seed.dtype)])

    _seed_module.SeedGenerator.next = next_with_offset


@contextlib.contextmanager
def global_seed_generator(generator: Any) -> Iterator[None]:
    """Makes `generator`, or none at all, the source of unseeded draws in this thread.

    Keras keeps its global generator per thread, so in a replica's thread it would try
    to create a variable in the middle of the step.
    """
    name = _seed_module.GLOBAL_SEED_GENERATOR
    previous = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, generator)
    try:
        yield
    finally:
        global_state.set_global_attribute(name, previous)


@contextlib.contextmanager
def new_global_seed_generator(made: list) -> Iterator[None]:
    """Hides the global generator; one that is made meanwhile is appended to `made`."""
    with global_seed_generator(None):
        yield
        made.append(
            global_state.get_global_attribute(_seed_module.GLOBAL_SEED_GENERATOR)
        )


def listens(callback: keras.callbacks.Callback, hook: str) -> bool:
    """Whether a callback does something in a batch hook.

    Keras's `on_train_batch_*` call `on_batch_*`, which may be what is overridden.
    """
    older = hook.replace("_train", "")
    return not (
        is_default(getattr(callback, hook))
        and is_default(getattr(callback, older, getattr(callback, hook)))
    )
