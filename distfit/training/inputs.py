"""Inspects and checks the input of `fit()` before any work."""

import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

_LOOKED_AT = 2  # Batches.


def with_first_noted(dataset: tf.data.Dataset, note: Callable) -> tf.data.Dataset:
    """The same dataset, calling `note(*arrays)` with the first batch of each pass."""

    def look(index, batch):
        leaves = tf.nest.flatten(batch, expand_composites=True)
        arrays = [tensor for tensor in leaves if tensor.dtype != tf.variant]
        tf.cond(
            index == 0,
            lambda: tf.group(tf.numpy_function(note, arrays, [])),
            tf.no_op,
        )
        return batch

    return dataset.enumerate().map(look)


def look_at(x: Any) -> tuple[list, Any]:
    """The first two batches of a PyDataset or a generator, and data that include them.

    Keras reads these too, but its specs leave the first dimension open. Other data are
    not read: filling a shuffle buffer twice may take long.
    """
    if isinstance(x, keras.utils.PyDataset):
        length = _LOOKED_AT if x.num_batches is None else min(x.num_batches, _LOOKED_AT)
        return [x[i] for i in range(length)], x
    if isinstance(x, types.GeneratorType):
        first = list(itertools.islice(x, _LOOKED_AT))
        return first, _chained(first, x)
    return [], x


def _chained(first: Iterable, rest: Iterable) -> Iterator:
    """A generator, which is what Keras expects."""
    yield from first
    yield from rest


def check_positive(name: str, value: Any) -> None:
    """Raises a `ValueError` if a count is given but below 1."""
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")


def check_not_distributed(x: Any) -> None:
    """Raises a `ValueError` for a dataset that a strategy has already distributed."""
    if isinstance(x, tf.distribute.DistributedDataset):
        raise ValueError(
            "distfit cuts global batches itself. Received: a dataset that was already "
            "distributed by the strategy. Pass the `tf.data.Dataset` of global batches."
        )


def check_element_spec(spec: Any) -> None:
    """Raises a `ValueError` if elements are not batches that a step can take."""
    leaves = _given(spec)
    for leaf in leaves:
        if not isinstance(
            leaf, tf.TensorSpec | tf.RaggedTensorSpec | tf.SparseTensorSpec
        ):
            raise ValueError(
                "An element of the data must be a tensor or a structure of tensors. "
                f"Received: {leaf}."
            )
    targets = _given(spec[1]) if isinstance(spec, tuple) and len(spec) > 1 else []
    batched = any(leaf.shape.rank is None or None in leaf.shape[:1] for leaf in leaves)
    if _all_scalars(leaves) or (_all_scalars(targets) and not batched):
        raise ValueError(
            "Elements of the data must be batches, with rows first. Received: scalars "
            f"instead of rows, {spec}. Call `.batch(batch_size)` on the dataset; pass "
            "a number that belongs to no row in x, beside the tensors that have rows."
        )


def _given(spec: Any) -> list:
    """The leaves of a structure of specs, except those of None."""
    absent = (tf.NoneTensorSpec, tf.OptionalSpec, type(None))
    return [leaf for leaf in tf.nest.flatten(spec) if not isinstance(leaf, absent)]


def _all_scalars(leaves: list) -> bool:
    return bool(leaves) and all(leaf.shape.rank == 0 for leaf in leaves)


def without_autotune(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Turns off the tuning of a pipeline that only slices arrays.

    There is nothing to tune, and the tuning thread of TensorFlow 2.21 sometimes
    takes half a minute to end when an iterator is released.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
