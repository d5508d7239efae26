"""The place of a `tf.data` iterator as bytes, from which another one can go on."""

from typing import Any

import tensorflow as tf

# That is what distfit notes of batches; passes.py says whether the data have more.
_IGNORE_EXTERNAL_STATE = 1  # tensorflow/core/framework/dataset_options.proto


def place_of(iterator: tf.data.Iterator, ahead: Any) -> bytes:
    """The place of an iterator, with the buffers of its pipeline.

    Args:
        iterator: The iterator.
        ahead: What was read from it and not yet used: a structure of tensors, or None.

    Raises:
        tf.errors.OpError: a part of the pipeline cannot tell.
    """
    read = [] if ahead is None else tf.nest.flatten(ahead, expand_composites=True)
    parts = [tf.io.serialize_tensor(tensor) for tensor in (_state_of(iterator), *read)]
    return tf.io.serialize_tensor(tf.stack(parts)).numpy()


def go_to(iterator: tf.data.Iterator, place: bytes, spec: Any) -> Any:
    """Moves an iterator to a place.

    Args:
        iterator: An iterator of the same pipeline, wherever it is.
        place: What `place_of` has returned.
        spec: The specs of what may have been read ahead.

    Returns:
        What was read ahead, or None.

    Raises:
        tf.errors.OpError: the pipeline is another one. The iterator stays where it is.
    """
    before = _state_of(iterator)
    state, *read = tf.io.parse_tensor(place, tf.string)
    leaves = tf.nest.flatten(spec, expand_composites=True)
    tensors = [
        tf.io.parse_tensor(part, leaf.dtype)
        for part, leaf in zip(read, leaves, strict=False)  # Nothing may have been read.
    ]
    try:
        _set_state(iterator, tf.io.parse_tensor(state, tf.variant))
    except tf.errors.OpError:
        _set_state(iterator, before)
        raise
    if not tensors:
        return None
    return tf.nest.pack_sequence_as(spec, tensors, expand_composites=True)


def _state_of(iterator: tf.data.Iterator) -> tf.Tensor:
    return tf.raw_ops.SerializeIterator(
        resource_handle=_resource_of(iterator),
        external_state_policy=_IGNORE_EXTERNAL_STATE,
    )


def _set_state(iterator: tf.data.Iterator, state: tf.Tensor) -> None:
    tf.raw_ops.DeserializeIterator(
        resource_handle=_resource_of(iterator), serialized=state
    )


def _resource_of(iterator: tf.data.Iterator) -> tf.Tensor:
    (resource,) = tf.nest.flatten(iterator, expand_composites=True)
    return resource
