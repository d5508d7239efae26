"""Operations that repeat their input, or make rows from a number."""

from typing import Any

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    REPLICATED,
    ROWS,
    Dim,
    Layout,
    Size,
    by_rows,
    product,
    quotient,
    unknown,
)
from distfit.partition.registry import cut_rule, rule
from distfit.partition.rules.shapes import inserted
from distfit.partition.rules.sizes import elements_of
from distfit.partition.tracing import Node
from distfit.partition.values import Value


@rule("Fill")
def _fill(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    shape, value = inputs
    return _spread(emitter, node, emitter.whole(value), shape)


@rule("Empty")
def _empty(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    (shape,) = inputs
    dims = elements_of(shape)
    if dims is None or _rows_at(dims) is None:
        return None
    dtype = node.outputs[0].dtype
    zero = emitter.call(lambda: tf.zeros([], dtype), [], REPLICATED, [])
    return _spread(emitter, node, zero, shape)


@rule("BroadcastTo")
def _broadcast_to(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value, shape = inputs
    return _spread(emitter, node, value, shape)


def _spread(
    emitter: Emitter, node: Node, value: Value, shape: Value
) -> list[Value] | None:
    dims = elements_of(shape)
    if dims is None or value.dims is None or not emitter.can_compute(dims):
        return None
    if value.has_rows:
        dim = value.layout.dim + len(dims) - value.rank
        layout = value.layout.moved(dim)
        if not emitter.sizes.same(dims[dim], layout.size):
            return None
        dims = [*dims[:dim], layout.size, *dims[dim + 1 :]]  # Kept symbolic.
    else:
        at = _rows_at(dims)
        if at is None or value.is_partial:
            shape = emitter.whole(shape)
            inputs = [shape, value] if node.type == "Fill" else [value, shape]
            return emitter.op(node, inputs, value.layout, dims)
        layout = emitter.usual(dims[at]).moved(at)
        own = at - len(dims) + value.rank
        if own >= 0 and not emitter.sizes.is_one(value.dims[own]):
            if not emitter.sizes.same(value.dims[own], layout.size):
                return None
            value = emitter.cut(value, layout.moved(own))
    source = value if value.is_replicated else None
    local = emitter.local_shape(dims, layout)
    result = emitter.call(tf.broadcast_to, [value, local], layout, dims)
    if source is not None:
        # Computed in full where needed, so that no other layout takes an exchange.
        given = [source, emitter.known(dims, tf.int32)]
        result.whole = emitter.call(tf.broadcast_to, given, REPLICATED, dims)
    return [result]


def _rows_at(dims: list[Dim]) -> int | None:
    """The first dimension that is a multiple of the rows."""
    return next((i for i, d in enumerate(dims) if quotient(d, ROWS) is not None), None)


@rule("Tile")
def _tile(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, where = inputs
    times = elements_of(where)
    if value.dims is None or times is None or not emitter.can_compute(times):
        return None
    dims = [product([d, t]) for d, t in zip(value.dims, times, strict=True)]
    at = _rows_at(times)
    if value.is_replicated and at is not None:
        return _tiled_to_rows(emitter, value, times, at, dims)
    if not value.has_rows:
        return emitter.op(node, [value, emitter.whole(where)], value.layout, dims)
    layout = value.layout
    more = times[layout.dim]
    if not isinstance(more, int) or more < 1 or not isinstance(layout.blocks, int):
        return None
    # The rows, and then the same rows again.
    layout = by_rows(layout.dim, layout.blocks * more, layout.inner)
    return emitter.op(node, [value, emitter.whole(where)], layout, dims)


def _tiled_to_rows(
    emitter: Emitter, value: Value, times: list[Any], at: int, dims: list[Dim]
) -> list[Value] | None:
    """`tf.tile(x, [n, 1])`: what is repeated for each row becomes its inner part.

    A single element may be repeated in any other layout of this size.
    """
    each = quotient(times[at], ROWS)
    size = (value.dims or [])[at]
    if each is None or 0 in (each, size):
        return None
    local = emitter.local_shape(times, by_rows(at, 1, each))
    layout = by_rows(at, 1, product([each, size]))
    if size == 1:
        layout = emitter.usual(dims[at]).moved(at)
    result = emitter.call(tf.tile, [value, local], layout, dims)
    given = [value, emitter.known(times, tf.int32)]
    result.whole = emitter.call(tf.tile, given, REPLICATED, dims)
    return [result]


@cut_rule("Tile", "BroadcastTo", "Fill")
def _repeated(emitter: Emitter, value: Value, layout: Layout) -> Value | None:
    """Repeats an input only for a replica's own rows.

    In a step with a fixed number of rows, that is an ordinary number, from which the
    rules above cannot see that something is repeated for each row.
    """
    node: Any = value.node
    first, second = (emitter.values[edge] for edge in node.inputs)
    source, times = (second, first) if node.type == "Fill" else (first, second)
    numbers = elements_of(times)
    if not source.is_replicated or source.dims is None or numbers is None:
        return None
    at = layout.dim - len(numbers) + source.rank
    if at >= 0 and source.dims[at] != 1 or not emitter.can_compute(numbers):
        return None
    local = emitter.local_shape(numbers, layout)
    repeat = tf.tile if node.type == "Tile" else tf.broadcast_to
    return emitter.call(repeat, [source, local], layout, value.dims)


@rule("OneHot")
def _one_hot(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, depth, *rest = inputs
    value = emitter.whole(value) if value.is_partial else value
    if value.dims is None:
        return None
    axis = node.attr("axis") % (value.rank + 1)
    classes = (elements_of(depth) or [None])[0]
    size = unknown() if classes is None else classes
    dims = [*value.dims[:axis], size, *value.dims[axis:]]
    given = [emitter.whole(v) for v in (depth, *rest)]
    return emitter.op(node, [value, *given], inserted(value.layout, axis), dims)


@rule("Range")
def _range(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """`tf.range(n)`: its size is known, so its rows can be cut."""
    start, limit, step = ((elements_of(v) or [None])[0] for v in inputs)
    given = [emitter.whole(v) for v in inputs]
    size = quotient(limit, step) if start == 0 and limit and step else None
    if size is None or not _is_size(size):
        return emitter.op(node, given, REPLICATED)
    return emitter.op(node, given, REPLICATED, [size])


def _is_size(dim: Dim) -> bool:
    return (dim.factor if isinstance(dim, Size) else dim) >= 0
