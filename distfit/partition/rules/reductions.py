"""Reductions: a sum over rows is a partial sum, of each replica's own rows."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import PARTIAL, REPLICATED, Dim, Layout, product
from distfit.partition.registry import rule
from distfit.partition.rules.elementwise import align, channels_of
from distfit.partition.rules.sizes import ints
from distfit.partition.tracing import Edge, Node
from distfit.partition.values import Value


def reduced(value: Value, axes: set[int], keep_dims: bool) -> tuple[list[Dim], Layout]:
    """The shape and, if rows are not reduced, the layout of a reduction."""
    dims: list[Dim] = []
    for i, dim in enumerate(value.dims or ()):
        if i not in axes:
            dims.append(dim)
        elif keep_dims:
            dims.append(1)
    layout = value.layout
    if value.has_rows and layout.dim not in axes and not keep_dims:
        layout = layout.moved(layout.dim - sum(a < layout.dim for a in axes))
    return dims, layout


@rule("Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm")
def _reduce(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, where = inputs
    numbers = ints(where)
    if value.dims is None or numbers is None:
        return None
    axes = {a % value.rank for a in numbers} if value.rank else set()
    dims, layout = reduced(value, axes, node.attr("keep_dims"))
    if value.is_partial:
        if node.type != "Sum" and not (node.type == "Mean" and _is_inexact(value)):
            value, layout = emitter.whole(value), REPLICATED
        return emitter.op(node, [value, where], layout, dims)
    if not value.has_rows or value.layout.dim not in axes:
        return emitter.op(node, [value, where], layout, dims)
    if node.type == "Sum":
        return [_sum(emitter, node, value, where, dims)]
    if node.type == "Mean":
        return _variance(emitter, node, value, axes, dims) or _mean(
            emitter, node, value, axes, dims
        )
    return [_of_parts(emitter, node, value, where, dims)]


def _sum(emitter, node, value: Value, where: Value, dims) -> Value:
    (result,) = emitter.op(node, [value, where], PARTIAL, dims)
    return result


def _is_inexact(value: Value) -> bool:
    return value.dtype.is_floating or value.dtype.is_complex


def _wide(dtype: tf.DType) -> tf.DType:
    """The dtype to sum many rows in: half precision may overflow."""
    return tf.float32 if dtype.size < 4 else dtype


def _mean(
    emitter: Emitter, node: Node, value: Value, axes: set[int], dims: list[Dim]
) -> list[Value] | None:
    """The sum of a replica's rows divided by the number of all rows, a partial sum."""
    count = product([value.dims[a] for a in axes])
    dtype, at, keep = value.dtype, sorted(axes), node.attr("keep_dims")
    if not emitter.can_compute([count]) or not _is_inexact(value):
        return None

    def part(tensor, size):
        wide = _wide(dtype)
        total = tf.reduce_sum(tf.cast(tensor, wide), at, keepdims=keep)
        return tf.cast(total / tf.cast(size, wide), dtype)

    size = emitter.known(count, tf.int64)
    return [emitter.call(part, [value, size], PARTIAL, dims)]


def _variance(emitter, node, value: Value, axes: set[int], dims) -> list[Value] | None:
    """The mean of the squared differences from a mean over the same axes.

    Emitted literally, it needs an exchange for the mean and then one for itself. From
    each replica's mean and sum of squares it needs one, which the mean shares
    (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm
    for computing sample variances", 1979):
    sum of squares = sum over replicas of (own sum of squares + n · (own mean - mean)²).
    """
    for x_edge, mean_edge in _differences(value.node):
        mean = _origin(mean_edge).node
        if mean.type != "Mean" or mean.inputs[0] != x_edge:
            continue
        if not mean.attr("keep_dims"):
            continue
        x = emitter.values[x_edge]
        if not x.has_rows or x.layout != value.layout or x.dims != value.dims:
            continue
        of_mean = ints(emitter.values[mean.inputs[1]])
        if of_mean is None or {a % x.rank for a in of_mean} != axes:
            continue
        if x.dtype.is_floating and emitter.can_compute(x.dims):
            return [_variance_of(emitter, node, x, axes, dims)]
    return None


def _differences(node: Node | None) -> list[tuple[Edge, Edge]]:
    """The two terms of a squared difference, in both orders."""
    if node is not None and node.type == "Square":
        node = _origin(node.inputs[0]).node
        if node.type != "Sub":
            return []
    elif node is None or node.type != "SquaredDifference":
        return []
    first, second = node.inputs
    return [(first, second), (second, first)]


def _origin(edge: Edge) -> Edge:
    while edge.node.type in ("StopGradient", "Identity"):
        edge = edge.node.inputs[0]
    return edge


