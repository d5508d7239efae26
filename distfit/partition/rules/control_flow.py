"""Branches and loops: their bodies are partitioned, too.

All replicas take the same branch. The layouts of a loop's variables are a fixed point:
the body is emitted again until it returns the layouts that it was given.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distfit._keras import graphs
from distfit.partition.emission import Emitter
from distfit.partition.layouts import PARTIAL, REPLICATED, Dim, Layout, unknown
from distfit.partition.program import Branch, Loop
from distfit.partition.registry import rule
from distfit.partition.rules.lists import is_list, same_sizes
from distfit.partition.tracing import Flat, Node
from distfit.partition.values import Element, Value

_MOST_PASSES = 8


@rule("If", "StatelessIf")
def _if(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    condition, *given = inputs
    if condition.dtype != tf.bool:
        condition = emitter.call(
            lambda t: tf.cast(t, tf.bool), [emitter.whole(condition)], REPLICATED, []
        )
    return _branches(emitter, node, condition, given)


@rule("Case", "StatelessCase")
def _case(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    index, *given = inputs
    return _branches(emitter, node, index, given)


def _branches(
    emitter: Emitter,
    node: Node,
    index: Value,
    given: list[Value],
) -> list[Value]:
    inner = [emitter.body(body, given) for body in graphs.branches_of(node.op)]
    outputs = [
        _joined(emitter, [values[i] for _, values in inner])
        for i in range(len(node.outputs))
    ]
    programs = []
    for branch, values in inner:
        laid = [
            _laid(branch, value, like)
            for value, like in zip(values, outputs, strict=True)
        ]
        programs.append(branch.program(laid))
        emitter.findings += branch.findings
    index = emitter.whole(index)
    level, keys = emitter.meeting([index, *given], node.has_effect)
    arrived = [emitter.arrived(level, like) for like in outputs]
    emitter.levels[level].meetings.append(
        Branch(
            inputs=keys,
            outputs=[value.tensor for value in arrived],
            rows=emitter.rows,
            branches=programs,
        )
    )
    return arrived


@dataclasses.dataclass
class _Carried:
    """The layout of a value that enters or leaves a body."""

    layout: Layout
    dims: list[Dim] | None
    dtype: tf.DType
    element: Any = None
    resource: Any = None
    sizes: Any = None


def _joined(emitter: Emitter, values: Sequence[Value]) -> _Carried:
    """The common layout of the values that branches return."""
    first, *others = values
    joined = _Carried(
        first.layout,
        _outside(emitter, first.dims),
        first.dtype,
        _element_outside(emitter, first.element),
    )
    for other in others:
        joined.layout = _common_layout(emitter, joined, other)
        joined.dims = _common_dims(emitter, joined.dims, other.dims)
        joined.element = _common_element(emitter, joined.element, other.element)
    if joined.layout.kind == "rows" and joined.dims is not None:
        joined.dims[joined.layout.dim] = joined.layout.size
    return joined


def _outside(emitter: Emitter, dims: Sequence[Dim] | None) -> list[Dim] | None:
    """Sizes as known outside of a body: those computed inside are unknown."""
    if dims is None:
        return None
    return [d if emitter.can_compute([d]) else unknown() for d in dims]


def _common_layout(emitter: Emitter, a: Any, b: Any) -> Layout:
    if a.layout == b.layout:
        return a.layout
    kinds = {a.layout.kind, b.layout.kind}
    if kinds == {"replicated", "partial"}:
        return PARTIAL
    if kinds == {"replicated", "rows"}:
        rows, other = (a, b) if a.layout.kind == "rows" else (b, a)
        dims = other.dims
        if dims is not None and emitter.sizes.same(
            dims[rows.layout.dim], rows.layout.size
        ):
            return rows.layout
    return REPLICATED


def _common_dims(emitter: Emitter, a: Any, b: Any) -> list[Dim] | None:
    if a is None or b is None or len(a) != len(b):
        return None
    return [
        x if emitter.sizes.same(x, y) and emitter.can_compute([x]) else unknown()
        for x, y in zip(a, b, strict=True)
    ]


def _common_element(emitter: Emitter, a: Any, b: Any) -> Any:
    if a is None or b is None:
        return _element_outside(emitter, a or b)
    if a.layout != b.layout:
        raise NotImplementedError(f"lists of layouts {a.layout} and {b.layout}")
    sizes = a.sizes if same_sizes(a.sizes, b.sizes) else None
    return Element(a.layout, _common_dims(emitter, a.dims, b.dims), sizes)


def _element_outside(emitter: Emitter, element: Element | None) -> Element | None:
    """The layout of elements, as far as it is known outside of a body."""
    if element is None:
        return None
    sizes = element.sizes
    if sizes is not None and not emitter.can_compute(sizes.flat):
        sizes = None
    return Element(element.layout, _outside(emitter, element.dims), sizes)


def _laid(inner: Emitter, value: Value, like: Any) -> Value:
    if value.dtype in (tf.resource, tf.variant):
        return value
    return inner.to(value, like.layout)


@rule("While", "StatelessWhile")
def _while(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    condition = graphs.body_of(node.op, "cond")
    body = graphs.body_of(node.op, "body")
    flat = Flat(body)
    constant = [
        edge.node is given and edge.index == 0
        for edge, given in zip(flat.outputs, flat.inputs, strict=True)
    ]
    carried, inner, outputs = _at_rest(emitter, body, inputs, constant)
    laid = [
        value if same else _laid(inner, value, like)
        for value, like, same in zip(outputs, carried, constant, strict=True)
    ]
    body_program = inner.program(laid)
    emitter.findings += inner.findings
    test, (flag,) = emitter.body(condition, _values(carried))
    test_program = test.program([test.whole(flag)])
    emitter.findings += test.findings
    given = [
        value
        if same or value.dtype in (tf.resource, tf.variant)
        else emitter.to(value, like.layout)
        for value, like, same in zip(inputs, carried, constant, strict=True)
    ]
    level, keys = emitter.meeting(given, node.has_effect)
    arrived = [
        value if same else emitter.arrived(level, _known_outside(emitter, like))
        for value, like, same in zip(given, carried, constant, strict=True)
    ]
    emitter.levels[level].meetings.append(
        Loop(
            inputs=keys,
            outputs=[
                emitter.arrived(level, like).tensor if same else value.tensor
                for value, like, same in zip(arrived, carried, constant, strict=True)
            ],
            rows=emitter.rows,
            condition=test_program,
            body=body_program,
            constant=constant,
            shapes=[value.local_shape() for value in _values(carried)],
            parallel_iterations=node.attr("parallel_iterations"),
        )
    )
    return arrived


def _known_outside(emitter: Emitter, like: _Carried) -> _Carried:
    dims = _outside(emitter, like.dims)
    if like.layout.kind == "rows" and dims is not None:
        dims[like.layout.dim] = like.layout.size
    element = _element_outside(emitter, like.element)
    return dataclasses.replace(like, dims=dims, element=element)


def _values(carried: Sequence[_Carried]) -> list[Value]:
    return [
        Value(
            c.layout,
            c.dims,
            c.dtype,
            element=c.element,
            resource=c.resource,
            sizes=c.sizes,
        )
        for c in carried
    ]


def _at_rest(
    emitter: Emitter, body: Any, inputs: Sequence[Value], constant: Sequence[bool]
) -> tuple[list[_Carried], Emitter, list[Value]]:
    """The final layouts of a loop's variables, and the body that preserves them."""
    carried = [
        _Carried(
            v.layout, v.dims, v.dtype, v.element, v.resource, v.sizes if same else None
        )
        for v, same in zip(inputs, constant, strict=True)
    ]
    for attempt in range(_MOST_PASSES):
        inner, outputs = emitter.body(body, _values(carried))
        settled = attempt >= _MOST_PASSES // 2
        after = [
            c if same else _after(emitter, c, value, settled)
            for c, value, same in zip(carried, outputs, constant, strict=True)
        ]
        if all(_alike(a, b) for a, b in zip(carried, after, strict=True)):
            return carried, inner, outputs
        carried = after
    raise NotImplementedError("a loop whose layouts do not converge")


