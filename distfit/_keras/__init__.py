"""Every private name of Keras and TensorFlow that distfit touches, with its reason.

Nothing else in the package imports from `keras.src` or `tensorflow.python`, or uses a
private attribute of an object of theirs. `tests/test_keras.py` fails when a name moves
or when what is relied on changes.

| names | why |
|---|---|
| `get_data_adapter`, `ArrayDataAdapter` | arrays, datasets, PyDatasets, generators, \
data frames, torch loaders: Keras makes each a `tf.data.Dataset`, with its own checks |
| `train_validation_split`, `class_weight_to_sample_weights` | `validation_split` and \
`class_weight`, as Keras means them |
| `apply_mask`, `squeeze_or_expand_to_same_rank` | masks and weights of a loss |
| `CompileLoss`, `CompileMetrics` | where `compile()` keeps losses and metrics |
| `BaseOptimizer`, `TFOptimizer` | the update loops that know nothing of \
tf.distribute; where accumulators are made |
| `Functional`, `functional_init_arguments` | what `Model(inputs, outputs)` is |
| `_loss_module`, `_seed_module`, `_backend_random`, `global_state` | see below, where \
they are used |
| `concat`, `join_batches`, `to_numpy` | predictions of any kind, joined |
| `pythonify_logs`, `is_default` | logs as numbers; hooks that do nothing |
| `tf_context` | the seed of TensorFlow's random operations, to compare on workers |
"""

import contextlib
import functools
import inspect
import random
import threading
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import random as _backend_random
from keras.src.backend.tensorflow import trainer as _tensorflow_trainer
from keras.src.backend.tensorflow.optimizer import TFOptimizer
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
from tensorflow.python.eager import context as tf_context

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


def compilation(model: keras.Model) -> Any:
    """An object that is a new one after each `compile()`."""
    return model._compile_config


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


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask, unless it is None, to a tensor as layers do."""
    if mask is not None:
        tensor._keras_mask = mask


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


def set_layer_losses(snapshot: Iterable[tuple]) -> None:
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


def intercept_calls(find: Callable[[], Any], wrap: Callable) -> None:
    """Calls `wrap(found, layer, call)` in place of a layer, where `find()` finds."""
    stock = keras.layers.Layer.__call__

    @functools.wraps(stock)
    def intercepted(self, *args, **kwargs):
        found = find()
        if found is None:
            return stock(self, *args, **kwargs)
        return wrap(found, self, functools.partial(stock, self, *args, **kwargs))

    keras.layers.Layer.__call__ = intercepted


# --- Metrics.


def tracked_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Every metric that is an attribute of the model or of one of its layers."""
    return [m for layer in layers_of(model) for m in layer._metrics]


def is_compiled(metric: keras.metrics.Metric) -> bool:
    """Whether it stands for the metrics that were passed to `compile()`."""
    return isinstance(metric, CompileMetrics)


def parts_of(metric: keras.metrics.Metric) -> list[keras.metrics.Metric]:
    """A metric, or those that `compile()` has made one of."""
    return metric.metrics if isinstance(metric, CompileMetrics) else [metric]


# --- Variables.


def underlying(variable: Any) -> tf.Variable:
    """The TensorFlow variable, also in a scope where Keras shows another value."""
    return variable._value if isinstance(variable, keras.Variable) else variable


@contextlib.contextmanager
def fresh_names() -> Iterator[None]:
    """Numbers the names of new layers, metrics and variables from the start.

    A function that makes a model gives its parts the same names each time then.
    """
    name = "object_name_uids"
    before = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, None)
    try:
        yield
    finally:
        global_state.set_global_attribute(name, before)


# --- Optimizers.

_PLAIN = (
    "_backend_update_step",
    "_apply_weight_decay",
    "_overwrite_model_variables_with_average_value",
    "_backend_increment_gradient_accumulators",
)
_updating = threading.local()


@contextlib.contextmanager
def plain_updates() -> Iterator[None]:
    """Lets optimizers update the local copies of variables, as on one device.

    The methods that Keras overrides for tf.distribute would aggregate once more, and
    cannot run inside a `tf.cond`. For the time of the block their backend-agnostic
    originals stand in. What a class of optimizers overrides stays overridden.
    """
    _updating.plainly = True
    try:
        yield
    finally:
        _updating.plainly = False


