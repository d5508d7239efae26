"""Operations on the last dimensions: each replica computes those of its own rows.

Decompositions, solvers, diagonals, Fourier transforms. If the rows are in the
dimensions that an operation works on, most are computed in full.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import PARTIAL, REPLICATED, Dim, Layout, by_rows, unknown
from distfit.partition.registry import cut_rule, rule
from distfit.partition.rules.elementwise import align
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value

# For each type, how many of its first inputs are tensors, whose last `core` dimensions
# it works on; further inputs are parameters, the same for all rows.
_TENSORS_AND_CORE = {
    **dict.fromkeys(("Cholesky", "MatrixInverse", "MatrixDeterminant"), (1, 2)),
    **dict.fromkeys(("LogMatrixDeterminant", "MatrixExponential"), (1, 2)),
    **dict.fromkeys(("MatrixLogarithm", "MatrixSquareRoot", "Lu"), (1, 2)),
    **dict.fromkeys(("SelfAdjointEigV2", "Eig", "Qr", "Svd"), (1, 2)),
    **dict.fromkeys(("CholeskyGrad", "MatrixSolve", "MatrixTriangularSolve"), (2, 2)),
    **dict.fromkeys(("MatrixSolveLs", "BandedTriangularSolve"), (2, 2)),
    **dict.fromkeys(("TridiagonalSolve",), (2, 2)),
    **dict.fromkeys(("FFT", "IFFT", "RFFT", "IRFFT", "MatrixDiag"), (1, 1)),
    **dict.fromkeys(("FFT2D", "IFFT2D", "RFFT2D", "IRFFT2D"), (1, 2)),
    **dict.fromkeys(("FFT3D", "IFFT3D", "RFFT3D", "IRFFT3D"), (1, 3)),
    **dict.fromkeys(("NthElement",), (1, 1)),
    **dict.fromkeys(("Cross",), (2, 1)),
    **dict.fromkeys(("LowerBound", "UpperBound"), (2, 1)),
}
# The shape of the only result is that of the first tensor.
_SAME_SHAPE = {
    *("Cholesky", "CholeskyGrad", "MatrixInverse", "MatrixExponential", "Cross"),
    *("MatrixLogarithm", "MatrixSquareRoot", "MatrixBandPart"),
    *("FFT", "IFFT", "FFT2D", "IFFT2D", "FFT3D", "IFFT3D"),
}
_SAME_SHAPE_AS_SECOND = {"LowerBound", "UpperBound"}


@rule(*_TENSORS_AND_CORE)
def _batched(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    count, core = _TENSORS_AND_CORE[node.type]
    return batched(emitter, node, inputs, count, core)


def batched(
    emitter: Emitter, node: Node, inputs: list[Value], count: int, core: int
) -> list[Value] | None:
    """An operation on the last `core` dimensions of its first `count` inputs."""
    inputs = [emitter.whole(v) if v.is_partial else v for v in inputs]
    tensors, others = inputs[:count], inputs[count:]
    if any(v.dims is None or v.rank < core for v in tensors):
        return None
    aligned = align(emitter, tensors)
    if aligned is None:
        return None
    laid, layout = aligned
    rank = max(v.rank for v in tensors)
    if layout.kind == "rows" and layout.dim >= rank - core:
        return None
    lead = next(v for v in tensors if v.rank == rank)
    dims = []
    for traced in node.outputs:
        shape = _result(node, traced, tensors, lead, rank - core)
        if shape is None:
            return None
        dims.append(shape)
    given = [*laid, *(emitter.whole(v) for v in others)]
    return emitter.op(node, given, layout, tuple(dims))


def _result(
    node: Node, traced, tensors: Sequence[Value], lead: Value, batch: int
) -> list[Dim] | None:
    if node.type in _SAME_SHAPE:
        return list(tensors[0].dims or ())
    if node.type in _SAME_SHAPE_AS_SECOND:
        return list(tensors[1].dims or ())
    if traced.shape.rank is None or traced.shape.rank < batch:
        return None
    core: list[Dim] = [unknown() if d is None else d for d in traced.shape[batch:]]
    return [*(lead.dims or [])[:batch], *core]


@rule("MatrixDiagV2", "MatrixDiagV3")
def _diag(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """Works on the last dimension, or on the last two for several diagonals."""
    value, *others = (emitter.whole(v) if v.is_partial else v for v in inputs)
    result = node.outputs[0].shape.rank
    if value.dims is None or result is None:
        return None
    core = value.rank - (result - 2)
    if core != 1:
        return batched(emitter, node, [value, *others], 1, core)
    size = value.dims[-1]
    is_square = ints(others[0]) == [0] and _are_size(emitter, others[1:3], size)
    if value.has_rows and value.layout.dim == value.rank - 1:
        return [_diag_of_rows(emitter, value, others[3])] if is_square else None
    if value.is_replicated and is_square:
        given = [value, *map(emitter.whole, others)]
        return emitter.op(node, given, REPLICATED, [*value.dims, size])
    return batched(emitter, node, [value, *others], 1, core)


@cut_rule("MatrixDiagV2", "MatrixDiagV3")
def _rows_of_diag(emitter: Emitter, value: Value, layout: Layout) -> Value | None:
    """Rows of square matrices whose diagonals are replicated."""
    node: Any = value.node
    diagonal, where, *_, padding = (emitter.values[edge] for edge in node.inputs)
    if not diagonal.is_replicated or diagonal.dims is None:
        return None
    size = diagonal.dims[-1]
    if ints(where) != [0] or list(value.dims or ())[diagonal.rank - 1 :] != [size] * 2:
        return None
    if layout.dim != value.rank - 2:
        return None
    return _diag_of_rows(emitter, emitter.cut(diagonal, layout), padding)


def _diag_of_rows(emitter: Emitter, diagonal: Value, padding: Value) -> Value:
    """Square matrices, split by the same rows as their diagonals."""
    size, layout = diagonal.dims[-1], diagonal.layout
    number = emitter.known(size, tf.int32)
    every = emitter.call(tf.range, [number], REPLICATED, [size])

    def diag(tensor, own, padding, total):
        on = own[:, tf.newaxis] == tf.range(total)
        return tf.where(on, tensor[..., tf.newaxis], padding)

    own = emitter.cut(every, layout.moved(0))
    given = [diagonal, own, emitter.whole(padding), number]
    return emitter.call(diag, given, layout, [*diagonal.dims, size])


def _are_size(emitter: Emitter, values: Sequence[Value], size: Dim) -> bool:
    numbers = [(elements_of(v) or [None])[0] for v in values]
    return all(
        n == -1 or n is not None and emitter.sizes.same(n, size) for n in numbers
    )


def _is_last(value: Value) -> bool:
    """Whether the last dimension is the rows, in a single block."""
    return value.has_rows and value.layout == by_rows(value.rank - 1)


def _diagonal(tensor, total, start):
    """A mask of the diagonal in a replica's rows of a square matrix: [rows, total]."""
    own = start + tf.range(tf.shape(tensor)[-1])
    return own[:, tf.newaxis] == tf.range(total)