def _after(emitter: Emitter, before: _Carried, value: Value, settled: bool) -> _Carried:
    """The next layout to try for a variable, from those before and after the body.

    Args:
        emitter: The emitter of the loop.
        before: The layout in which the body was given it.
        value: The value that the body returns.
        settled: Whether to replicate it if its layout still changes.
    """
    if value.dtype in (tf.resource, tf.variant) and not is_list(value):
        return before
    layout = _common_layout(emitter, before, value)
    if settled and layout != before.layout:
        layout = REPLICATED
    dims = _kept_dims(emitter, before.dims, value.dims)
    if layout.kind == "rows" and dims is not None:
        dims[layout.dim] = layout.size
    element = before.element
    if value.element is not None:
        element = _kept_element(emitter, element, value.element)
    return dataclasses.replace(before, layout=layout, dims=dims, element=element)


def _kept_element(
    emitter: Emitter, before: Element | None, after: Element
) -> Element | None:
    if before is None:
        return _element_outside(emitter, after)
    if before.layout != after.layout:
        raise NotImplementedError(
            f"a list whose layout changes from {before.layout} to {after.layout}"
        )
    sizes = before.sizes if same_sizes(before.sizes, after.sizes) else None
    return Element(before.layout, _kept_dims(emitter, before.dims, after.dims), sizes)


def _kept_dims(emitter: Emitter, before: Any, after: Any) -> list[Dim] | None:
    """The sizes that a variable keeps. A size that changes gets a symbol, which then
    stands for its size at the start of any iteration."""
    if before is None or after is None or len(before) != len(after):
        return None
    kept = []
    for old, new in zip(before, after, strict=True):
        free = not emitter.can_compute([old])
        kept.append(old if free or emitter.sizes.same(old, new) else unknown())
    return kept


def _alike(a: _Carried, b: _Carried) -> bool:
    if a.layout != b.layout or a.dims != b.dims:
        return False
    x, y = a.element, b.element
    if x is None or y is None:
        return x is y
    unsized = x.sizes is None and y.sizes is None
    sized = unsized or same_sizes(x.sizes, y.sizes)
    return x.layout == y.layout and x.dims == y.dims and sized
