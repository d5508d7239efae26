"""Every private name of Keras and TensorFlow that distfit touches, with its reason.

Only this package imports from `keras.src` or `tensorflow.python` or uses private
attributes of their objects, and it patches none of their classes and modules.
`tests/test_keras.py` fails when a name moves or its behaviour changes. This file serves
the code around the steps; `graphs`, `optimizers` and `generators` serve tracing a step,
`rewriting` and `calls` running it, and `scalars` callbacks that read variables.

| names | why |
|---|---|
| `get_data_adapter`, `ArrayDataAdapter` | arrays, datasets, PyDatasets, generators, \
data frames, torch loaders: Keras checks each and turns it into a `tf.data.Dataset` |
| `PyDatasetAdapter`, `GeneratorDataAdapter`, `OrderedEnqueuer` | how Keras reads the \
batches of Python code, which distfit lets it read an epoch at a time |
| `Dataset._inputs`, `_tensors` | how much memory the tensors of a `tf.data.Dataset` \
take: to write out its graph takes seconds for each gigabyte; whether two share a part |
| `train_validation_split`, `class_weight_to_sample_weights` | `validation_split` and \
`class_weight`, as Keras defines them |
| `CompileMetrics` | holds the metrics passed to `compile()` |
| `Functional` | the class of `Model(inputs, outputs)` |
| `global_state`, `GLOBAL_SEED_GENERATOR` | name counters and seeds of each thread |
| `join_batches` | predictions of batches, joined; ragged ones, too |
| `tf_context` | the seed of TensorFlow's random operations, compared across workers; \
eager execution within a graph of its own, which no scope of a strategy reaches |
"""

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow.trainer import (
    potentially_ragged_concat as join_batches,
)
from keras.src.models.functional import Functional
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from keras.src.trainers.compile_utils import CompileMetrics
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.array_slicing import train_validation_split
from keras.src.trainers.data_adapters.data_adapter_utils import (
    class_weight_to_sample_weights,
)
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import (
    OrderedEnqueuer,
    PyDatasetAdapter,
)
from tensorflow.python.eager import context as tf_context

from distfit._keras.alive import clear_beside

__all__ = [
    "ArrayDataAdapter",
    "CompileMetrics",
    "Functional",
    "GeneratorDataAdapter",
    "OrderedEnqueuer",
    "PyDatasetAdapter",
    "class_weight_to_sample_weights",
    "clear_beside",
    "get_data_adapter",
    "join_batches",
    "train_validation_split",
]


# --- Data.


def read_with(adapter: Any, read: Callable[[], Iterator[Any]]) -> None:
    """Lets the dataset of an adapter take its batches from `read()`, at each start.

    The adapter still turns each into what its signature says.

    Args:
        adapter: That of a PyDataset or a generator, before its dataset is made.
        read: Returns an iterator over batches.
    """
    if isinstance(adapter, GeneratorDataAdapter):
        adapter.generator = read
    else:
        adapter._get_iterator = lambda: map(adapter._standardize_batch, read())


def without_own_threads(adapter: Any) -> None:
    """Leaves reading to who reads: the hooks of an epoch then start no threads."""
    if isinstance(adapter, PyDatasetAdapter):
        adapter.enqueuer = None


def held_bytes(dataset: tf.data.Dataset) -> int:
    """How many bytes the tensors have that a dataset was made from.

    Tensors that a function captures do not count.
    """
    held = [getattr(part, "_tensors", []) for part in _pipeline(dataset)]
    tensors = tf.nest.flatten(held, expand_composites=True)
    return sum(tf.size(each).numpy() * each.dtype.size for each in tensors)


