"""Small integers derived from shapes: computed symbolically while the graph is built.

A size rule returns the elements of each output as `Dim`s, None for unknown ones.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from distfit.partition.emission import Emitter
from distfit.partition.layouts import Dim, Size, product, quotient
from distfit.partition.registry import size_rule
from distfit.partition.tracing import Node
from distfit.partition.values import Value

Elements = Any  # An array of objects: `Dim`s, and None for unknown elements.


def shape_of(value: Value) -> Elements:
    """The global shape of a value as elements of a vector."""
    vector = np.empty(value.rank, object)
    vector[:] = value.dims
    return vector


def elements_of(value: Value) -> list[Any] | None:
    """The elements of a vector of sizes, None for unknown ones."""
    return None if value.sizes is None else list(value.sizes.flat)


def ints(value: Value) -> list[int] | None:
    """The elements of a vector or scalar of integers, if all are numbers."""
    if value.sizes is None:
        return None
    elements = list(value.sizes.flat)
    if not all(isinstance(e, int | np.integer) for e in elements):
        return None
    return [int(e) for e in elements]


@size_rule("Shape", "ShapeN")
def _shape(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    if any(v.dims is None for v in inputs):
        return None
    return [shape_of(v) for v in inputs]


@size_rule("Size")
def _size(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    return None if inputs[0].dims is None else [product(inputs[0].dims)]


@size_rule("Rank")
def _rank(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    return None if inputs[0].dims is None else [inputs[0].rank]


@size_rule("Identity", "Cast", "StopGradient", "Snapshot", "PreventGradient")
def _same(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    to, given = node.outputs[0].dtype, inputs[0].dtype
    if to != given and min(to.size, given.size) < 4:
        return None  # It may not fit.
    return None if inputs[0].sizes is None else [inputs[0].sizes]


def _arithmetic(operate: Callable) -> Callable:
    def evaluate(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
        if any(v.sizes is None for v in inputs):
            return None

        def one(a, b):
            if a is None or b is None:
                return None
            number = emitter.sizes.number
            return operate(number(a), number(b))

        elements = inputs[0].sizes
        for value in inputs[1:]:
            elements = np.frompyfunc(one, 2, 1)(elements, value.sizes)
        return [elements]

    return evaluate


def _add(a: Dim, b: Dim) -> Dim | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return a + b
    if a == 0:
        return b
    if b == 0:
        return a
    if isinstance(a, Size) and isinstance(b, Size) and a.symbols == b.symbols:
        factor = a.factor + b.factor
        return Size(factor, a.symbols) if factor else 0
    return None


def _subtract(a: Dim, b: Dim) -> Dim | None:
    return _add(a, Size(-b.factor, b.symbols) if isinstance(b, Size) else -b)


def _floor_divide(a: Dim, b: Dim) -> Dim | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return int(a) // int(b) if b else None
    # rows / rows is 1, but 0 / 0 is an error where there are no rows.
    return quotient(a, b)


def _truncate_divide(a: Dim, b: Dim) -> Dim | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        if not b:
            return None
        magnitude = abs(int(a)) // abs(int(b))
        return magnitude if (a < 0) == (b < 0) else -magnitude
    return quotient(a, b)


def _modulo(a: Dim, b: Dim) -> Dim | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return int(a) % int(b) if b else None
    return 0 if quotient(a, b) is not None else None


def _maximum(a: Dim, b: Dim) -> Dim | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return max(a, b)
    if a == b:
        return a
    for size, other in ((a, b), (b, a)):
        if isinstance(size, Size) and size.factor > 0 and other == 0:
            return size  # It is never negative, but may be 0.
    return None


def _minimum(a: Dim, b: Dim) -> Dim | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return min(a, b)
    return a if a == b else None


for _types, _operate in (
    (("Add", "AddV2"), _add),
    (("Sub",), _subtract),
    (("Mul",), lambda a, b: product([a, b])),
    (("FloorDiv",), _floor_divide),
    (("TruncateDiv", "Div"), _truncate_divide),
    (("FloorMod",), _modulo),
    (("Maximum",), _maximum),
    (("Minimum",), _minimum),
):
    size_rule(*_types)(_arithmetic(_operate))

_COMPARISONS: dict[str, Callable] = {
    "Equal": operator.eq,
    "NotEqual": operator.ne,
    "Less": operator.lt,
    "LessEqual": operator.le,
    "Greater": operator.gt,
    "GreaterEqual": operator.ge,
}


@size_rule(*_COMPARISONS)
def _compare(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    a, b = (ints(v) for v in inputs)
    if a is None or b is None:
        return None
    shapes = [v.sizes.shape for v in inputs]
    pair = (np.reshape(n, s) for n, s in zip((a, b), shapes, strict=True))
    return [np.asarray(_COMPARISONS[node.type](*pair)).astype(object)]


@size_rule("Select", "SelectV2")
def _select(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    if any(v.sizes is None for v in inputs) or ints(inputs[0]) is None:
        return None
    condition, x, y = (v.sizes for v in inputs)
    if node.type == "Select" and condition.shape not in ((), x.shape):
        return None
    return [np.where(condition.astype(bool), x, y)]


@size_rule("Neg")
def _negate(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    if inputs[0].sizes is None:
        return None

    def one(a):
        return None if a is None else product([a, -1])

    return [np.frompyfunc(one, 1, 1)(inputs[0].sizes)]


@size_rule("Prod")
def _prod(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements, axes = inputs[0].sizes, ints(inputs[1])
    if elements is None or axes is None or elements.ndim != 1 or len(axes) != 1:
        return None
    result = None if any(e is None for e in elements) else product(elements)
    return [_vector([result]) if node.attr("keep_dims") else _scalar(result)]


@size_rule("Sum")
def _sum(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements, axes = inputs[0].sizes, ints(inputs[1])
    if elements is None or axes is None or elements.ndim != 1 or len(axes) != 1:
        return None
    result: Dim | None = 0
    for element in elements:
        if result is not None:
            result = None if element is None else _add(result, element)
    return [_vector([result]) if node.attr("keep_dims") else _scalar(result)]


@size_rule("StridedSlice")
def _strided_slice(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements = inputs[0].sizes
    given = [ints(v) for v in inputs[1:]]
    if elements is None or any(g is None or len(g) > elements.ndim for g in given):
        return None
    if node.attr("ellipsis_mask") or node.attr("new_axis_mask"):
        return None
    index: list[Any] = []
    for i, (begin, end, step) in enumerate(zip(*given, strict=True)):
        if node.attr("shrink_axis_mask") >> i & 1:
            index.append(begin)
            continue
        first = None if node.attr("begin_mask") >> i & 1 else begin
        last = None if node.attr("end_mask") >> i & 1 else end
        index.append(slice(first, last, step))
    result = elements[tuple(index)]
    return [result if isinstance(result, np.ndarray) else _scalar(result)]


@size_rule("Slice")
def _slice(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements, begin, size = inputs[0].sizes, ints(inputs[1]), ints(inputs[2])
    if elements is None or begin is None or size is None:
        return None
    index = tuple(
        slice(at, None if many == -1 else at + many)
        for at, many in zip(begin, size, strict=True)
    )
    return [elements[index]]


@size_rule("Transpose")
def _transpose(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements, order = inputs[0].sizes, ints(inputs[1])
    return None if elements is None or order is None else [elements.transpose(order)]


@size_rule("Pack")
def _pack(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    if any(v.sizes is None for v in inputs) or len({v.sizes.shape for v in inputs}) > 1:
        return None
    return [np.stack([v.sizes for v in inputs], node.attr("axis"))]


@size_rule("Unpack")
def _unpack(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    if inputs[0].sizes is None:
        return None
    parts = np.moveaxis(inputs[0].sizes, node.attr("axis"), 0)
    return [p if isinstance(p, np.ndarray) else _scalar(p) for p in parts]


@size_rule("ConcatV2")
def _concat(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    axis = ints(inputs[-1])
    if axis is None or any(v.sizes is None for v in inputs):
        return None
    return [np.concatenate([v.sizes for v in inputs[:-1]], axis[0])]


@size_rule("GatherV2")
def _gather(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements, at, axis = inputs[0].sizes, ints(inputs[1]), ints(inputs[2])
    if elements is None or at is None or axis is None or elements.ndim != 1:
        return None
    if any(not 0 <= i < len(elements) for i in at):
        return None
    return [elements[np.reshape(at, inputs[1].sizes.shape).astype(int)]]


@size_rule("Reshape")
def _reshape(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    shape = ints(inputs[1])
    if inputs[0].sizes is None or shape is None:
        return None
    return [np.reshape(inputs[0].sizes, shape)]


@size_rule("Squeeze")
def _squeeze(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    if inputs[0].sizes is None:
        return None
    return [np.squeeze(inputs[0].sizes, tuple(node.attr("squeeze_dims")) or None)]


@size_rule("ExpandDims")
def _expand_dims(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    axis = ints(inputs[1])
    if inputs[0].sizes is None or axis is None:
        return None
    return [np.expand_dims(inputs[0].sizes, axis[0])]


@size_rule("DynamicStitch", "ParallelDynamicStitch")
def _dynamic_stitch(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    count = node.attr("N")
    places = [ints(v) for v in inputs[:count]]
    data = [v.sizes for v in inputs[count:]]
    if any(p is None for p in places) or any(d is None for d in data):
        return None
    elements: dict[int, Any] = {}
    for at, values in zip(places, data, strict=True):
        if len(at or ()) != values.size:
            return None
        elements.update(zip(at or (), values.flat, strict=True))
    if sorted(elements) != list(range(len(elements))):
        return None
    return [_vector([elements[i] for i in range(len(elements))])]


@size_rule("InvertPermutation")
def _invert_permutation(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    order = ints(inputs[0])
    if order is None or sorted(order) != list(range(len(order))):
        return None
    return [_vector([order.index(i) for i in range(len(order))])]


@size_rule("ReverseV2")
def _reverse(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    elements, axes = inputs[0].sizes, ints(inputs[1])
    if elements is None or axes is None:
        return None
    return [np.flip(elements, tuple(axes))]


@size_rule("ConcatOffset")
def _concat_offset(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    """The offset of each shape in their concatenation along a dimension."""
    axis, shapes = ints(inputs[0]), [v.sizes for v in inputs[1:]]
    if axis is None or any(s is None for s in shapes):
        return None
    offsets, at = [], 0
    for shape in shapes:
        begin: list[Any] = [0] * len(shape)
        begin[axis[0]] = at
        offsets.append(_vector(begin))
        size = shape[axis[0]]
        at = None if at is None or size is None else _add(at, size)  # type: ignore
    return offsets


@size_rule("Range")
def _range(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    given = [ints(v) for v in inputs]
    if any(g is None for g in given):
        return None
    numbers = np.arange(*(g[0] for g in given if g is not None))
    return [_vector([int(n) for n in numbers])] if len(numbers) <= 64 else None


@size_rule("Fill")
def _fill(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    shape, value = ints(inputs[0]), inputs[1].sizes
    if shape is None or value is None or np.prod(shape) > 64:
        return None
    elements = np.empty(shape, object)
    elements.fill(value.item())
    return [elements]


@size_rule("BroadcastArgs")
def _broadcast_args(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    shapes = _known_shapes(inputs)
    return None if shapes is None else [_vector(emitter.sizes.broadcast(shapes))]


@size_rule("BroadcastGradientArgs")
def _broadcast_gradient_args(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    """The axes along which each of two shapes is broadcast, from global sizes.

    The local sizes of a replica with a single row would look like a broadcast.
    """
    shapes = _known_shapes(inputs)
    if shapes is None:
        return None
    rank = max(map(len, shapes))
    padded: list[list[Dim]] = [[*[1] * (rank - len(s)), *s] for s in shapes]
    absent = [rank - len(s) for s in shapes]
    axes: tuple[list[int], list[int]] = ([], [])
    sizes = emitter.sizes
    for i, (a, b) in enumerate(zip(*padded, strict=True)):
        if not sizes.same(a, b) and not (sizes.is_one(a) or sizes.is_one(b)):
            return None
        for own, dim, other, missing in (
            (axes[0], a, b, absent[0]),
            (axes[1], b, a, absent[1]),
        ):
            if i < missing or (sizes.is_one(dim) and not sizes.is_one(other)):
                own.append(i)
    return [_vector(list(own)) for own in axes]


def _known_shapes(inputs: list[Value]) -> list[list[Dim]] | None:
    if any(v.sizes is None or any(s is None for s in v.sizes) for v in inputs):
        return None
    return [list(v.sizes) for v in inputs]


def _scalar(element: Any) -> Elements:
    result = np.empty((), object)
    result[()] = element
    return result


def _vector(elements: list) -> Elements:
    result = np.empty(len(elements), object)
    result[:] = elements
    return result


@size_rule("ListDiff")
def _without(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    """The elements of one vector that are not in another, e.g. the remaining axes."""
    if any(v.sizes is None or v.sizes.ndim != 1 for v in inputs):
        return None
    elements, others = (list(v.sizes) for v in inputs)
    if not all(isinstance(e, int) for e in [*elements, *others]):
        return None
    places = [i for i, e in enumerate(elements) if e not in others]
    return [[elements[i] for i in places], places]