def _variance_of(emitter, node, x: Value, axes: set[int], dims) -> Value:
    at, wide = sorted(axes), _wide(x.dtype)
    local = emitter.known_local_count(x, axes, wide)
    total = emitter.known(product([x.dims[a] for a in axes]), wide)

    def moments(tensor, n):
        tensor = tf.cast(tensor, wide)
        own = tf.math.divide_no_nan(tf.reduce_sum(tensor, at, keepdims=True), n)
        squares = tf.math.squared_difference(tensor, own)
        squares = tf.reduce_sum(squares, at, keepdims=True)
        return tf.stack([own, squares, tf.fill(tf.shape(own), n)])

    kept = [1 if i in axes else d for i, d in enumerate(x.dims)]
    stack = emitter.call(moments, [x, local], REPLICATED, [3, *kept])
    stacked = emitter.whole(emitter.stacked(stack))

    def combined(parts, n):
        means, squares, counts = tf.unstack(parts, num=3, axis=1)
        mean = tf.reduce_sum(means * counts, 0, keepdims=True) / n
        between = counts * tf.math.squared_difference(means, mean)
        variance = tf.reduce_sum(squares + between, 0) / n
        if not node.attr("keep_dims"):
            variance = tf.squeeze(variance, at)
        return tf.cast(variance, x.dtype)

    return emitter.call(combined, [stacked, total], REPLICATED, dims)


_OF_PARTS: dict[str, Callable] = {
    "Max": tf.reduce_max,
    "Min": tf.reduce_min,
    "Prod": tf.reduce_prod,
    "Any": tf.reduce_max,  # Of 0 and 1.
    "All": tf.reduce_min,
    "EuclideanNorm": tf.math.reduce_euclidean_norm,
}


def _of_parts(emitter, node, value: Value, where: Value, dims) -> Value:
    """Reduces each replica's rows, and then the results of all replicas."""
    (own,) = emitter.op(node, [value, where], REPLICATED, dims)
    parts = emitter.whole(emitter.stacked(own))
    dtype, combine = node.outputs[0].dtype, _OF_PARTS[node.type]

    def combined(tensor):
        result = combine(tensor, 0)
        return result if result.dtype == dtype else tf.cast(result, dtype)

    return emitter.call(combined, [parts], REPLICATED, dims)


@rule("L2Loss")
def _l2_loss(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    (value,) = inputs
    if value.is_partial:
        value = emitter.whole(value)
    return emitter.op(node, [value], PARTIAL if value.has_rows else REPLICATED, [])


@rule("BiasAddGrad")
def _bias_add_grad(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    (value,) = inputs
    if value.dims is None:
        return None
    channels = channels_of(node, value)
    dims = [value.dims[channels]]
    if value.is_partial:
        return emitter.op(node, [value], PARTIAL, dims)
    if not value.has_rows:
        return emitter.op(node, [value], REPLICATED, dims)
    if value.layout.dim == channels:
        return None
    return emitter.op(node, [value], PARTIAL, dims)


@rule("ArgMax", "ArgMin")
def _arg(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, where = inputs
    numbers = ints(where)
    value = emitter.whole(value) if value.is_partial else value
    if value.dims is None or numbers is None:
        return None
    axes = {numbers[0] % value.rank}
    dims, layout = reduced(value, axes, False)
    if value.has_rows and value.layout.dim in axes:
        return None
    return emitter.op(node, [value, where], layout, dims)


@rule("Softmax", "LogSoftmax")
def _softmax(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value = emitter.whole(inputs[0]) if inputs[0].is_partial else inputs[0]
    if value.dims is None:
        return None
    if value.has_rows and value.layout.dim == value.rank - 1:
        return [_softmax_of_rows(emitter, node, value)]
    return emitter.op(node, [value], value.layout, value.dims)


def _softmax_of_rows(emitter: Emitter, node: Node, value: Value) -> Value:
    """A softmax along the rows: exchanges their maximum and the sum of exponentials."""
    dtype, wide = value.dtype, _wide(value.dtype)
    dims = [*(value.dims or ())[:-1], 1]

    def largest(tensor):
        return tf.reduce_max(tf.cast(tensor, wide), -1, keepdims=True)

    def shifted(tensor, parts):
        return tf.cast(tensor, wide) - tf.reduce_max(parts, 0)

    def summed(tensor):
        return tf.reduce_sum(tf.exp(tensor), -1, keepdims=True)

    def normalized(tensor, total):
        if node.type == "LogSoftmax":
            return tf.cast(tensor - tf.math.log(total), dtype)
        return tf.cast(tf.exp(tensor) / total, dtype)

    own = emitter.call(largest, [value], REPLICATED, dims)
    parts = emitter.whole(emitter.stacked(own))
    exponents = emitter.call(shifted, [value, parts], value.layout, value.dims)
    total = emitter.call(summed, [exponents], PARTIAL, dims)
    laid = [exponents, emitter.whole(total)]
    return emitter.call(normalized, laid, value.layout, value.dims)


@rule("FakeQuantWithMinMaxVars")
def _fake_quantized(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value, *limits = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if any(v.has_rows for v in limits):
        return None
    return emitter.op(node, [value, *limits], value.layout, value.dims)


@rule("FakeQuantWithMinMaxVarsGradient")
def _fake_quantized_gradient(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """The gradients of the limits are sums over all elements."""
    inputs = [emitter.whole(v) if v.is_partial else v for v in inputs]
    if any(v.dims is None or v.has_rows for v in inputs[2:]):
        return None
    aligned = align(emitter, inputs[:2])
    if aligned is None or inputs[0].rank != inputs[1].rank:
        return None
    laid, layout = aligned
    of_limits = PARTIAL if layout.kind == "rows" else REPLICATED
    dims: Any = (inputs[1].dims, [], [])
    return emitter.op(node, [*laid, *inputs[2:]], [layout, of_limits, of_limits], dims)
