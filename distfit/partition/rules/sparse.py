"""Gathers, scatters, segments and tables.

Rows of indices that gather from a table stay rows. Rows that are scattered into a table
give a partial sum.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    PARTIAL,
    REPLICATED,
    ROWS,
    Dim,
    by_rows,
    quotient,
    unknown,
)
from distfit.partition.registry import rule
from distfit.partition.rules.elementwise import alike
from distfit.partition.rules.sizes import ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value


def _settled(emitter: Emitter, value: Value) -> Value:
    """The value, summed if it is partial."""
    return emitter.whole(value) if value.is_partial else value


def cut_first_rows(emitter: Emitter, value: Value) -> Value:
    """A replicated value, cut along the first dimension that is a multiple of rows."""
    for i, dim in enumerate(value.dims or ()):
        many = quotient(dim, ROWS)
        if many is not None and value.is_replicated:
            return emitter.cut(value, by_rows(i, 1, many))
    return value


@rule("GatherV2")
def _gather(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    params, indices, where = inputs
    numbers = ints(where)
    if params.dims is None or indices.dims is None or numbers is None:
        return None
    indices = _settled(emitter, indices)
    axis, batch = numbers[0] % max(params.rank, 1), node.attr("batch_dims")
    batch %= max(indices.rank, 1) if batch < 0 else batch + 1
    dims = [*params.dims[:axis], *indices.dims[batch:], *params.dims[axis + 1 :]]
    if batch:
        return _batched_gather(emitter, node, [params, indices, where], batch, dims)
    if params.is_partial:
        if indices.is_replicated:
            return emitter.op(node, [params, indices, where], PARTIAL, dims)
        params = emitter.whole(params)
    if params.has_rows and params.layout.dim != axis:
        dim = params.layout.dim
        layout = params.layout.moved(dim if dim < axis else dim - 1 + indices.rank)
        given = [params, emitter.whole(indices), where]
        return emitter.op(node, given, layout, dims)
    if params.has_rows:
        # Rows gathered from all rows: each replica gathers those of its own result.
        params = emitter.whole(params)
        indices = cut_first_rows(emitter, indices)
    layout = indices.layout
    if indices.has_rows:
        layout = layout.moved(axis + layout.dim)
    return emitter.op(node, [params, indices, where], layout, dims)


def _batched_gather(emitter, node, inputs, batch: int, dims) -> list[Value] | None:
    params, indices, where = inputs
    params = _settled(emitter, params)
    lead = next((v for v in (params, indices) if v.has_rows), None)
    if lead is None:
        return emitter.op(node, [params, indices, where], REPLICATED, dims)
    layout = lead.layout
    if layout.dim >= batch:
        return None
    laid = alike(emitter, [params, indices], layout)
    if laid is None:
        return None
    return emitter.op(node, [*laid, where], layout, dims)


@rule("GatherNd")
def _gather_nd(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    params, indices = (_settled(emitter, v) for v in inputs)
    if params.dims is None or indices.dims is None:
        return None
    depth = indices.dims[-1]
    if not isinstance(depth, int):
        return None
    if indices.has_rows and indices.layout.dim == indices.rank - 1:
        return None
    dims = [*indices.dims[:-1], *params.dims[depth:]]
    if params.has_rows and params.layout.dim >= depth and indices.is_replicated:
        if not emitter.all_have_rows():  # TensorFlow cannot gather from no rows.
            return None
        layout = params.layout.moved(params.layout.dim - depth + indices.rank - 1)
        return emitter.op(node, [params, indices], layout, dims)
    return emitter.op(node, [emitter.whole(params), indices], indices.layout, dims)


@rule("ResourceGatherNd")
def _resource_gather_nd(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    handle, indices = inputs
    indices = _settled(emitter, indices)
    if handle.resource is None or handle.resource.kind != "mirrored":
        return None
    static = emitter.static_dims(node.outputs[0])
    if indices.dims is None or static is None:
        return None
    if indices.has_rows and indices.layout.dim == indices.rank - 1:
        return None
    dims = [*indices.dims[:-1], *static[indices.rank - 1 :]]
    return emitter.op(node, [handle, indices], indices.layout, dims)


def _together(emitter: Emitter, keys: Value, data: Value, depth: int):
    """Keys and data, split by the same rows in one of their first `depth` dimensions.

    Returns:
        Both, or None where they cannot be proven to have the same rows.
    """
    rowed = [v for v in (keys, data) if v.has_rows]
    if any(v.layout.dim >= depth for v in rowed) or data.rank < depth:
        return None
    return alike(emitter, [keys, data], rowed[0].layout)


@rule("ScatterNd")
def _scatter_nd(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """Updates of the same place add up, so the results of replicas do, too."""
    indices, updates, shape = inputs
    dims = None if shape.sizes is None else list(shape.sizes.flat)
    if dims is None or any(d is None for d in dims):
        dims = emitter.static_dims(node.outputs[0])
    indices = _settled(emitter, indices)
    whole = emitter.whole(shape)
    if indices.dims is None or updates.dims is None:
        return None
    if updates.is_partial and indices.is_replicated:
        return emitter.op(node, [indices, updates, whole], PARTIAL, dims)
    updates = _settled(emitter, updates)
    if not indices.has_rows and not updates.has_rows:
        return emitter.op(node, [indices, updates, whole], REPLICATED, dims)
    laid = _together(emitter, indices, updates, indices.rank - 1)
    if laid is None:
        return None
    return emitter.op(node, [*laid, whole], PARTIAL, dims)


@rule("TensorScatterUpdate", "TensorScatterMax", "TensorScatterMin")
def _tensor_scatter_update(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    target, indices, updates = (_settled(emitter, v) for v in inputs)
    if any(v.dims is None for v in (target, indices, updates)):
        return None
    if not any(v.has_rows for v in (target, indices, updates)):
        return emitter.op(node, [target, indices, updates], REPLICATED, target.dims)
    return _within_rows(emitter, node, target, indices, updates)


def _within_rows(
    emitter: Emitter, node: Node, target: Value, indices: Value, updates: Value
) -> list[Value] | None:
    """Updates of the same places in all rows."""
    depth = (indices.dims or [None])[-1]
    if not isinstance(depth, int) or indices.has_rows:
        return None
    further = indices.rank - 1 - depth  # Dimensions of updates before those of target.
    if updates.has_rows:
        layout = updates.layout.moved(updates.layout.dim - further)
    else:
        layout = target.layout
    at = layout.dim
    if at < depth or not (0 <= at + further < updates.rank):
        return None
    dims: Any = (target.dims[at], updates.dims[at + further])
    if not all(emitter.sizes.same(dim, layout.size) for dim in dims):
        return None
    if not emitter.all_have_rows():  # TensorFlow cannot scatter into no rows.
        return None
    laid = [emitter.to(target, layout), indices]
    laid.append(emitter.to(updates, layout.moved(at + further)))
    return emitter.op(node, laid, layout, target.dims)


@rule("TensorScatterAdd", "TensorScatterSub")
def _tensor_scatter(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    target, indices, updates = inputs
    indices = _settled(emitter, indices)
    if any(v.dims is None for v in inputs):
        return None
    if updates.has_rows or target.has_rows:
        within = _within_rows(emitter, node, target, indices, updates)
        if within is not None:
            return within
    if target.has_rows:
        return None
    updates = _settled(emitter, updates)
    if not indices.has_rows and not updates.has_rows:
        if target.is_partial:
            return None
        return emitter.op(node, [target, indices, updates], REPLICATED, target.dims)
    laid = _together(emitter, indices, updates, indices.rank - 1)
    if laid is None:
        return None
    given = [emitter.as_partial(target), *laid]
    return emitter.op(node, given, PARTIAL, target.dims)


# How to combine the replicas' segments; an empty segment has the neutral element.
_COMBINATIONS: dict[str, Callable | None] = {
    "UnsortedSegmentSum": None,
    "UnsortedSegmentMax": tf.reduce_max,
    "UnsortedSegmentMin": tf.reduce_min,
    "UnsortedSegmentProd": tf.reduce_prod,
}


@rule(*_COMBINATIONS)
def _segments(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    data, ids, number = inputs
    combine = _COMBINATIONS[node.type]
    ids = _settled(emitter, ids)
    if data.dims is None or ids.dims is None:
        return None
    dims = [_count(number), *data.dims[ids.rank :]]
    whole = emitter.whole(number)
    if combine is None and data.is_partial and ids.is_replicated:
        return emitter.op(node, [data, ids, whole], PARTIAL, dims)
    data = _settled(emitter, data)
    if not data.has_rows and not ids.has_rows:
        return emitter.op(node, [data, ids, whole], REPLICATED, dims)
    if data.has_rows and data.layout.dim >= ids.rank:
        layout = data.layout.moved(data.layout.dim - ids.rank + 1)
        return emitter.op(node, [data, emitter.whole(ids), whole], layout, dims)
    laid = _together(emitter, ids, data, ids.rank)
    if laid is None:
        return None
    ids, data = laid
    if combine is None:
        return emitter.op(node, [data, ids, whole], PARTIAL, dims)
    (own,) = emitter.op(node, [data, ids, whole], REPLICATED, dims)
    parts = emitter.whole(emitter.stacked(own))
    return [emitter.call(lambda t: combine(t, 0), [parts], REPLICATED, dims)]


def _count(number: Value) -> Dim:
    known = None if number.sizes is None else number.sizes.item()
    return unknown() if known is None else known


@rule("Unique", "UniqueV2", "UniqueWithCounts", "UniqueWithCountsV2")
def _unique(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """The unique values depend on all rows; the index for each row is by rows."""
    value = inputs[0]
    if value.dims is None or value.rank != 1:
        return None
    values, places, *counts = emitter.op(node, [emitter.whole(v) for v in inputs])
    places.dims = list(value.dims)
    if value.has_rows:
        places = emitter.cut(places, value.layout)
    return [values, places, *counts]


@rule("LookupTableFindV2")
def _lookup(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """A table exists once, so the first replica does the lookup for all."""
    keys, default = inputs[1:]
    if keys.dims is None or default.dims is None:
        return None
    (found,) = emitter.once(node, inputs)
    found.dims = [*keys.dims, *default.dims]
    return [emitter.cut(found, keys.layout) if keys.has_rows else found]


@rule("InTopKV2", "InTopK")
def _in_top_k(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    predictions, targets, *k = inputs
    values = [_settled(emitter, predictions), _settled(emitter, targets)]
    if any(v.dims is None for v in values):
        return None
    lead = next((v for v in values if v.has_rows), None)
    if lead is None:
        return emitter.op(node, [*values, *k], REPLICATED, values[1].dims)
    layout = lead.layout
    if layout.dim != 0:
        return None
    laid = alike(emitter, values, layout)
    if laid is None:
        return None
    given = [*laid, *(emitter.whole(v) for v in k)]
    return emitter.op(node, given, layout, [layout.size])


@rule("ReverseSequence")
def _reverse_sequence(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value, lengths = (_settled(emitter, v) for v in inputs)
    if value.dims is None or lengths.dims is None:
        return None
    batch = node.attr("batch_dim")
    if not value.has_rows and not lengths.has_rows:
        return emitter.op(node, [value, lengths], REPLICATED, value.dims)
    if value.has_rows and value.layout.dim != batch:
        return None
    layout = value.layout if value.has_rows else lengths.layout.moved(batch)
    if not emitter.sizes.same(value.dims[batch], layout.size):
        return None
    if not emitter.sizes.same(lengths.dims[0], layout.size):
        return None
    given = [emitter.to(value, layout), emitter.to(lengths, layout.moved(0))]
    return emitter.op(node, given, layout, value.dims)
