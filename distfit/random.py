"""Random numbers: replicas draw different ones, or their rows of a common draw.

`keras.random` and the layers that use it (Dropout, GaussianNoise, ...) draw from a
stream of their own on every replica. The functions here draw for the global batch and
return the rows that this replica owns, so results do not depend on how many replicas
there are. The price is that every replica draws all rows.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from distfit import _keras
from distfit.collectives import Share, distributed_share

# Distance of the seeds of neighbouring replicas: odd, so no two coincide in 32 bits.
STREAM_OFFSET = 0x3C6EF373

_local = threading.local()


def normal(shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
    """Draws this replica's rows of one normal draw for the global batch.

    Args:
        shape: Shape of the result. If its first dimension is `k * local_rows`, for a
            whole number k, the rows are this replica's; with any other first dimension
            every replica gets the same numbers.
        mean, stddev, dtype, seed: As in `keras.random.normal`.

    Returns:
        A tensor of the given shape.
    """
    return _draw(
        shape, lambda s: keras.random.normal(s, mean, stddev, dtype=dtype, seed=seed)
    )


def uniform(shape, minval=0.0, maxval=1.0, dtype=None, seed=None):
    """Draws this replica's rows of one uniform draw for the global batch.

    Args:
        shape: As in `distfit.random.normal`.
        minval, maxval, dtype, seed: As in `keras.random.uniform`.

    Returns:
        A tensor of the given shape.
    """
    return _draw(
        shape, lambda s: keras.random.uniform(s, minval, maxval, dtype=dtype, seed=seed)
    )


def _draw(shape, draw: Callable):
    shape = dimensions(shape)
    with drawing_in_common():
        share = distributed_share()
        if share is None or len(shape) == 0 or not _has_local_rows(shape[0], share):
            return draw(shape)
        _check_not_nested(share)
        per_row = shape[0] // share.local_rows
        start = per_row * share.start
        drawn = draw((per_row * share.global_rows, *shape[1:]))
        rows = drawn[start : start + shape[0]]
        return tf.ensure_shape(rows, [None, *drawn.shape[1:]])


def _check_not_nested(share: Share) -> None:
    if share.graph is not tf.compat.v1.get_default_graph():
        raise ValueError(
            "The rows of a draw for the global batch are known to the step alone. "
            "Received: a call of `distfit.random` in a nested `tf.function`, `tf.cond` "
            "or `tf.while_loop`. Remove the decorator, or draw outside and pass the "
            "numbers on."
        )


def dimensions(shape) -> tuple:
    """A shape as a tuple, also one that `tf.shape` gave."""
    return tuple(tf.unstack(shape) if tf.is_tensor(shape) else shape)


@contextlib.contextmanager
def drawing_in_common() -> Iterator[None]:
    """Marks the draws of this thread as those of the global batch."""
    before = draws_in_common()
    _local.in_common = True
    try:
        yield
    finally:
        _local.in_common = before


def draws_in_common() -> bool:
    """Whether a draw in this thread is one for the global batch."""
    return getattr(_local, "in_common", False)


def _has_local_rows(first_dimension, share: Share) -> bool:
    """Whether a dimension was computed from the number of local rows.

    In a graph a number of rows is a tensor, so a plain number is something else.
    """
    rows = tf.get_static_value(share.local_rows)
    if rows is None:
        return tf.is_tensor(first_dimension)
    size = tf.get_static_value(first_dimension)
    return size is None or (size >= rows and size % rows == 0)


def _stream_offset():
    """What this replica adds to seeds: nothing on the first, or for a common draw."""
    share = distributed_share()
    if share is None or draws_in_common():
        return None
    return share.stream_offset(STREAM_OFFSET)


_keras.offset_seeds(_stream_offset)
