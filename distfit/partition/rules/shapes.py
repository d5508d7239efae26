"""Operations that move elements: the rows move with their dimension."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from distfit.partition.emission import Emitter, Value, cut_rule, rule
from distfit.partition.layouts import (
    PARTIAL,
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
from distfit.partition.rules.elementwise import alike
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node

# --- Reshape.


@rule("Reshape")
def _reshape(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, shape = inputs
    wanted = elements_of(shape)
    if wanted is None or any(w is None for w in wanted):
        if value.is_partial:  # The shape is that of the global batch.
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
    """A value reshaped to global dims that lie by rows."""
    others = [d for i, d in enumerate(dims) if i != layout.dim]
    if all(isinstance(d, int) and d > 0 for d in others):
        static = [-1 if i == layout.dim else d for i, d in enumerate(dims)]
        return emitter.call(lambda t: tf.reshape(t, static), [value], layout, dims)
    shape = emitter.local_shape(dims, layout)
    return emitter.call(tf.reshape, [value, shape], layout, dims)


def _resolved(emitter: Emitter, value: Value, wanted: list[Dim]) -> list[Dim]:
    """The wanted shape with its -1 computed, if that can be."""
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

    In the order of the elements there are `left` times the rows, and each has `right`
    elements. Both stay as they are, so a dimension of the result has the rows if what
    is before it divides `left`, and what is after it divides `right`.
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


# --- Dimensions of size 1, order of dimensions.


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
    return emitter.op(node, inputs, _inserted(value.layout, axis), dims)


def _inserted(layout: Layout, axis: int) -> Layout:
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
            return None  # A size that is not known may be 1.
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


# --- Broadcasts.


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
        dims = [*dims[:dim], layout.size, *dims[dim + 1 :]]  # Not its number.
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
        # For other rows, and where it is needed whole, there is nothing to exchange.
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

    A single element may as well be repeated for each block.
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
    """Repeated as often as there are rows on a replica, and not for all of them.

    The number of rows is an ordinary number where a step knows it, so that the rules
    above cannot tell that something is repeated for each row.
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


# --- Joining and taking apart.


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
    """The value by whose rows others are laid: one that is not known whole, if any."""
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
        many = _count(emitter, value.dims[axis], inner)
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


