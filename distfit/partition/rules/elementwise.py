"""Operations on elements: each replica computes its own rows.

A partial sum passes through linear operations; before any other it is all-reduced.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import PARTIAL, REPLICATED, ROWS, Layout, by_rows
from distfit.partition.registry import VIEWS, cut_rule, rule
from distfit.partition.rules import lists
from distfit.partition.tracing import Node
from distfit.partition.values import Value, measured

_UNARY = (
    *("Abs", "Acos", "Acosh", "Angle", "Asin", "Asinh", "Atan", "Atanh"),
    *("BesselI0", "BesselI0e", "BesselI1", "BesselI1e", "Bitcast", "Cast", "Ceil"),
    *("BesselJ0", "BesselJ1", "BesselK0", "BesselK0e", "BesselK1", "BesselK1e"),
    *("BesselY0", "BesselY1", "Dawsn", "Expint", "FresnelCos", "FresnelSin"),
    *("CheckNumerics", "ComplexAbs", "Conj", "Cos", "Cosh", "Digamma", "Elu", "Erf"),
    *("Erfc", "Erfinv", "Exp", "Expm1", "Floor", "Identity", "Imag", "Inv", "Invert"),
    *("IsFinite", "IsInf", "IsNan", "LeakyRelu", "Lgamma", "Log", "Log1p", "Ndtri"),
    *("LogicalNot", "Neg", "OnesLike", "PopulationCount", "PreventGradient", "Real"),
    *("Reciprocal", "Relu", "Relu6", "Rint", "Round", "Rsqrt", "Selu", "Sigmoid"),
    *("Sign", "Sin", "Sinh", "Snapshot", "Softplus", "Softsign", "Spence", "Sqrt"),
    *("Square", "StopGradient", "Tan", "Tanh", "ZerosLike"),
    *("AsString", "StringLower", "StringUpper", "StringStrip", "StringLength"),
    *("StringToHashBucketFast", "StringToHashBucketStrong", "StringToHashBucket"),
    *("StringToNumber", "RegexFullMatch", "StaticRegexReplace", "StaticRegexFullMatch"),
    *("DecodeBase64", "EncodeBase64", "Bucketize", "FakeQuantWithMinMaxArgs"),
)
_NARY = (
    *("Add", "AddN", "AddV2", "Atan2", "BitwiseAnd", "BitwiseOr", "BitwiseXor"),
    *("Betainc", "ClipByValue", "Complex", "Div", "DivNoNan", "EluGrad", "Equal"),
    *("FloorDiv", "FloorMod", "Greater", "GreaterEqual", "Igamma", "IgammaGradA"),
    *("Igammac", "InvGrad", "LeakyReluGrad", "LeftShift", "Less", "LessEqual"),
    *("LogicalAnd", "LogicalOr", "Maximum", "Minimum", "Mod", "Mul", "MulNoNan"),
    *("NextAfter", "NotEqual", "Polygamma", "Pow", "RealDiv", "ReciprocalGrad"),
    *("Relu6Grad", "ReluGrad", "RightShift", "RsqrtGrad", "SelectV2", "SeluGrad"),
    *("SigmoidGrad", "SoftplusGrad", "SoftsignGrad", "SqrtGrad", "SquaredDifference"),
    *("Sub", "TanhGrad", "TruncateDiv", "TruncateMod", "Xdivy", "Xlog1py", "Xlogy"),
    *("Zeta", "AccumulateNV2", "ApproximateEqual", "RandomGammaGrad"),
    "FakeQuantWithMinMaxArgsGradient",
)
# Linear in their only tensor.
_LINEAR = {
    *("Identity", "StopGradient", "PreventGradient", "Snapshot", "Neg", "Conj"),
    *("Real", "Imag"),
}
# Jointly linear in all their tensors.
_ADDITIVE = {"Add", "AddV2", "Sub", "AddN", "AccumulateNV2", "Complex"}
_SHAPE_ONLY = {"ZerosLike", "OnesLike"}
# Return the numbers of their first input, except for the sign.
_SAME_NUMBERS = VIEWS | {"Neg", "BroadcastTo", "Tile"}


@rule(*_UNARY)
def _unary(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    (value,) = inputs
    if value.dtype in (tf.resource, tf.variant) and node.type == "Identity":
        return [value]
    if value.dtype == tf.variant:
        return lists.same_list(emitter, node, inputs)
    if value.dims is None:
        return None
    dims = value.dims
    if node.type == "Bitcast" and value.dtype.size != node.outputs[0].dtype.size:
        return None
    if value.is_partial:
        if node.type in _SHAPE_ONLY:
            return emitter.op(node, [value], REPLICATED, dims)
        if not _is_linear(node, value):
            value = emitter.whole(value)
    return emitter.op(node, [value], value.layout, dims)


def _is_linear(node: Node, value: Value) -> bool:
    if node.type == "Cast":
        # Parts may overflow a smaller dtype where their sum does not.
        to = node.outputs[0].dtype
        is_wider = to.size > value.dtype.size
        return is_wider and _is_inexact(value.dtype) and _is_inexact(to)
    return node.type in _LINEAR


def _is_inexact(dtype: tf.DType) -> bool:
    return dtype.is_floating or dtype.is_complex


@rule(*_NARY)
def _nary(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    if inputs[0].dtype == tf.variant:
        return lists.same_list(emitter, node, inputs)
    if any(v.dims is None for v in inputs):
        return None
    dims = emitter.sizes.broadcast([v.dims or [] for v in inputs])
    if any(v.is_partial for v in inputs):
        inputs = _exchanged_early(emitter, inputs)
    if any(v.is_partial for v in inputs):
        linear = _linear_inputs(emitter, node, inputs)
        if linear is not None:
            return emitter.op(node, linear, PARTIAL, dims)
        inputs = [emitter.whole(v) if v.is_partial else v for v in inputs]
    aligned = align(emitter, inputs)
    if aligned is None:
        return None
    return emitter.op(node, aligned[0], aligned[1], dims)


@cut_rule(*(set(_UNARY) | set(_NARY)) - {"Bitcast"})
def _of_repeated(emitter: Emitter, value: Value, layout: Layout) -> Value | None:
    """Elementwise results of repeated tensors, such as the gradient of a mean."""
    node: Any = value.node
    laid = []
    for edge in node.inputs:
        given: Any = emitter.values[edge]
        if not given.is_replicated or given.dims is None:
            return None
        at = layout.dim - value.rank + given.rank
        if at >= 0 and not emitter.sizes.is_one(given.dims[at]):
            given = emitter.cut_before(given, layout.moved(at))
        if given is None:
            return None
        laid.append(given)
    if not any(given.has_rows for given in laid):
        return None
    return emitter.op(node, laid, layout, value.dims)[0]


def _exchanged_early(emitter: Emitter, inputs: list[Value]) -> list[Value]:
    """Sums partial inputs if another input is available only after an exchange.

    A sum can travel with that exchange; keeping it partial would take another one
    later. The state of a metric, which is never exchanged, stays partial.
    """
    latest = max([v.level for v in inputs if not v.is_partial], default=0)
    return [
        emitter.whole(v)
        if v.is_partial and v.level < latest and not _is_state(v)
        else v
        for v in inputs
    ]


def _is_state(value: Value) -> bool:
    return value.node is not None and value.node.type == "ReadVariableOp"


def _linear_inputs(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """The inputs of an operation whose result stays a partial sum; else None."""
    if any(v.has_rows for v in inputs):
        return None
    partial = [v.is_partial for v in inputs]
    if node.type in _ADDITIVE:
        # A scalar, such as a loss with its penalties, often needs no exchange. A larger
        # tensor does: it is summed alone, and what is added to it stays replicated.
        stays = all(partial) or any(map(_is_state, inputs))
        if stays or all(v.rank == 0 for v in inputs if v.is_partial):
            return [emitter.as_partial(v) for v in inputs]
        return None
    if node.type == "Mul" and sum(partial) == 1:
        # A part of 0 times infinity is NaN, where the sum times infinity may not be.
        others = (v for v in inputs if not v.is_partial)
        return inputs if all(_is_finite(emitter, v) for v in others) else None
    floating = _is_inexact(node.outputs[0].dtype)
    if node.type in ("RealDiv", "Div", "DivNoNan") and partial == [True, False]:
        # A part of 0 over 0 is NaN, where the sum over 0 is infinite.
        is_safe = node.type == "DivNoNan" or _is_never_zero(emitter, inputs[1])
        return inputs if floating and is_safe else None
    if node.type == "SelectV2" and not partial[0]:
        return [inputs[0], *(emitter.as_partial(v) for v in inputs[1:])]
    return None


def _is_finite(emitter: Emitter, value: Value) -> bool:
    """Whether a value is known to be finite: a constant, or computed from sizes."""
    if not _is_inexact(value.dtype):
        return True
    node = value.node
    if node is None:
        return False
    if node.type == "Const":
        return bool(np.all(np.isfinite(_numbers(node))))
    given = [emitter.values[edge] for edge in node.inputs]
    if node.type == "Cast":
        fits = value.dtype.size >= min(given[0].dtype.size, tf.float32.size)
        return fits and _is_finite(emitter, given[0])
    if node.type in ("RealDiv", "Div"):
        return _is_finite(emitter, given[0]) and _is_never_zero(emitter, given[1])
    if node.type == "Fill":
        return _is_finite(emitter, given[1])
    return node.type in _SAME_NUMBERS and _is_finite(emitter, given[0])


def _is_never_zero(emitter: Emitter, value: Value) -> bool:
    """Whether a value is known not to be zero: a constant, or a number of rows."""
    if value.sizes is not None:
        sizes = list(value.sizes.flat)
        return not {0, None}.intersection(sizes) and not any(measured(sizes))
    node = value.node
    if node is None:
        return False
    if node.type == "Const":
        return bool(np.all(_numbers(node) != 0))
    given = [emitter.values[edge] for edge in node.inputs]
    if node.type == "Cast" and not _is_inexact(value.dtype):
        return False  # It may round to zero.
    return node.type in ("Cast", "Identity", "Sqrt") and _is_never_zero(
        emitter, given[0]
    )


def _numbers(node: Node) -> np.ndarray:
    """The elements of a constant."""
    return tf.make_ndarray(node.attr("value"))


def align(
    emitter: Emitter, inputs: Sequence[Value]
) -> tuple[list[Value], Layout] | None:
    """Gives values that broadcast together matching layouts.

    Args:
        emitter: The emitter.
        inputs: Values that are replicated or split by rows, of known ranks.

    Returns:
        The values, some cut or replicated, and the layout of an elementwise result.
        None where matching rows cannot be proven.
    """
    cut = [v for v in inputs if v.has_rows]
    rank = max(v.rank for v in inputs)
    if not cut:
        return list(inputs), REPLICATED
    # With rows in two dimensions, as in x[:, None] - x[None], the first stays split. If
    # several values have them there, the largest that is not known in full is kept.
    lead = min(
        cut,
        key=lambda v: (v.layout.dim - v.rank, v.whole is not None, v.dims.count(1)),
    )
    layout = lead.layout.moved(lead.layout.dim - lead.rank + rank)
    result = []
    for value in inputs:
        dim = layout.dim - rank + value.rank
        if value.has_rows and value.layout == layout.moved(dim):
            result.append(value)
            continue
        size: Any = None if dim < 0 else value.dims[dim]
        # A batch of one row is cut like any other: not all operations broadcast.
        if size is not None and emitter.sizes.same(size, layout.size):
            result.append(emitter.cut(emitter.whole(value), layout.moved(dim)))
        elif size is None or emitter.sizes.is_one(size):
            result.append(emitter.whole(value))
        else:
            return None
    return result, layout


def alike(emitter: Emitter, values: Sequence[Value], layout: Layout) -> Any:
    """Gives values the same layout by rows; none is broadcast along that dimension.

    Returns:
        The values; None where they cannot be proven to have these rows.
    """
    laid = []
    for value in values:
        if value.layout == layout:
            laid.append(value)
        elif emitter.sizes.same(value.dims[layout.dim], layout.size):
            laid.append(emitter.cut(emitter.whole(value), layout))
        else:
            return None
    return laid


@rule("Select")
def _select(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """`tf.compat.v1.where`: a condition of one element, or one for each row."""
    condition, x, y = inputs
    if condition.dims is None or x.dims is None or y.dims is None:
        return None
    if condition.rank in (0, x.rank):
        return _nary(emitter, node, inputs)
    laid = [emitter.whole(v) if v.is_partial else v for v in inputs]
    if not any(v.has_rows for v in laid):
        return emitter.op(node, laid, REPLICATED, x.dims)
    lead = next(v.layout for v in laid if v.has_rows)
    aligned = alike(emitter, laid, lead) if lead.dim == 0 else None
    return aligned and emitter.op(node, aligned, lead, x.dims)


@rule("BiasAdd")
def _bias_add(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    x, bias = inputs
    if x.dims is None:
        return None
    if not x.has_rows and not bias.has_rows and (x.is_partial or bias.is_partial):
        laid = [emitter.as_partial(v) for v in inputs]
        return emitter.op(node, laid, PARTIAL, x.dims)
    x, bias = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if x.has_rows and x.layout.dim == channels_of(node, x):
        return None
    return emitter.op(node, [x, emitter.whole(bias)], x.layout, x.dims)


def channels_of(node: Node, value: Value) -> int:
    """The dimension of the channels of a value."""
    return 1 if node.attr("data_format") == "NCHW" else value.rank - 1


@rule("IdentityN")
def _identity_n(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    return list(inputs)


@rule("SoftmaxCrossEntropyWithLogits", "SparseSoftmaxCrossEntropyWithLogits")
def _cross_entropy(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    inputs = [emitter.whole(v) if v.is_partial else v for v in inputs]
    logits, labels = inputs
    if logits.dims is None or labels.dims is None:
        return None
    lead = min(
        (v for v in inputs if v.has_rows), key=lambda v: v.layout.dim, default=None
    )
    if lead is None:
        return emitter.op(node, inputs)
    layout, rows = lead.layout, lead.layout.size
    if layout.dim != 0:  # E.g. the transpose of a matrix of pairs of rows.
        layout, rows = by_rows(0), ROWS
    laid = []
    for value in inputs:
        if value.has_rows and value.layout != layout:
            value = emitter.whole(value)
        if not emitter.sizes.same(value.dims[0], rows):
            return None
        laid.append(emitter.to(value, layout))
    return emitter.op(node, laid, layout, ([rows], [rows, logits.dims[1]]))
