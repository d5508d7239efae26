"""Variables and constants.

A mirrored variable is replicated, and so must be the values written to it. One that is
summed on read is partial: each replica adds its part, without an exchange. One that
exists only once is read and written by the first replica, for all.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import PARTIAL, REPLICATED
from distfit.partition.registry import rule
from distfit.partition.tracing import Node
from distfit.partition.values import Value

_MOST_SIZES = 64


@rule("Const")
def _const(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    (traced,) = node.outputs
    value = Value(REPLICATED, traced.shape.as_list(), traced.dtype, constant=node)
    if traced.dtype in (tf.int32, tf.int64) and traced.shape.num_elements() <= (
        _MOST_SIZES
    ):
        numbers = tf.get_static_value(traced)
        value.sizes = np.empty(numbers.shape, object)
        value.sizes[...] = np.vectorize(int, otypes=[object])(numbers)
    return [value]


@rule("NoOp")
def _no_op(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return []


@rule("ReadVariableOp")
def _read(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    (handle,) = inputs
    resource: Any = handle.resource
    if _is_single(handle):
        return None
    if resource.read is None or resource.read.dtype != node.outputs[0].dtype:
        layout = PARTIAL if _is_summed(handle) else REPLICATED
        (resource.read,) = emitter.op(node, inputs, layout)
    return [resource.read]


@rule("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp")
def _assign(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    handle, value = inputs
    if _is_single(handle):
        return None
    if _is_summed(handle):
        return emitter.op(node, [handle, emitter.as_partial(value)])
    return emitter.op(node, [handle, emitter.whole(value)])


@rule("ResourceScatterAdd", "ResourceScatterSub", "ResourceScatterNdAdd")
def _scatter(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    handle, indices, updates = inputs
    if _is_single(handle):
        return None
    indices, updates = emitter.whole(indices), emitter.whole(updates)
    if _is_summed(handle):
        updates = emitter.as_partial(updates)
    return emitter.op(node, [handle, indices, updates])


@rule(
    *("ResourceScatterUpdate", "ResourceScatterMul", "ResourceScatterDiv"),
    *("ResourceScatterMin", "ResourceScatterMax", "ResourceScatterNdUpdate"),
    *("ResourceStridedSliceAssign", "ResourceScatterNdSub"),
)
def _write_in_place(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    handle, *others = inputs
    if _is_single(handle) or _is_summed(handle):
        return None
    return emitter.op(node, [handle, *(emitter.whole(v) for v in others)])


@rule("ResourceGather")
def _gather(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    handle, indices = inputs
    if _is_single(handle) or _is_summed(handle) or node.attr("batch_dims"):
        return None
    indices = emitter.whole(indices) if indices.is_partial else indices
    dims = emitter.static_dims(node.outputs[0])
    if indices.dims is None or dims is None:
        return None
    dims = [*indices.dims, *dims[indices.rank :]]
    return emitter.op(node, [handle, indices], indices.layout, dims)


def _is_single(handle: Value) -> bool:
    return handle.resource is None or handle.resource.kind == "single"


def _is_summed(handle: Value) -> bool:
    return handle.resource is not None and handle.resource.kind == "summed"
