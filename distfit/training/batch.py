"""One batch: its number of rows, its fingerprint, its absent parts."""

from typing import Any

import numpy as np
import tensorflow as tf
from keras import tree

from distfit.cluster import workers

_MOST_BYTES = 16 << 20  # A checksum of as many takes some 20 ms.


def fingerprint(arrays: Any, rows: int | None = 64) -> list:
    """For each array or tensor, its shape and a checksum of about so many rows.

    None for anything else. If `rows` is None, it is that of all rows; of some, evenly
    spaced, of an array of more than 16 MiB.
    """
    return [_fingerprint(array, rows) for array in tree.flatten(arrays)]


def _fingerprint(array: Any, rows: int | None) -> Any:
    if not isinstance(array, np.ndarray | tf.Tensor):
        return None
    every = np.asarray(array)
    if not every.ndim:
        some = every
    elif rows is None:
        some = every[:: 1 + every.nbytes // _MOST_BYTES]
    else:
        some = every[:: max(len(every) // rows, 1)]
    # The bytes of Python objects, such as strings, are only their addresses.
    content = repr(some.tolist()).encode() if some.dtype.hasobject else some.tobytes()
    return tuple(array.shape), workers.checksum(content)


def num_rows(batch: Any) -> Any:
    """The number of rows of a batch's first non-scalar tensor, an int32 scalar."""
    first = next(t for t in tree.flatten(batch) if t is not None and t.shape.rank != 0)
    if isinstance(first, tf.SparseTensor):
        return tf.cast(first.dense_shape[0], tf.int32)
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), tf.int32)
    return tf.shape(first)[0]


def without_optionals(batch: Any) -> Any:
    """Replaces the empty optionals, Keras's adapters' form of None, with None."""
    return tree.map_structure(
        lambda t: None if isinstance(t, tf.experimental.Optional) else t, batch
    )


def with_rows(spec: tf.TypeSpec, rows: int | None) -> tf.TypeSpec:
    """The spec of a tensor, dense or not, with another number of rows."""
    shape = [rows, *spec.shape[1:]]
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec(
            shape, spec.dtype, spec.ragged_rank, spec.row_splits_dtype
        )
    return type(spec)(shape, spec.dtype)
