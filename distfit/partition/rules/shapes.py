"""Operations that return the same elements in another shape."""

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    PARTIAL,
    ROWS,
    Dim,
    Layout,
    by_rows,
    product,
    quotient,
    unknown,
)
from distfit.partition.registry import rule
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value


@rule("Reshape")
def _reshape(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, shape = inputs
    wanted = elements_of(shape)
    if wanted is None or any(w is None for w in wanted):
        if value.is_partial:  # Each part has the global shape.
            dims = emitter.static_dims(node.outputs[0])
            return emitter.op(node, [value, emitter.whole(shape)], PARTIAL, dims)
        return None
    if not value.has_rows:
        dims = _resolved(emitter, value, wanted)
        return emitter.op(node, [value, emitter.whole(shape)], value.layout, dims)
    if _is_its_shape(emitter, value, wanted):
        return [value]
    found = reshaped(emitter, value, wanted)
    if found is None:
        return None
    dims, layout = found
    return [to_shape(emitter, value, dims, layout)]


def _is_its_shape(emitter: Emitter, value: Value, wanted: list[Dim]) -> bool:
    same = emitter.sizes.same
    return len(wanted) == value.rank and all(map(same, wanted, value.dims or ()))


def to_shape(emitter: Emitter, value: Value, dims: list[Dim], layout: Layout) -> Value:
    """A value reshaped to global dims, in a layout by rows."""
    others = [d for i, d in enumerate(dims) if i != layout.dim]
    if all(isinstance(d, int) and d > 0 for d in others):
        static = [-1 if i == layout.dim else d for i, d in enumerate(dims)]
        return emitter.call(lambda t: tf.reshape(t, static), [value], layout, dims)
    shape = emitter.local_shape(dims, layout)
    return emitter.call(tf.reshape, [value, shape], layout, dims)


def _resolved(emitter: Emitter, value: Value, wanted: list[Dim]) -> list[Dim]:
    """The wanted shape with its -1 replaced by the size, if that is known."""
    if -1 not in wanted:
        return wanted
    at = wanted.index(-1)
    rest = product([w for i, w in enumerate(wanted) if i != at])
    whole = None if value.dims is None else quotient(product(value.dims), rest)
    return [(unknown() if whole is None else whole) if w == -1 else w for w in wanted]


def reshaped(
    emitter: Emitter, value: Value, wanted: list[Dim]
) -> tuple[list[Dim], Layout] | None:
    """The shape and layout of rows after a reshape.

    In memory order, all rows come `left` times, and each row has `right` elements. A
    reshape changes neither, so a dimension of the result can have the rows if the sizes
    before it divide `left`, and those after it divide `right`.
    """
    number = emitter.sizes.number
    lies, dims = value.layout, value.dims or []
    left = product([*(number(d) for d in dims[: lies.dim]), lies.blocks])
    right = product([lies.inner, *(number(d) for d in dims[lies.dim + 1 :])])
    wanted = [w if w == -1 else number(w) for w in wanted]
    open_at = wanted.index(-1) if -1 in wanted else None
    size = product([left, number(ROWS), right])
    for j in range(len(wanted)):
        if open_at is not None and open_at != j:
            rest = product([w for i, w in enumerate(wanted) if i != open_at])
            filled = quotient(size, rest)
            if filled is None:
                return None
            shape = [filled if i == open_at else w for i, w in enumerate(wanted)]
        else:
            shape = list(wanted)
        blocks = quotient(left, product(shape[:j]))
        inner = quotient(right, product(shape[j + 1 :]))
        if not isinstance(blocks, int) or inner is None or 0 in (blocks, inner):
            continue
        layout = by_rows(j, blocks, inner)
        if shape[j] == -1 or emitter.sizes.same(shape[j], layout.size):
            shape[j] = layout.size
            return shape, layout
    return None


@rule("ExpandDims")
def _expand_dims(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value, where = inputs
    numbers = ints(where)
    if value.dims is None or numbers is None:
        return None
    axis = numbers[0] % (value.rank + 1)
    dims = [*value.dims[:axis], 1, *value.dims[axis:]]
    return emitter.op(node, inputs, inserted(value.layout, axis), dims)


def inserted(layout: Layout, axis: int) -> Layout:
    """The layout with a new dimension before `axis`."""
    if layout.kind == "rows" and axis <= layout.dim:
        return layout.moved(layout.dim + 1)
    return layout


@rule("Squeeze")
def _squeeze(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    (value,) = inputs
    if value.dims is None:
        return None
    given = node.attr("squeeze_dims")
    sizes = emitter.sizes
    if given:
        axes = sorted({a % value.rank for a in given})
    else:
        axes = [i for i, d in enumerate(value.dims) if sizes.is_one(d)]
        if not all(isinstance(sizes.number(d), int) for d in value.dims):
            return None  # An unknown size may be 1.
    if value.has_rows and value.layout.dim in axes:
        return None
    dims = [d for i, d in enumerate(value.dims) if i not in axes]
    layout = value.layout
    if value.has_rows:
        layout = layout.moved(layout.dim - sum(a < layout.dim for a in axes))
    return [
        emitter.call(
            (lambda t: tf.squeeze(t, axes)) if axes else tf.identity,
            [value],
            layout,
            dims,
        )
    ]


@rule("Transpose", "ConjugateTranspose")
def _transpose(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, where = inputs
    order = ints(where)
    if value.dims is None or order is None:
        return None
    order = [a % value.rank for a in order]
    layout = value.layout
    if value.has_rows:
        layout = layout.moved(order.index(layout.dim))
    return emitter.op(node, inputs, layout, [value.dims[a] for a in order])


@rule("EnsureShape")
def _ensure_shape(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    (value,) = inputs
    shape = tf.TensorShape(node.attr("shape"))
    if value.dims is None or shape.rank != value.rank:
        return None
    known = shape.as_list()
    pairs = zip(value.dims, known, strict=True)
    dims = [dim if size is None else size for dim, size in pairs]
    if not value.has_rows:
        return emitter.op(node, [value], value.layout, dims)
    at = value.layout.dim
    if known[at] is not None and not emitter.sizes.same(known[at], value.layout.size):
        return None
    known[at] = None  # A replica has fewer rows.
    return [
        emitter.call(
            lambda tensor: tf.ensure_shape(tensor, known), [value], value.layout, dims
        )
    ]
