"""Predictions: the batches of all workers, joined in the order of the rows."""

import itertools
import json
from typing import Any

import tensorflow as tf
from keras import tree

from distfit import _keras
from distfit.cluster.workers import Workers
from distfit.training.batch import with_rows


def join(team: Workers, batches: list) -> Any:
    """Joins the outputs for several batches, as NumPy arrays where they can be.

    Args:
        team: The workers; all of them call this at the same place.
        batches: For each batch, the outputs for the rows of this worker.

    Returns:
        On every worker, the outputs for all rows of all batches.
    """
    if team.count > 1:
        batches = _of_all(team, batches)
    return joined(batches)


def joined(batches: list) -> Any:
    """The outputs for several batches, joined, as NumPy arrays where they can be."""
    return tree.map_structure(lambda *parts: _joined_parts(list(parts)), *batches)


def _joined_parts(parts: list) -> Any:
    value = _keras.join_batches(parts)
    composite = isinstance(value, tf.RaggedTensor | tf.SparseTensor)
    return value if composite else value.numpy()


def _of_all(team: Workers, batches: list) -> list:
    """The parts of every batch, worker by worker."""
    messages = team.gather("the end of predict()", _serialized(batches))
    parts = [_deserialized(message, batches) for message in messages]
    return [part for of_batch in zip(*parts, strict=True) for part in of_batch]


def _serialized(batches: list) -> bytes:
    tensors = tf.nest.flatten(batches, expand_composites=True)
    texts = [tf.io.serialize_tensor(tensor).numpy() for tensor in tensors]
    return json.dumps([len(text) for text in texts]).encode() + b"\n" + b"".join(texts)


def _deserialized(message: bytes, like: list) -> list:
    head, _, texts = message.partition(b"\n")
    ends = list(itertools.accumulate(json.loads(head), initial=0))
    tensors = [
        tf.io.parse_tensor(texts[start:end], kind.dtype)
        for start, end, kind in zip(
            ends, ends[1:], tf.nest.flatten(like, expand_composites=True), strict=False
        )
    ]
    specs = tf.nest.map_structure(_of_any_rows, like)
    return tf.nest.pack_sequence_as(specs, tensors, expand_composites=True)


def _of_any_rows(output: Any) -> tf.TypeSpec:
    return with_rows(tf.type_spec_from_value(output), None)