def in_plain_updates() -> bool:
    """Whether this thread is in a `plain_updates` block."""
    return getattr(_updating, "plainly", False)


def allow_plain_updates() -> None:
    """Makes `plain_updates` effective; outside of its blocks nothing changes."""
    for name in _PLAIN:
        method = _plainly(getattr(TFOptimizer, name), getattr(BaseOptimizer, name))
        setattr(TFOptimizer, name, method)
    loss_scale = keras.optimizers.LossScaleOptimizer
    loss_scale._tf_apply = _plainly(loss_scale._tf_apply, loss_scale._common_apply)


def _plainly(distributed: Callable, plain: Callable) -> Callable:
    @functools.wraps(distributed)
    def either(self, *args, **kwargs):
        method = plain if in_plain_updates() else distributed
        return method(self, *args, **kwargs)

    return either


def with_inner(optimizer: Any) -> list[keras.optimizers.Optimizer]:
    """An optimizer and those inside a LossScaleOptimizer or a MultiOptimizer."""
    inner: list = []
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = [optimizer.inner_optimizer]
    elif isinstance(optimizer, keras.optimizers.MultiOptimizer):
        inner = optimizer.optimizers
    return [optimizer, *(found for part in inner for found in with_inner(part))]


def variables_of(optimizer: keras.optimizers.Optimizer) -> list:
    """The variables that an optimizer was built for."""
    return optimizer._trainable_variables


def accumulators(optimizer: keras.optimizers.Optimizer, variables: list) -> dict:
    """The gradient accumulators of an optimizer, by the places of their variables.

    Except for variables of which a "gradient" is the new value.
    """
    if not optimizer.gradient_accumulation_steps:
        return {}
    indices = optimizer._trainable_variables_indices
    keys = {
        place: optimizer._var_key(variable)
        for place, variable in enumerate(variables)
        if not optimizer._overwrite_variable_with_gradient(variable)
    }
    return {
        place: optimizer._accumulated_gradients[indices[key]]
        for place, key in keys.items()
        if key in indices
    }


