"""Operations that depend on the order along a dimension."""

from distfit.partition.emission import Emitter
from distfit.partition.layouts import REPLICATED, Dim, unknown
from distfit.partition.registry import rule
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value


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
    """Ordering rows needs all of them; if `k` is their number, the result has rows."""
    if value.rank > 1:
        emitter.report(node)
    given = [emitter.whole(value), emitter.whole(k)]
    found = emitter.op(node, given, REPLICATED, (dims, list(dims)))
    if not emitter.sizes.same(dims[-1], value.layout.size):
        return found
    return [emitter.cut(v, value.layout) for v in found]
