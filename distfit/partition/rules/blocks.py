"""Operations that join or split tensors, block by block."""

from typing import Any

import numpy as np
import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    PARTIAL,
    REPLICATED,
    ROWS,
    Dim,
    by_rows,
    product,
    quotient,
    unknown,
)
from distfit.partition.registry import rule
from distfit.partition.rules.elementwise import alike
from distfit.partition.rules.shapes import inserted
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value


@rule("ConcatV2")
def _concat(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    *values, where = inputs
    numbers = ints(where)
    if numbers is None or any(v.dims is None for v in values):
        return None
    axis = numbers[0] % values[0].rank
    along = [v.dims[axis] for v in values]
    dims = list(emitter.sizes.broadcast([v.dims or [] for v in values]))
    dims[axis] = _total(emitter, along)
    if any(v.is_partial for v in values) and not any(v.has_rows for v in values):
        laid = [emitter.as_partial(v) for v in values]
        return emitter.op(node, [*laid, where], PARTIAL, dims)
    values = [emitter.whole(v) if v.is_partial else v for v in values]
    if not any(v.has_rows for v in values):
        return emitter.op(node, [*values, where], REPLICATED, dims)
    layout = _lead(values).layout
    if layout.dim != axis:
        laid = alike(emitter, values, layout)
        if laid is None:
            return None
        dims[layout.dim] = layout.size
        return emitter.op(node, [*laid, where], layout, dims)
    return _blocks(emitter, node, values, where, axis, dims)


def _lead(values: list[Value]) -> Value:
    """The value whose layout others take: one that is not known in full, if any."""
    cut = [v for v in values if v.has_rows]
    return min(cut, key=lambda v: v.whole is not None)


def _total(emitter: Emitter, along: list[Dim]) -> Dim:
    numbers = [emitter.sizes.number(d) for d in along]
    if all(isinstance(n, int) for n in numbers):
        return sum(numbers)  # type: ignore[arg-type]
    if len({getattr(n, "symbols", None) for n in numbers}) == 1:
        first: Any = numbers[0]
        factor = sum(getattr(n, "factor", 0) for n in numbers)
        return type(first)(factor, first.symbols)
    return unknown()


def _blocks(emitter, node, values, where, axis: int, dims) -> list[Value] | None:
    """Joins along the rows: the rows of the first, then those of the next."""
    lead = _lead([v for v in values if v.has_rows and v.layout.dim == axis])
    inner = lead.layout.inner
    laid, blocks = [], 0
    for value in values:
        many = blocks_in(emitter, value.dims[axis], inner)
        if many and (not value.has_rows or value.whole is not None):
            value = emitter.to(value, by_rows(axis, many, inner))
        layout = value.layout
        if not value.has_rows or (layout.dim, layout.inner) != (axis, inner):
            return None
        if not isinstance(layout.blocks, int):
            return None
        blocks += layout.blocks
        laid.append(value)
    return emitter.op(node, [*laid, where], by_rows(axis, blocks, inner), dims)


def blocks_in(emitter: Emitter, size: Any, inner: Dim) -> int | None:
    """How many blocks of all rows a size has; None if that is not a known number."""
    if size is None or isinstance(size, int) and size == 0:
        return size
    number = emitter.sizes.number
    many = quotient(number(size), number(product([ROWS, inner])))
    return many if isinstance(many, int) else None


@rule("Pack")
def _pack(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    if any(v.dims is None for v in inputs):
        return None
    rank = inputs[0].rank
    axis = node.attr("axis") % (rank + 1)
    dims = list(emitter.sizes.broadcast([v.dims or [] for v in inputs]))
    dims.insert(axis, len(inputs))
    if any(v.is_partial for v in inputs) and not any(v.has_rows for v in inputs):
        laid = [emitter.as_partial(v) for v in inputs]
        return emitter.op(node, laid, PARTIAL, dims)
    values = [emitter.whole(v) if v.is_partial else v for v in inputs]
    if any(v.rank != rank for v in values):
        return None
    if not any(v.has_rows for v in values):
        return emitter.op(node, values, REPLICATED, dims)
    lead = _lead(values).layout
    laid = alike(emitter, values, lead)
    if laid is None:
        return None
    layout = inserted(lead, axis)
    dims[layout.dim] = layout.size
    return emitter.op(node, laid, layout, dims)


@rule("Unpack")
def _unpack(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    (value,) = inputs
    if value.dims is None:
        return None
    axis = node.attr("axis") % value.rank
    dims = [d for i, d in enumerate(value.dims) if i != axis]
    layout = value.layout
    if value.has_rows:
        if layout.dim == axis:
            return None
        layout = layout.moved(layout.dim - (axis < layout.dim))
    count = len(node.outputs)
    return emitter.op(node, [value], layout, tuple(list(dims) for _ in range(count)))


@rule("Split", "SplitV")
def _split(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    if node.type == "Split":
        where, value = inputs
        lengths = None
    else:
        value, lengths, where = inputs
    numbers = ints(where)
    if value.dims is None or numbers is None:
        return None
    axis, count = numbers[0] % value.rank, len(node.outputs)
    if value.has_rows and value.layout.dim == axis:
        return _split_rows(emitter, node, value, axis, count, lengths)
    if lengths is None:
        share = quotient(emitter.sizes.number(value.dims[axis]), count)
        sizes: list[Dim | None] = [share] * count
    else:
        sizes = elements_of(lengths) or [None] * count
    shapes = []
    for i, size in enumerate(sizes):
        dims = list(value.dims)
        traced = node.outputs[i].shape
        static = traced[axis] if traced.rank is not None else None
        known = size if size is not None and size != -1 else static
        dims[axis] = unknown() if known is None else known
        shapes.append(dims)
    given = [emitter.whole(v) if v is not value else v for v in inputs]
    return emitter.op(node, given, value.layout, tuple(shapes))


def _split_rows(emitter, node, value, axis, count, lengths) -> list[Value] | None:
    """`fake, real = tf.split(both, 2)`: splits at the borders of blocks."""
    blocks = value.layout.blocks
    if not isinstance(blocks, int):
        return None
    if lengths is None:
        shares: list[Any] = [quotient(blocks, count)] * count
    else:
        sizes = elements_of(lengths) or [None] * count
        shares = [
            -1 if size == -1 else blocks_in(emitter, size, value.layout.inner)
            for size in sizes
        ]
        if shares.count(-1) == 1 and None not in shares:
            shares[shares.index(-1)] = blocks - sum(shares) - 1
    if not all(shares) or min(shares) < 0 or sum(shares) != blocks:
        return None
    ends = np.cumsum(shares).tolist()
    return [
        taken_blocks(emitter, value, end - share, end)
        for share, end in zip(shares, ends, strict=True)
    ]


def taken_blocks(emitter: Emitter, value: Value, first: int, last: int) -> Value:
    """The blocks `first` to `last` of the rows of a value."""
    at, rank, blocks = value.layout.dim, value.rank, value.layout.blocks

    def sliced(tensor):
        one = tf.math.floordiv(tf.shape(tensor)[at], blocks)
        begin, size = [0] * rank, [-1] * rank
        begin[at], size[at] = first * one, (last - first) * one
        return tf.slice(tensor, tf.stack(begin), tf.stack(size))

    layout = by_rows(at, last - first, value.layout.inner)
    return emitter.call(sliced, [value], layout, value.dims)