@rule("MatrixDiagPart", "MatrixDiagPartV2", "MatrixDiagPartV3")
def _diag_part(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, *others = (emitter.whole(v) if v.is_partial else v for v in inputs)
    matrix = _square_of_rows(emitter, value)
    if matrix is None:
        return batched(emitter, node, inputs, 1, 2)
    if others and ints(others[0]) != [0]:
        return None

    def part(tensor, total, start):
        on = _diagonal(tensor[..., 0], total, start)
        kept = tf.where(on, tensor, tf.zeros((), tensor.dtype))
        if tensor.dtype == tf.bool:
            return tf.reduce_any(kept, -1)
        return tf.reduce_sum(kept, -1)

    given = [matrix, emitter.known(value.dims[-1], tf.int32), emitter.start()]
    layout = matrix.layout.moved(value.rank - 2)
    return [emitter.call(part, given, layout, value.dims[:-1])]


def _square_of_rows(emitter: Emitter, value: Value) -> Value | None:
    """Square matrices of pairs of rows, split by the first of the two; else None."""
    if value.dims is None or value.rank < 2 or not value.has_rows:
        return None
    if not emitter.sizes.same(value.dims[-1], value.dims[-2]):
        return None
    layout = by_rows(value.rank - 2)
    if value.layout == layout:
        return value
    if value.layout != by_rows(value.rank - 1):
        return None
    return emitter.call(tf.linalg.matrix_transpose, [value], layout, value.dims)


@rule("MatrixSetDiag", "MatrixSetDiagV2", "MatrixSetDiagV3")
def _set_diag(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, diagonal, *others = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if value.dims is None or diagonal.dims is None:
        return None
    given = [emitter.whole(v) for v in others]
    if not value.has_rows and not diagonal.has_rows:
        return emitter.op(node, [value, diagonal, *given], REPLICATED, value.dims)
    if value.layout == by_rows(value.rank - 2) or _is_last(diagonal):
        return _set_diag_of_rows(emitter, value, diagonal, others)
    lead = value.layout if value.has_rows else diagonal.layout
    laid = laid_by(emitter, [value, diagonal], lead)
    if laid is None or lead.dim >= value.rank - 2:
        return None
    return emitter.op(node, [*laid, *given], lead, value.dims)


def _set_diag_of_rows(emitter, value, diagonal, others) -> list[Value] | None:
    layout, dims = by_rows(value.rank - 2), value.dims
    is_main = not others or ints(others[0]) == [0]
    if not is_main or not emitter.sizes.same(dims[-1], dims[-2]):
        return None
    laid = laid_by(emitter, [value, diagonal], layout)
    if laid is None or diagonal.rank != value.rank - 1:
        return None

    def with_diagonal(tensor, part, total, start):
        on = _diagonal(part, total, start)
        return tf.where(on, part[..., tf.newaxis], tensor)

    given = [*laid, emitter.known(dims[-1], tf.int32), emitter.start()]
    return [emitter.call(with_diagonal, given, layout, dims)]


@rule("MatrixBandPart")
def _band_part(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, *limits = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if value.dims is None or any(v.has_rows for v in limits):
        return None
    if not value.has_rows or value.layout.dim < value.rank - 2:
        return batched(emitter, node, inputs, 1, 2)
    at = value.layout.dim
    if value.layout != by_rows(at):
        return None

    def band(tensor, lower, upper, start):
        lower, upper = tf.cast(lower, tf.int32), tf.cast(upper, tf.int32)
        shape = tf.shape(tensor)
        i, j = tf.range(shape[-2])[:, tf.newaxis], tf.range(shape[-1])
        below = i - j + (start if at == value.rank - 2 else -start)
        kept = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
        return tf.where(kept, tensor, tf.zeros((), tensor.dtype))

    given = [value, *limits, emitter.start()]
    return [emitter.call(band, given, value.layout, value.dims)]


def laid_by(
    emitter: Emitter, values: Sequence[Value], layout: Layout
) -> list[Value] | None:
    """Values split by the same rows, in the same dimension counted from the first."""
    laid = []
    for value in values:
        if value.layout != layout:
            if value.dims is None or value.rank <= layout.dim:
                return None
            if not emitter.sizes.same(value.dims[layout.dim], layout.size):
                return None
        laid.append(emitter.to(value, layout))
    return laid


# --- Counts: those of a replica's own rows are a partial sum.


@rule("DenseBincount")
def _dense_bincount(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value, size, weights = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if value.dims is None or weights.dims is None:
        return None
    if not value.has_rows and not weights.has_rows:
        return emitter.op(node, [value, emitter.whole(size), weights])
    lead = value.layout if value.has_rows else weights.layout
    has_weights = weights.dims != [0]
    laid = laid_by(emitter, [value, weights] if has_weights else [value], lead)
    of_each = value.rank == 2
    if laid is None or (lead.dim != 0 and of_each):
        return None
    if node.attr("binary_output") and not of_each:
        return None
    given = [laid[0], emitter.whole(size), laid[1] if has_weights else weights]
    count = (elements_of(size) or [None])[0]
    bins = unknown() if count is None else count
    if of_each:
        return emitter.op(node, given, lead, [lead.size, bins])
    return emitter.op(node, given, PARTIAL, [bins])


@rule("Bincount")
def _bincount(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, size, weights = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if value.dims is None or weights.dims is None:
        return None
    has_weights = weights.dims != [0]
    both = [value, weights] if has_weights else [value]
    lead = next((v.layout for v in both if v.has_rows), None)
    if lead is None:
        return emitter.op(node, [value, emitter.whole(size), weights])
    laid = laid_by(emitter, both, lead)
    if laid is None:
        return None
    given = [laid[0], emitter.whole(size), laid[1] if has_weights else weights]
    count = (elements_of(size) or [None])[0]
    return emitter.op(node, given, PARTIAL, [unknown() if count is None else count])


@rule("HistogramFixedWidth")
def _histogram(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, *others = inputs
    value = emitter.whole(value) if value.is_partial else value
    layout = PARTIAL if value.has_rows else REPLICATED
    return emitter.op(node, [value, *(emitter.whole(v) for v in others)], layout)
