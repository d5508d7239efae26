"""Matrix products: by rows if the rows of a factor stay in the result, a partial sum if
they are contracted."""

import string
from collections.abc import Sequence

from distfit.partition.emission import Emitter
from distfit.partition.layouts import PARTIAL, REPLICATED, Dim, Layout
from distfit.partition.registry import rule
from distfit.partition.tracing import Node
from distfit.partition.values import Value


def contraction(
    emitter: Emitter,
    node: Node,
    inputs: Sequence[Value],
    terms: Sequence[str],
    output: str,
) -> list[Value] | None:
    """A product of tensors, as an equation of labels, e.g. `["ab", "bc"]` to `"ac"`.

    Args:
        emitter, node: The emitter and the node.
        inputs: The factors, of known rank.
        terms: A label for each dimension of each factor; `"."` for a dimension that is
            broadcast and therefore has size 1.
        output: The labels of the result.

    Returns:
        The values of the result; None where matching rows cannot be proven.
    """
    # Even a single partial factor is summed: a part of 0 times infinity would be NaN.
    values = [emitter.whole(v) if v.is_partial else v for v in inputs]
    found = _by_rows(emitter, values, terms, output)
    if found is None:
        return None
    laid, layout = found
    dims: list[Dim] = []
    for label in output:
        sizes = [
            v.dims[t.index(label)]
            for t, v in zip(terms, inputs, strict=True)
            if label in t
        ]
        dims.append(emitter.sizes.broadcast([[s] for s in sizes])[0])
    if layout.kind == "rows":
        dims[layout.dim] = layout.size
    return emitter.op(node, laid, layout, dims)


def _by_rows(
    emitter: Emitter, values: list[Value], terms: Sequence[str], output: str
) -> tuple[list[Value], Layout] | None:
    pairs = zip(terms, values, strict=True)
    cut = [(t[v.layout.dim], v) for t, v in pairs if v.has_rows]
    if not cut:
        return values, REPLICATED
    # Prefer rows that stay in the result, which need no exchange, to contracted ones.
    # Values that are known in full can be cut in another way at no cost.
    label, lead = min(
        cut,
        key=lambda c: (c[0] not in output, output.find(c[0]), c[1].whole is not None),
    )
    layout = lead.layout
    laid = []
    for term, value in zip(terms, values, strict=True):
        if label not in term:
            laid.append(emitter.whole(value))
            continue
        own = layout.moved(term.index(label))
        if value.layout == own:
            laid.append(value)
            continue
        if not emitter.sizes.same(value.dims[own.dim], layout.size):
            return None
        laid.append(emitter.cut(emitter.whole(value), own))
    if label in output:
        return laid, layout.moved(output.index(label))
    return laid, PARTIAL


@rule("MatMul")
def _matmul(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    if any(v.dims is None for v in inputs):
        return None
    a = "ba" if node.attr("transpose_a") else "ab"
    b = "cb" if node.attr("transpose_b") else "bc"
    return contraction(emitter, node, inputs, [a, b], "ac")


@rule("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
def _batch_matmul(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    if any(v.dims is None for v in inputs):
        return None
    a = "ba" if node.attr("adj_x") else "ab"
    b = "cb" if node.attr("adj_y") else "bc"
    terms, output = _spelled(emitter, inputs, ["..." + a, "..." + b], "...ac")
    return contraction(emitter, node, inputs, terms, output)


@rule("Einsum")
def _einsum(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    if any(v.dims is None for v in inputs):
        return None
    left, _, output = node.attr("equation").replace(" ", "").partition("->")
    terms, output = _spelled(emitter, inputs, left.split(","), output)
    rows = {t[v.layout.dim] for t, v in zip(terms, inputs, strict=True) if v.has_rows}
    if any(t.count(label) > 1 for t in [*terms, output] for label in rows):
        return None  # Rows along a diagonal.
    return contraction(emitter, node, inputs, terms, output)


def _spelled(
    emitter: Emitter, inputs: Sequence[Value], terms: Sequence[str], output: str
) -> tuple[list[str], str]:
    """An equation with labels in place of its ellipsis, whose dimensions broadcast."""
    used = "".join(terms)
    free = [c for c in string.ascii_letters if c not in used]
    lengths = [
        v.rank - len(t.replace("...", "")) if "..." in t else 0
        for t, v in zip(terms, inputs, strict=True)
    ]
    labels = "".join(free[: max(lengths)])
    larger = {
        label
        for term, length, value in zip(terms, lengths, inputs, strict=True)
        for label, dim in _under_ellipsis(term, length, value, labels)
        if not emitter.sizes.is_one(dim)
    }
    spelled = []
    for term, length, value in zip(terms, lengths, inputs, strict=True):
        own = "".join(
            "." if label in larger and emitter.sizes.is_one(dim) else label
            for label, dim in _under_ellipsis(term, length, value, labels)
        )
        spelled.append(term.replace("...", own))
    return spelled, output.replace("...", labels)


def _under_ellipsis(
    term: str, length: int, value: Value, labels: str
) -> list[tuple[str, Dim]]:
    """The labels and sizes of the dimensions that an ellipsis stands for."""
    at = term.find("...")
    dims = (value.dims or [])[at : at + length]
    return list(zip(labels[len(labels) - length :], dims, strict=True))
