"""Operations on the last dimensions: each replica computes those of its own rows.

Decompositions, solutions, diagonals, Fourier transforms. Rows in the dimensions that an
operation works on fall back.
"""

from collections.abc import Sequence

from distfit.partition.emission import Emitter, Value, rule
from distfit.partition.layouts import PARTIAL, REPLICATED, Dim, Layout, unknown
from distfit.partition.rules.elementwise import align
from distfit.partition.rules.sizes import elements_of
from distfit.partition.tracing import Node

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
    **dict.fromkeys(("MatrixBandPart", "MatrixDiagPart", "MatrixDiagPartV2"), (1, 2)),
    **dict.fromkeys(("MatrixDiagPartV3",), (1, 2)),
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
    """The last dimension of the diagonals, or their last two where there are many."""
    rank, result = inputs[0].dims, node.outputs[0].shape.rank
    if rank is None or result is None:
        return None
    return batched(emitter, node, inputs, 1, len(rank) - (result - 2))


@rule("MatrixSetDiag", "MatrixSetDiagV2", "MatrixSetDiagV3")
def _set_diag(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, diagonal, *others = (emitter.whole(v) if v.is_partial else v for v in inputs)
    if value.dims is None or diagonal.dims is None:
        return None
    lead = next((v.layout for v in (value, diagonal) if v.has_rows), None)
    given = [emitter.whole(v) for v in others]
    if lead is None:
        return emitter.op(node, [value, diagonal, *given], REPLICATED, value.dims)
    laid = laid_by(emitter, [value, diagonal], lead)
    if laid is None or lead.dim >= value.rank - 2:
        return None
    return emitter.op(node, [*laid, *given], lead, value.dims)


def laid_by(
    emitter: Emitter, values: Sequence[Value], layout: Layout
) -> list[Value] | None:
    """Values whose dimensions are counted from the first, by the same rows."""
    laid = []
    for value in values:
        if value.layout != layout:
            if value.dims is None or value.rank <= layout.dim:
                return None
            if not emitter.sizes.same(value.dims[layout.dim], layout.size):
                return None
        laid.append(emitter.to(value, layout))
    return laid


# --- Counts: those of all rows are the sum of those of each replica.


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
