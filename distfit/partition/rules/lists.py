"""Lists and optionals, in which loops and branches keep tensors for their gradients.

`Value.element` is the layout of their elements; it is None while that is unknown: an
empty list takes the layout of its first element.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    REPLICATED,
    ROWS,
    Dim,
    Layout,
    by_rows,
    quotient,
    unknown,
)
from distfit.partition.registry import rule, size_rule
from distfit.partition.tracing import Node
from distfit.partition.values import Element, Value


def is_list(value: Value) -> bool:
    """Whether a value is a list of tensors."""
    return value.dtype == tf.variant


def of_list(values: list[Value], element: Any) -> list[Value]:
    """Marks the first of some values as a list of such elements."""
    values[0].element = element
    return values


def _shape_vector(emitter: Emitter, element: Any, given: Value) -> Value:
    """The shape of an element on a replica, for an operation on a list."""
    if element is None or element.dims is None:
        return emitter.whole(given)
    layout, dims = element.layout, element.dims
    numbers, cut = emitter.sizes.number, layout.dim if layout.kind == "rows" else None
    if layout.kind == "rows" and emitter.can_compute(dims):
        return emitter.local_shape(dims, layout, given.dtype)
    if layout.kind != "rows" and emitter.can_compute(dims):
        return emitter.known(list(dims), given.dtype)
    open_dims = [
        d if isinstance(numbers(d), int) and i != cut else -1
        for i, d in enumerate(dims)
    ]
    return emitter.known(open_dims, given.dtype)


def _lies(several: Value) -> tuple[Layout, list[Dim] | None]:
    if several.element is None:
        return REPLICATED, None
    return several.element.layout, several.element.dims


def _open_shape(element: Any, given: Value, emitter: Emitter) -> Value:
    """The shape of elements with all sizes open, as they may differ."""
    if element is None or element.dims is None:
        return emitter.whole(given)
    return emitter.known([-1] * len(element.dims), given.dtype)


def _element_of_shape(emitter: Emitter, shape: Value) -> Any:
    """The layout of elements, if their shape has a multiple of the rows."""
    if shape.sizes is None or shape.sizes.ndim != 1:
        return None
    dims = list(shape.sizes)
    if any(d is None or d == -1 for d in dims):
        return None
    for i, dim in enumerate(dims):
        many = quotient(dim, ROWS)
        if many is not None:
            return Element(by_rows(i, 1, many), dims)
    return None  # Still unknown: elements by rows may have such a shape, too.


@rule("TensorListReserve", "EmptyTensorList")
def _new_list(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    shape, number = inputs
    element = _element_of_shape(emitter, shape)
    given = emitter.whole(shape)
    if shape.sizes is not None and shape.sizes.ndim == 1:
        # Elements of another layout may be added: only the rank is certain.
        given = emitter.known([-1] * len(shape.sizes), shape.dtype)
    values = emitter.op(node, [given, emitter.whole(number)], REPLICATED, [])
    return of_list(values, element)


@rule("TensorListFromTensor")
def _from_tensor(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value, shape = inputs
    value = emitter.whole(value) if value.is_partial else value
    if value.dims is None:
        return of_list(
            emitter.op(node, [emitter.whole(value), emitter.whole(shape)], dims=[]),
            Element(REPLICATED, None),
        )
    if value.has_rows and value.layout.dim == 0:
        emitter.report(node)
        value = emitter.whole(value)
    layout = value.layout
    if value.has_rows:
        layout = layout.moved(layout.dim - 1)
    element = Element(layout, value.dims[1:])
    given = [value, _open_shape(element, shape, emitter)]
    return of_list(emitter.op(node, given, REPLICATED, []), element)


@rule("TensorListSetItem", "TensorListPushBack")
def _put(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    several, *index, item = inputs
    item = emitter.whole(item) if item.is_partial else item
    element = several.element
    if is_list(item):
        given = [several, *(emitter.whole(v) for v in index), item]
        one, other = element or item.element, item.element or element
        if one is not None and other is not None:
            if one.layout != other.layout:
                raise NotImplementedError("a list of lists of different layouts")
            dims = _joined_dims(emitter, one.dims, other.dims)
            element = Element(one.layout, dims)
        return of_list(emitter.op(node, given, REPLICATED, []), element)
    pushed = node.type == "TensorListPushBack"  # Else other elements are zeros.
    if element is None:
        element = Element(item.layout, item.dims, item.sizes if pushed else None)
    elif item.layout != element.layout:
        item = _as_element(emitter, item, element.layout)
    element = Element(
        element.layout,
        _joined_dims(emitter, element.dims, item.dims),
        element.sizes if pushed and same_sizes(element.sizes, item.sizes) else None,
    )
    given = [several, *(emitter.whole(v) for v in index), item]
    return of_list(emitter.op(node, given, REPLICATED, []), element)


def same_sizes(a: Any, b: Any) -> bool:
    """Whether two arrays of sizes are known and equal."""
    known = a is not None and b is not None and a.shape == b.shape
    return known and list(a.flat) == list(b.flat) and None not in list(a.flat)


def _as_element(emitter: Emitter, item: Value, layout: Layout) -> Value:
    if layout.kind == "rows":
        dims = emitter.whole(item).dims
        if dims is None or not emitter.sizes.same(dims[layout.dim], layout.size):
            raise NotImplementedError(
                f"an element of another layout, {item}, in a list of {layout}"
            )
    return emitter.to(item, layout)


def _joined_dims(emitter: Emitter, a: Any, b: Any) -> list[Dim] | None:
    if a is None or b is None or len(a) != len(b):
        return None
    return [
        x if emitter.sizes.same(x, y) else unknown() for x, y in zip(a, b, strict=True)
    ]


@rule("TensorListGetItem")
def _get(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    several, index, shape = inputs
    if node.outputs[0].dtype == tf.variant:
        given = [several, emitter.whole(index), emitter.whole(shape)]
        return of_list(emitter.op(node, given, REPLICATED, []), several.element)
    shape = _shape_vector(emitter, several.element, shape)
    layout, dims = _lies(several)
    return emitter.op(node, [several, emitter.whole(index), shape], layout, dims)


@rule("TensorListPopBack")
def _pop(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    several, shape = inputs
    if node.outputs[1].dtype == tf.variant:
        given = [several, emitter.whole(shape)]
        values = emitter.op(node, given, REPLICATED, ([], []))
        values[1].element = several.element
        return of_list(values, several.element)
    layout, dims = _lies(several)
    given = [several, _shape_vector(emitter, several.element, shape)]
    static = emitter.static_dims(node.outputs[1], layout) if dims is None else dims
    values = emitter.op(node, given, [REPLICATED, layout], ([], static))
    if several.element is not None:
        values[1].sizes = several.element.sizes
    return of_list(values, several.element)


@rule("TensorListStack")
def _stack(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    several, shape = inputs
    given = [several, _shape_vector(emitter, several.element, shape)]
    layout, dims = _lies(several)
    if dims is None:
        if layout != REPLICATED:
            raise NotImplementedError("a list of elements of unknown rank")
        return emitter.op(node, given, REPLICATED)
    number = node.attr("num_elements")
    if layout.kind == "rows":
        layout = layout.moved(layout.dim + 1)
    first = node.outputs[0].shape[0] if node.outputs[0].shape.rank else None
    many = number if number > 0 else first
    return emitter.op(node, given, layout, [unknown() if many is None else many, *dims])


@rule("TensorListLength")
def _length(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return emitter.op(node, inputs, REPLICATED, [])


@rule("TensorListResize")
def _resize(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    several, size = inputs
    values = emitter.op(node, [several, emitter.whole(size)], REPLICATED, [])
    layout, dims = _lies(several)
    return of_list(values, several.element and Element(layout, dims))


@size_rule("TensorListElementShape")
def _element_shape(emitter: Emitter, node: Node, inputs: list[Value]) -> Any:
    (several,) = inputs
    if several.element is None or several.element.dims is None:
        return None
    return [_vector(several.element.dims)]


def _vector(dims: list[Dim]) -> Any:
    vector = np.empty(len(dims), object)
    vector[:] = dims
    return vector


@rule("TensorListElementShape")
def _element_shape_op(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return emitter.op(node, inputs, REPLICATED)


@rule("TensorListGather")
def _gather_list(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    several, indices, shape = inputs
    layout, dims = _lies(several)
    if layout == REPLICATED:
        return emitter.op(node, [several, emitter.whole(indices), emitter.whole(shape)])
    if dims is None:
        raise NotImplementedError("a list of elements of unknown rank")
    shape = _shape_vector(emitter, several.element, shape)
    number = (indices.dims or [unknown()])[0]
    given = [several, emitter.whole(indices), shape]
    return emitter.op(node, given, layout.moved(layout.dim + 1), [number, *dims])


@rule("TensorListConcatV2")
def _concat_list(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    several, *others = inputs
    if _lies(several)[0] != REPLICATED:
        emitter.report(node)
        several = _whole_list(emitter, several, others[0], node.outputs[0].dtype)
    return emitter.op(node, [several, *(emitter.whole(v) for v in others)])


def _whole_list(emitter: Emitter, several: Value, given: Value, dtype: Any) -> Value:
    """A list whose elements are replicated, and of one shape."""
    layout, dims = _lies(several)
    if dims is None:
        raise NotImplementedError("a list of elements of unknown rank")

    def stacked(tensor, shape):
        return tf.raw_ops.TensorListStack(
            input_handle=tensor, element_shape=shape, element_dtype=dtype
        )

    def listed(tensor):
        open_shape = tf.fill([len(dims)], -1)
        return tf.raw_ops.TensorListFromTensor(tensor=tensor, element_shape=open_shape)

    shape = _shape_vector(emitter, several.element, given)
    rows = layout.moved(layout.dim + 1)
    stack = emitter.call(stacked, [several, shape], rows, [unknown(), *dims])
    whole = emitter.call(listed, [emitter.whole(stack)], REPLICATED, [])
    whole.element = Element(REPLICATED, dims)
    return whole


def same_list(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """`zeros_like` of a list, and sums of lists, element by element."""
    elements = [v.element for v in inputs if v.element is not None]
    if any(e.layout != elements[0].layout for e in elements):
        raise NotImplementedError("a sum of lists of different layouts")
    values = emitter.op(node, inputs, REPLICATED, [])
    if not elements:
        return values
    dims = elements[0].dims
    for element in elements[1:]:
        dims = _joined_dims(emitter, dims, element.dims)
    return of_list(values, Element(elements[0].layout, dims))


# --- Optionals: values that only the branch that was taken has computed.


@rule("OptionalFromValue")
def _optional(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, *others = inputs
    if others or value.resource is not None:
        return None
    element = value.element
    if not is_list(value):
        element = Element(value.layout, value.dims)
    return of_list(emitter.op(node, inputs, REPLICATED, []), element)


@rule("OptionalNone")
def _no_optional(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return emitter.op(node, inputs, REPLICATED, [])


@rule("OptionalGetValue")
def _of_optional(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    (optional,) = inputs
    traced, *others = node.outputs
    if traced.dtype == tf.variant and not others:
        return of_list(emitter.op(node, inputs, REPLICATED, []), optional.element)
    if optional.element is None or others:
        return None
    layout, dims = _lies(optional)
    rank = traced.shape.rank

    def get(tensor):
        # Only the rank: the shape in the traced graph is that of one device.
        (value,) = tf.raw_ops.OptionalGetValue(
            optional=tensor,
            output_types=[traced.dtype],
            output_shapes=[tf.TensorShape(None if rank is None else [None] * rank)],
        )
        return value

    value = emitter.call(get, inputs, layout, dims)
    if (shape := value.local_shape()) is not None:
        value.tensor.set_shape(shape)
    return [value]