def is_update_step(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Whether an accumulating optimizer updates its variables at the next `apply`."""
    return (optimizer._iterations + 1) % optimizer.gradient_accumulation_steps == 0


def sum_accumulators_on_read() -> None:
    """Makes gradient accumulators variables of which each replica has its own part.

    Their value, where one is read, saved or restored, is the sum over the replicas, as
    is that of a metric's variables: what one device has accumulated.
    """
    stock = TFOptimizer.add_variable_from_reference

    def summed_on_read(next_creator, **kwargs):
        kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
        kwargs["aggregation"] = tf.VariableAggregation.SUM
        return next_creator(**kwargs)

    @functools.wraps(stock)
    def add(self, reference_variable, name=None, initializer="zeros"):
        replaced = self._overwrite_variable_with_gradient(reference_variable)
        if name != "gradient_accumulator" or replaced:
            return stock(self, reference_variable, name, initializer)
        with tf.variable_creator_scope(summed_on_read):
            return stock(self, reference_variable, name, initializer)

    TFOptimizer.add_variable_from_reference = add


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


# What draws, and where each finds the tensors whose rows it draws for.
_DRAWS_OF_A_SHAPE = (
    "normal",
    "uniform",
    "randint",
    "truncated_normal",
    "gamma",
    "binomial",
    "beta",
)
_DRAWS_FOR_INPUTS = ("dropout", "shuffle", "categorical")


@contextlib.contextmanager
def composed_draws(for_shape: Callable, for_inputs: Callable) -> Iterator[None]:
    """Draws through `for_shape(draw, shape, seed)` or `for_inputs(draw, inputs, seed)`.

    `draw(shape or inputs, seed)` is Keras's own, and `seed` what it would have drawn
    with. Layers and `keras.random` alike look these functions up on one module.
    """
    stock = {
        name: getattr(_backend_random, name)
        for name in _DRAWS_OF_A_SHAPE + _DRAWS_FOR_INPUTS
    }

    def composed(draw: Callable, compose: Callable) -> Callable:
        signature = inspect.signature(draw)
        of = next(iter(signature.parameters))  # The shape, or the inputs.

        @functools.wraps(draw)
        def drawn(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            seed = given.pop("seed", None)

            def draw_part(part, part_seed):
                return draw(
                    **{**given, **_noise_of(part, given), of: part}, seed=part_seed
                )

            return compose(draw_part, given[of], seed)

        return drawn

    try:
        for name, draw in stock.items():
            compose = for_inputs if name in _DRAWS_FOR_INPUTS else for_shape
            setattr(_backend_random, name, composed(draw, compose))
        yield
    finally:
        for name, draw in stock.items():
            setattr(_backend_random, name, draw)


def _noise_of(part: Any, given: dict) -> dict:
    """The `noise_shape` of dropout for some of the rows."""
    if given.get("noise_shape") is None:
        return {}
    rows, *rest = given["noise_shape"]
    return {"noise_shape": (tf.shape(part)[0] if tf.is_tensor(rows) else rows, *rest)}


class SharedSeed:
    """One seed, drawn from a generator when first asked for, for several draws.

    Args:
        seed: What `keras.random` takes: a generator, a number or None.
    """

    def __init__(self, seed: Any):
        self._seed = seed
        self._drawn: Any = None

    def shifted(self, shift: int) -> keras.random.SeedGenerator:
        """A generator of this seed plus `shift`; a number is never shifted."""
        shift = 0 if isinstance(self._seed, int) else shift
        return _ShiftedSeed(self, tf.constant(shift, tf.int64))

    def draw(self) -> tf.Tensor:
        if self._drawn is None:
            self._drawn = _seed_module.draw_seed(self._seed)
        return self._drawn


class _ShiftedSeed(_seed_module.SeedGenerator):
    def __init__(self, shared: SharedSeed, shift: Any):
        self._shared, self._shift = shared, shift

    def next(self, ordered=True):
        seed = self._shared.draw()
        return seed + tf.stack([tf.cast(self._shift, seed.dtype), 0])


# --- Workers: what TensorFlow does for them on its own, and what it does not tell.


def keep_initial_values_local(strategy: tf.distribute.Strategy) -> None:
    """Stops a strategy of several workers from sending around each initial value.

    One exchange for each variable that is made would wait for ever where workers make
    different models. distfit compares the models first and then exchanges at once what
    differs.
    """
    extended = strategy.extended
    alike = super(type(extended), extended)._get_variable_creator_initial_value
    extended._get_variable_creator_initial_value = alike


def tensorflow_random_state() -> str | None:
    """What TensorFlow's next random operation depends on; None if nobody seeded it."""
    seed = tf_context.global_seed()
    if seed is None:
        return None
    generator = tensorflow_generator()
    state = None if generator is None else generator.getstate()
    return f"{seed} {zlib.crc32(repr(state).encode())}"


def tensorflow_generator() -> random.Random | None:
    """What seeds TensorFlow's next random operation comes from; None if unseeded."""
    return tf_context.context()._rng


def is_summed_on_read(variable: Any) -> bool:
    """Whether replicas have parts of a variable, and its value is made of them."""
    value = underlying(variable)
    return value.synchronization == tf.VariableSynchronization.ON_READ


def local_value(variable: Any) -> np.ndarray:
    """The value that the first replica of this worker has of a variable."""
    value = underlying(variable)
    return np.asarray(getattr(value, "values", [value])[0])


# --- Callbacks: what they ask of hooks and of variables.


# Where BackupAndRestore writes, beside its public `backup_dir`.
BACKUP_PATHS = (
    "_weights_path",
    "_training_metadata_path",
    "_prev_weights_path",
    "_prev_training_metadata_path",
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


def convert_replicated_scalars() -> None:
    """Makes `float(variable)` and `int(variable)` work for a variable of N replicas.

    Callbacks ask so for `optimizer.learning_rate` and `optimizer.iterations`; Keras
    hands the question to TensorFlow, whose distributed variables cannot answer it.
    """
    for name, number in (("__float__", float), ("__int__", int)):
        stock = getattr(keras.Variable, name)
        setattr(keras.Variable, name, _conversion(stock, number))


def _conversion(stock: Callable, number: type) -> Callable:
    @functools.wraps(stock)
    def convert(self):
        if self.ndim > 0 or not isinstance(self.value, tf.distribute.DistributedValues):
            return stock(self)
        return number(self.numpy())

    return convert
