"""A step in double precision, where rounding errors shrink but mistakes do not.

What a step computes in float32 is computed in float64 instead. Batches, variables,
random numbers and results keep their types, as do operations for which TensorFlow has
no float64 kernel.
"""

import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distfit._keras import graphs
from distfit.partition import tracing

_LOOPS = {"While", "StatelessWhile"}
# Random numbers, which would change; bits; Python functions.
_AS_THEY_ARE = re.compile("Random|Multinomial|Truncated|Bitcast|PyFunc|Normal|Gamma")
_OPAQUE = {tf.resource, tf.string}


def doubled(graph: Any, spec: Any) -> Any:
    """The graph of a step, with float64 in place of float32 where it computes.

    Args:
        graph: A `FuncGraph`.
        spec: The structure of the specs of its batch.

    Returns:
        A `FuncGraph` that takes and returns the same types.
    """
    captured = [outer for outer, _ in graph.captures]

    def step(batch):
        leaves = tf.nest.flatten(batch, expand_composites=True)
        given = [t for t in leaves if t is not None] + captured
        results = _results(graph, [_double(t) for t in given])
        like = zip(results, graph.outputs, strict=True)
        outputs = [tf.cast(t, old.dtype) for t, old in like]
        return tracing.filled(graph.structured_outputs, outputs)

    return graphs.trace(step, spec)


def _double(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float64) if tensor.dtype == tf.float32 else tensor


def _results(graph: Any, given: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The outputs of a graph in which exactly the float32 tensors become float64."""
    found = {t.ref(): new for t, new in zip(graph.inputs, given, strict=True)}
    for op in tracing.in_order(graph):
        if op.outputs and op.outputs[0].ref() in found:
            continue
        results = _done(op, [found[t.ref()] for t in op.inputs])
        for old, new in zip(op.outputs, results, strict=True):
            found[old.ref()] = _double(new)
            found[old.ref()].set_shape(old.shape)
    return [found[t.ref()] for t in graph.outputs]


def _done(op: tf.Operation, inputs: list[tf.Tensor]) -> Sequence[tf.Tensor]:
    body = graphs.called(op)
    if body is not None:
        return _results(body, inputs)
    if op.type in _LOOPS:
        condition, body = (graphs.body_of(op, name) for name in ("cond", "body"))
        return tf.while_loop(
            lambda *given: _results(condition, given)[0],
            lambda *given: _results(body, given),
            inputs,
            shape_invariants=[t.shape for t in body.inputs],
        )
    if op.type in graphs.BRANCHING:
        return _branched(op, *inputs)
    if op.type == "Const" and op.outputs[0].dtype == tf.float32:
        value = tf.make_ndarray(op.get_attr("value"))
        return [tf.constant(value.astype("float64"))]
    return _alike(op, inputs)


def _branched(op: tf.Operation, index: tf.Tensor, *given) -> Sequence[tf.Tensor]:
    bodies = graphs.branches_of(op)
    if op.type in ("If", "StatelessIf"):
        index = tf.cast(tf.cast(index, tf.bool), tf.int32)
    # The extra constant is for branches without results.
    branches = [lambda b=b: (*_results(b, given), tf.constant(0)) for b in bodies]
    return tf.switch_case(index, branches)[: len(op.outputs)]


def _alike(op: tf.Operation, inputs: list[tf.Tensor]) -> list[tf.Tensor]:
    """The same operation, in float64 if possible."""
    types = _types(op)
    changed: dict[str, Any] = {}
    for name, value in types.items():
        if tf.float32 in (value if isinstance(value, list) else [value]):
            changed[name] = _doubled_type(value)
    if not _can_change(op, {**types, **changed}, changed):
        changed = {}
    given = [
        t if follows or old.dtype != tf.float32 else tf.cast(t, tf.float32)
        for t, old, follows in zip(inputs, op.inputs, _follow(op, changed), strict=True)
    ]
    graph = tf.compat.v1.get_default_graph()
    return graphs.copy_operation(graph, op, given, **changed)


def _types(op: tf.Operation) -> dict[str, Any]:
    kinds = ("type", "list(type)")
    return {a.name: op.get_attr(a.name) for a in op.op_def.attr if a.type in kinds}


def _doubled_type(value: Any) -> Any:
    if isinstance(value, list):
        return [_doubled_type(each) for each in value]
    return tf.float64 if value == tf.float32 else value


def _can_change(op: tf.Operation, types: dict, changed: dict) -> bool:
    if _AS_THEY_ARE.search(op.type):
        return False
    if not _OPAQUE.isdisjoint(t.dtype for t in (*op.inputs, *op.outputs)):
        return False
    for attribute in op.op_def.attr:
        allowed = attribute.allowed_values.list.type
        if attribute.name in changed and allowed:
            if tf.float64.as_datatype_enum not in allowed:
                return False
    return graphs.has_kernel(op, types)


def _follow(op: tf.Operation, changed: dict) -> list[bool]:
    """For each input, whether its type is one of the changed attributes."""
    found: list[bool] = []
    for arg in op.op_def.input_arg:
        number = 1
        if arg.number_attr:
            number = op.get_attr(arg.number_attr)
        elif arg.type_list_attr:
            number = len(op.get_attr(arg.type_list_attr))
        found += [(arg.type_attr or arg.type_list_attr) in changed] * number
    return found