def _count(emitter: Emitter, size: Any, inner: Dim) -> int | None:
    """How many blocks of all rows a size is; None if it is not known to be a number."""
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
    layout = _inserted(lead, axis)
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
    """`fake, real = tf.split(both, 2)`: apart at the borders of blocks."""
    blocks = value.layout.blocks
    if not isinstance(blocks, int):
        return None
    if lengths is None:
        shares: list[Any] = [quotient(blocks, count)] * count
    else:
        sizes = elements_of(lengths) or [None] * count
        shares = [
            -1 if size == -1 else _count(emitter, size, value.layout.inner)
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


# --- Slices.


@rule("StridedSlice")
def _strided_slice(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value = inputs[0]
    spec = _Slices.of(emitter, node, value, inputs[1:])
    if spec is None:
        return None
    given = [emitter.whole(v) for v in inputs[1:]]
    if not value.has_rows:
        return emitter.op(node, [value, *given], value.layout, spec.dims)
    if spec.rows is None:
        return None
    if spec.rows != "all":
        return _slice_of_blocks(emitter, node, value, inputs[1:], spec)
    # An end that is the number of all rows is beyond those of a replica: all of them.
    layout = value.layout.moved(spec.row_dim)
    return emitter.op(node, [value, *given], layout, spec.dims)


def _slice_of_blocks(emitter, node, value, given, spec) -> list[Value] | None:
    """`both[:n]`: the first blocks of rows."""
    taken = taken_blocks(emitter, value, *spec.rows)
    if spec.only_rows:
        return [taken]
    laid = spec.of_all_rows(emitter, given)
    if laid is None:
        return None
    layout = taken.layout.moved(spec.row_dim)
    return emitter.op(node, [taken, *laid], layout, spec.dims)


class _Slices:
    """What a StridedSlice takes of each dimension.

    Attributes:
        dims: The shape of the result.
        rows: `"all"` if it takes all rows; `(first, last)` blocks; None for anything
            else.
        row_dim: The dimension of the result that has the rows.
        only_rows: Whether nothing but rows is sliced.
        row_entry: Which entry of begin and end is that of the rows.
    """

    dims: list[Dim]
    rows: Any = "all"
    row_dim = 0
    only_rows = True
    row_entry = 0
    _traced: tf.TensorShape

    @classmethod
    def of(cls, emitter: Emitter, node: Node, value: Value, given: list[Value]):
        """That of a slice, or of its gradient, whose last input is like the result."""
        is_slice = node.type == "StridedSlice"
        elements = [elements_of(v) for v in given]
        if value.dims is None or elements[2] is None:
            return None
        count = len(elements[2])
        begins, ends, steps = (e or [None] * count for e in elements)
        steps = ["?" if step is None else step for step in steps]
        masks = {
            name: node.attr(f"{name}_mask")
            for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
        }
        spec = cls()
        spec.dims = []
        result = node.outputs[0] if is_slice else node.op.inputs[-1]
        spec._traced = result.shape
        source = 0
        for i in range(count):
            if masks["ellipsis"] >> i & 1:
                later = sum(not masks["new_axis"] >> j & 1 for j in range(i + 1, count))
                while source < value.rank - later:
                    spec._keep(value, source)
                    source += 1
                continue
            if masks["new_axis"] >> i & 1:
                spec.dims.append(1)
                spec.only_rows = False
                continue
            if source >= value.rank:
                return None
            begin = None if masks["begin"] >> i & 1 else begins[i]
            end = None if masks["end"] >> i & 1 else ends[i]
            known_begin = masks["begin"] >> i & 1 or begins[i] is not None
            known_end = masks["end"] >> i & 1 or ends[i] is not None
            shrink = bool(masks["shrink_axis"] >> i & 1)
            if value.has_rows and source == value.layout.dim:
                spec.row_entry = i
            spec._take(
                emitter,
                value,
                source,
                begin if known_begin else "?",
                end if known_end else "?",
                steps[i],
                shrink,
            )
            source += 1
        while source < value.rank:
            spec._keep(value, source)
            source += 1
        return spec

    def _keep(self, value: Value, source: int) -> None:
        if value.has_rows and source == value.layout.dim:
            self.row_dim = len(self.dims)
        self.dims.append(value.dims[source])

    def _take(self, emitter, value, source, begin, end, step, shrink) -> None:
        size = value.dims[source]
        is_rows = value.has_rows and source == value.layout.dim
        if shrink:
            self.only_rows = False
            if is_rows:
                self.rows = None
            return
        same = emitter.sizes.same
        from_start = begin is None or begin == 0
        to_end = end is None or (end != "?" and same(end, size))
        if step == 1 and from_start and to_end:
            self._keep(value, source)
            return
        if is_rows:
            self.row_dim = len(self.dims)
            self.rows = _block_borders(emitter, value, begin, end, step)
            if self.rows is None:
                self.dims.append(unknown())
                return
            first, last = self.rows
            layout = value.layout
            self.dims.append(by_rows(source, last - first, layout.inner).size)
            return
        self.only_rows = False
        number = self._traced[len(self.dims)] if self._traced.rank else None
        length = _length(emitter, size, begin, end, step)
        if length is None:
            length = number
        self.dims.append(unknown() if length is None else length)

    def of_all_rows(self, emitter: Emitter, given: list[Value]) -> Any:
        """Begin, end and step that take all rows, and the rest as before."""
        laid = []
        for value, all_rows in zip(given, (0, 2**31 - 1, 1), strict=True):
            elements = elements_of(value)
            if elements is None:
                return None
            elements[self.row_entry] = all_rows
            if not emitter.can_compute(elements):
                return None
            laid.append(emitter.known(elements, value.dtype))
        return laid


def _block_borders(emitter, value, begin, end, step) -> tuple[int, int] | None:
    """The first and last block that a slice of rows takes; None if it cuts one."""
    blocks = value.layout.blocks
    if step != 1 or "?" in (begin, end) or not isinstance(blocks, int):
        return None
    borders = []
    for border, default in ((begin, 0), (end, blocks)):
        many: int | None = default
        if border is not None:
            many = _count(emitter, border, value.layout.inner)
        if many is None:
            return None
        borders.append(min(many + blocks if many < 0 else many, blocks))
    first, last = borders
    return (first, last) if 0 <= first < last else None


def _length(emitter, size, begin, end, step) -> int | None:
    size = emitter.sizes.number(size)
    given = [begin, end, step]
    if not isinstance(size, int) or not all(
        g is None or isinstance(g, int) for g in given
    ):
        return None
    return len(range(*slice(begin, end, step).indices(size)))


@rule("Slice")
def _slice(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, begin, size = inputs
    begins, sizes = elements_of(begin), elements_of(size)
    if value.dims is None or begins is None or sizes is None:
        return None
    if not value.has_rows:
        dims = _sliced_dims(emitter, value, begins, sizes)
        given = [value, emitter.whole(begin), emitter.whole(size)]
        return emitter.op(node, given, value.layout, dims)
    at = value.layout.dim
    blocks = _sliced_blocks(emitter, value, begins[at], sizes[at])
    if blocks is None:
        return None
    if blocks != (0, value.layout.blocks):
        value = taken_blocks(emitter, value, *blocks)
    begins[at], sizes[at] = 0, -1  # Of the rows that are left.
    if not emitter.can_compute([*begins, *sizes]):
        return None
    dims = _sliced_dims(emitter, value, begins, sizes)
    local = [emitter.known(begins, begin.dtype), emitter.known(sizes, size.dtype)]
    return emitter.op(node, [value, *local], value.layout, dims)


def _sliced_dims(emitter: Emitter, value: Value, begins, sizes) -> list[Dim]:
    dims: list[Dim] = []
    for at, many, dim in zip(begins, sizes, value.dims or (), strict=True):
        number = emitter.sizes.number(dim)
        if many is not None and many != -1:
            dims.append(many)
        elif at == 0 and many == -1:
            dims.append(dim)
        elif many == -1 and isinstance(number, int) and isinstance(at, int):
            dims.append(number - at)
        else:
            dims.append(unknown())
    return dims


def _sliced_blocks(emitter: Emitter, value: Value, begin, size) -> Any:
    """The first and last block that are taken of the rows; None if one is cut."""
    lies, sizes = value.layout, emitter.sizes
    whole = size is not None and (size == -1 or sizes.same(size, lies.size))
    if begin == 0 and whole:
        return 0, lies.blocks
    first = _count(emitter, begin, lies.inner)
    if first is None or not isinstance(lies.blocks, int):
        return None
    many = lies.blocks - first if size == -1 else _count(emitter, size, lies.inner)
    if many is None or many < 1 or first < 0 or first + many > lies.blocks:
        return None
    return first, first + many


@rule("StridedSliceGrad")
def _strided_slice_grad(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """The gradient of a slice, put back into zeros of the shape that was sliced."""
    shape, *given, gradient = inputs
    dims = elements_of(shape)
    if dims is None or gradient.dims is None or not emitter.can_compute(dims):
        return None
    if not gradient.has_rows:
        laid = [emitter.whole(v) for v in (shape, *given)]
        return emitter.op(node, [*laid, gradient], gradient.layout, dims)
    # As if it were the slice of a tensor with these dims, by the rows of one of them.
    for source in _sources(emitter, dims, gradient):
        spec = _Slices.of(emitter, node, source, given)
        if spec is None or spec.rows is None or spec.row_dim != gradient.layout.dim:
            continue
        if spec.rows == "all" and source.layout.blocks == gradient.layout.blocks:
            shape = emitter.local_shape(dims, source.layout, shape.dtype)
            laid = [shape, *(emitter.whole(v) for v in given), gradient]
            return emitter.op(node, laid, source.layout, dims)
        if spec.rows != "all":
            found = _padded_blocks(emitter, node, gradient, source, given, spec)
            if found is not None:
                return found
    return None


def _sources(emitter: Emitter, dims: list[Any], gradient: Value) -> Iterator[Value]:
    """Values by rows of which a slice may have the rows of a gradient."""
    inner = gradient.layout.inner
    for at, dim in enumerate(dims):
        many = _count(emitter, dim, inner)
        if many:
            yield Value(by_rows(at, many, inner), dims, gradient.dtype)


def _padded_blocks(
    emitter: Emitter, node: Node, gradient: Value, source: Value, given: Any, spec: Any
) -> list[Value] | None:
    """The gradient of `both[:n]`: zeros for the blocks that were not taken."""
    (first, last), at = spec.rows, source.layout.dim
    blocks: Any = source.layout.blocks
    if last - first != gradient.layout.blocks:
        return None
    if not spec.only_rows:
        layout = by_rows(at, last - first, source.layout.inner)
        laid = spec.of_all_rows(emitter, given)
        if laid is None:
            return None
        shape = emitter.local_shape(source.dims or (), layout, laid[0].dtype)
        (gradient,) = emitter.op(node, [shape, *laid, gradient], layout, source.dims)

    def padded(tensor):
        one = tf.math.floordiv(tf.shape(tensor)[at], last - first)
        paddings: list[Any] = [[0, 0]] * source.rank
        paddings[at] = [first * one, (blocks - last) * one]
        return tf.pad(tensor, paddings)

    return [emitter.call(padded, [gradient], source.layout, source.dims)]


# --- Padding, order, running sums: along other dimensions than the rows.


@rule("Pad", "PadV2", "MirrorPad", "MirrorPadGrad")
def _pad(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, where, *rest = inputs
    numbers = elements_of(where)
    if value.is_partial and node.type != "Pad":
        value = emitter.whole(value)
    if value.dims is None or numbers is None:
        return None
    given = [emitter.whole(v) for v in (where, *rest)]
    dims = _padded_dims(emitter, node, value.dims, numbers)
    if not value.has_rows:
        return emitter.op(node, [value, *given], value.layout, dims)
    at = value.layout.dim
    if numbers[2 * at] != 0 or numbers[2 * at + 1] != 0:
        return _padded_rows(emitter, node, value, numbers, given, dims)
    if node.type.startswith("Mirror"):
        return [_mirrored(emitter, node, value, given, dims)]
    return emitter.op(node, [value, *given], value.layout, dims)


def _padded_dims(emitter: Emitter, node: Node, dims: list[Dim], numbers) -> list[Dim]:
    padded: list[Dim] = []
    for i, dim in enumerate(dims):
        before, after = numbers[2 * i : 2 * i + 2]
        number: Any = emitter.sizes.number(dim)
        if before == 0 and after == 0:
            padded.append(dim)
        elif all(isinstance(n, int) for n in (before, number, after)):
            more = before + after
            padded.append(number + (-more if node.type == "MirrorPadGrad" else more))
        else:
            padded.append(unknown())
    return padded


def _padded_rows(emitter, node, value, numbers, given, dims) -> list[Value] | None:
    """The gradient of a slice of blocks of rows: further blocks, of zeros."""
    lies, at = value.layout, value.layout.dim
    ends = numbers[2 * at : 2 * at + 2]
    before, after = (_count(emitter, n, lies.inner) for n in ends)
    if node.type not in ("Pad", "PadV2") or not isinstance(lies.blocks, int):
        return None
    if before is None or after is None or min(before, after) < 0:
        return None
    layout = by_rows(at, before + lies.blocks + after, lies.inner)
    dims[at] = layout.size

    def padded(tensor, paddings, *constant):
        one = tf.math.floordiv(tf.shape(tensor)[at], lies.blocks)
        of_rows = tf.cast([[before * one, after * one]], paddings.dtype)
        paddings = tf.concat([paddings[:at], of_rows, paddings[at + 1 :]], 0)
        return tf.pad(tensor, paddings, constant_values=constant[0] if constant else 0)

    return [emitter.call(padded, [value, *given], layout, dims)]


def _mirrored(emitter, node, value, given, dims) -> Value:
    """With a row of zeros more, as the kernels refuse tensors without elements."""
    at = value.layout.dim

    def mirrored(tensor, paddings):
        one: list[Any] = [[0, 0]] * value.rank
        one[at] = [0, 1]
        operation = getattr(tf.raw_ops, node.type)
        more = operation(input=tf.pad(tensor, one), paddings=paddings, mode=mode)
        size = [-1] * value.rank
        size[at] = tf.shape(tensor)[at]
        return tf.slice(more, [0] * value.rank, tf.stack(size))

    mode = node.attr("mode")
    return emitter.call(mirrored, [value, *given], value.layout, dims)


@rule("Cumsum", "Cumprod", "ReverseV2", "CumulativeLogsumexp", "Roll")
def _along(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, *given = inputs
    numbers = ints(given[-1])
    if value.is_partial and node.type not in ("Cumsum", "ReverseV2", "Roll"):
        value = emitter.whole(value)
    if value.dims is None or numbers is None:
        return None
    axes = {a % value.rank for a in numbers} if value.rank else set()
    given = [emitter.whole(v) for v in given]
    if value.has_rows and value.layout.dim in axes:
        emitter.report(node)
        whole = [emitter.whole(value), *given]
        (result,) = emitter.op(node, whole, REPLICATED, value.dims)
        return [emitter.cut(result, value.layout)]
    return emitter.op(node, [value, *given], value.layout, value.dims)


@rule("TopKV2")
def _top_k(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, k = inputs
    value = emitter.whole(value) if value.is_partial else value
    if value.dims is None:
        return None
    many = (elements_of(k) or [None])[0]
    dims = [*value.dims[:-1], unknown() if many is None else many]
    if value.has_rows and value.layout.dim == value.rank - 1:
        return _largest_rows(emitter, node, value, k, dims)
    return emitter.op(node, [value, emitter.whole(k)], value.layout, (dims, list(dims)))


def _largest_rows(
    emitter: Emitter, node: Node, value: Value, k: Value, dims: list[Dim]
) -> list[Value]:
    """The order of rows takes all of them; where all are taken, it lies by rows."""
    if value.rank > 1:
        emitter.report(node)
    given = [emitter.whole(value), emitter.whole(k)]
    found = emitter.op(node, given, REPLICATED, (dims, list(dims)))
    if not emitter.sizes.same(dims[-1], value.layout.size):
        return found
    return [emitter.cut(v, value.layout) for v in found]


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
    known[at] = None  # A replica has fewer.
    return [
        emitter.call(
            lambda tensor: tf.ensure_shape(tensor, known), [value], value.layout, dims
        )
    ]


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
    return emitter.op(node, [value, *given], _inserted(value.layout, axis), dims)


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