def shared_parts(one: tf.data.Dataset, other: tf.data.Dataset) -> list[tf.data.Dataset]:
    """The last datasets in a pipeline that another one is made from too."""
    known = {id(each) for each in _pipeline(other)}

    def look(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
        if id(dataset) in known:
            yield dataset
        else:
            for each in dataset._inputs():
                yield from look(each)

    return list(look(one))


def _pipeline(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    yield dataset
    for each in dataset._inputs():
        yield from _pipeline(each)


# --- Models: the methods that stock `fit()` and `evaluate()` use.


def initial_epoch(model: keras.Model) -> int | None:
    """The epoch at which a callback such as BackupAndRestore wants to start."""
    return model._initial_epoch


def compilation(model: keras.Model) -> Any:
    """An object that each `compile()` replaces; None before the first."""
    return getattr(model, "_compile_config", None)


def metrics_of(compile_metrics: CompileMetrics) -> Any:
    """The metrics as they were passed to `compile()`."""
    return compile_metrics._user_metrics or compile_metrics._user_weighted_metrics


# --- Layers.


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and all its layers, nested ones included."""
    return list(model._flatten_layers())


# --- Metrics.


def tracked_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """Every metric that is an attribute of the model or of one of its layers."""
    return [m for layer in layers_of(model) for m in layer._metrics]


def is_compiled(metric: keras.metrics.Metric) -> bool:
    """Whether it is the container of the metrics passed to `compile()`."""
    return isinstance(metric, CompileMetrics)


def parts_of(metric: keras.metrics.Metric) -> list[keras.metrics.Metric]:
    """The metrics in the container that `compile()` makes, or the metric itself."""
    return metric.metrics if isinstance(metric, CompileMetrics) else [metric]


# --- Variables.


def underlying(variable: Any) -> tf.Variable:
    """The TensorFlow variable, even in a scope where Keras substitutes a value."""
    return variable._value if isinstance(variable, keras.Variable) else variable


def fresh_names() -> contextlib.AbstractContextManager:
    """Restarts the numbers in names of new layers, metrics and variables.

    A function that builds a model then gives its parts the same names each time.
    """
    return _with_global("object_name_uids", None)


@contextlib.contextmanager
def _with_global(name: str, value: Any) -> Iterator[None]:
    """Sets a per-thread global of Keras for the duration of the block."""
    before = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, value)
    try:
        yield
    finally:
        global_state.set_global_attribute(name, before)


# --- Optimizers.


def with_inner(optimizer: Any) -> list[keras.optimizers.Optimizer]:
    """An optimizer and those inside a LossScaleOptimizer or a MultiOptimizer."""
    inner: list = []
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = [optimizer.inner_optimizer]
    elif isinstance(optimizer, keras.optimizers.MultiOptimizer):
        inner = optimizer.optimizers
    return [optimizer, *(found for part in inner for found in with_inner(part))]


# --- Randomness.


def global_seed_generator(generator: Any) -> contextlib.AbstractContextManager:
    """Makes `generator`, or None, the source of unseeded draws in this thread.

    Keras keeps one per thread and creates it on first use.
    """
    return _with_global(GLOBAL_SEED_GENERATOR, generator)


# --- Scopes of strategies.


@contextlib.contextmanager
def outside_of_scopes() -> Iterator[None]:
    """Runs a block as outside of `strategy.scope()`.

    Within it, variables of a strategy act as all their copies, and new ones are made
    for all replicas, also while a step is traced for one device. TensorFlow keeps a
    scope with the current graph; so the block gets one of its own, and runs eagerly.
    """
    with tf.Graph().as_default(), tf_context.eager_mode(), tf.device(None):
        yield


# --- Workers: TensorFlow's implicit exchanges and hidden state.


def keep_initial_values_local(strategy: tf.distribute.Strategy) -> None:
    """Stops a multi_worker strategy from broadcasting each initial value.

    An exchange for each new variable would hang if workers build different models.
    distfit compares the models first, then exchanges all differing values at once.
    """
    extended = strategy.extended
    alike = super(type(extended), extended)._get_variable_creator_initial_value
    extended._get_variable_creator_initial_value = alike


def tensorflow_random_state() -> str | None:
    """The seed and a checksum of TensorFlow's generator; None if it is unseeded."""
    seed = tf_context.global_seed()
    if seed is None:
        return None
    generator = tensorflow_generator()
    state = None if generator is None else generator.getstate()
    return f"{seed} {zlib.crc32(repr(state).encode())}"


def tensorflow_generator() -> random.Random | None:
    """The generator of TensorFlow's operation seeds; None if it is unseeded."""
    return getattr(tf_context.context(), "_rng", None)  # Made with the first seed.


def tensorflow_generator_state() -> list | None:
    """The seed of TensorFlow and the state of its generator; None if it is unseeded."""
    seed, generator = tf_context.global_seed(), tensorflow_generator()
    if seed is None or generator is None:
        return None
    return [seed, generator.getstate()]


def set_tensorflow_generator_state(state: list) -> None:
    """Sets what `tensorflow_generator_state` has returned, before or after JSON."""
    seed, (version, words, gauss) = state
    tf.random.set_seed(seed)
    if generator := tensorflow_generator():
        generator.setstate((version, tuple(words), gauss))


def is_summed_on_read(variable: Any) -> bool:
    """Whether each replica holds a part of a variable, aggregated on read."""
    value = underlying(variable)
    return value.synchronization == tf.VariableSynchronization.ON_READ


def local_copies(variable: Any) -> list[tf.Variable]:
    """The copies, or parts, of a variable on the replicas of this worker."""
    value = underlying(variable)
    if not isinstance(value, tf.distribute.DistributedValues):
        return [value]
    return list(value.distribute_strategy.experimental_local_results(value))


def local_value(variable: Any) -> np.ndarray:
    """The value of a variable on the first replica of this worker."""
    return local_copies(variable)[0].numpy()


# --- Callbacks.


# Where BackupAndRestore writes, besides its public `backup_dir`.
BACKUP_PATHS = (
    "_weights_path",
    "_training_metadata_path",
    "_prev_weights_path",
    "_prev_training_metadata_path",
)
