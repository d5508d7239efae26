"""Products of matrices: by rows where a factor has rows that stay, and a sum over
replicas where rows are contracted."""

from collections.abc import Sequence

from distfit.partition.emission import Emitter, Value, rule
from distfit.partition.layouts import PARTIAL, REPLICATED, Dim, Layout
from distfit.partition.tracing import Node


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
        The values of the result; None where rows cannot be proven to meet rows.
    """
    partial = [v for v in inputs if v.is_partial]
    if len(partial) == 1 and not any(v.has_rows for v in inputs):
        laid, layout = list(inputs), PARTIAL
    else:
        values = [emitter.whole(v) if v.is_partial else v for v in inputs]
        found = _by_rows(emitter, values, terms, output)
        if found is None:
            return None
        laid, layout = found
    dims: list[Dim] = []
    for label in output:
        sizes = [
            v.dims[t.index(label)]  # type: ignore[index]
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
    cut = [
        (t[v.layout.dim], v.layout)
        for t, v in zip(terms, values, strict=True)
        if v.has_rows
    ]
    if not cut:
        return values, REPLICATED
    # Rows that the result has cost nothing; else the first that are contracted.
    label, layout = next(((c, lies) for c, lies in cut if c in output), cut[0])
    laid = []
    for term, value in zip(terms, values, strict=True):
        if label not in term:
            laid.append(emitter.whole(value))
            continue
        own = layout.moved(term.index(label))
        if value.layout == own:
            laid.append(value)
            continue
        if not emitter.sizes.same(value.dims[own.dim], layout.size):  # type: ignore[index]
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
    x, y = inputs
    if x.dims is None or y.dims is None:
        return None
    rank = max(x.rank, y.rank)
    batch = "defghijklmnopq"[: rank - 2]
    a = "ba" if node.attr("adj_x") else "ab"
    b = "cb" if node.attr("adj_y") else "bc"
    terms = []
    for value, last in ((x, a), (y, b)):
        own = list(batch[len(batch) - (value.rank - 2) :])
        for i, label in enumerate(own):
            if emitter.sizes.is_one(value.dims[i]):  # type: ignore[index]
                own[i] = "."
                continue
            others = [
                v.dims[v.rank - 2 - (len(own) - i)]  # type: ignore[index]
                for v in inputs
                if v.rank - 2 >= len(own) - i
            ]
            if not all(
                emitter.sizes.same(d, value.dims[i])  # type: ignore[index]
                or emitter.sizes.is_one(d)
                for d in others
            ):
                return None
            del label
        terms.append("".join(own) + last)
    output = "".join(
        label if any(label in t for t in terms) else "." for label in batch
    )
    if "." in output:  # A batch dimension of size 1 on both sides.
        return _with_ones(emitter, node, inputs, terms, batch, output)
    return contraction(emitter, node, inputs, terms, batch + "ac")


def _with_ones(emitter, node, inputs, terms, batch: str, output: str):
    """As `contraction`, for batch dimensions that are 1 on both sides."""
    named = []
    for term, value in zip(terms, inputs, strict=True):
        own = list(term)
        offset = len(batch) - (value.rank - 2)
        for i in range(value.rank - 2):
            if output[offset + i] == ".":
                own[i] = batch[offset + i]
        named.append("".join(own))
    return contraction(emitter, node, inputs, named, batch + "ac")


@rule("Einsum")
def _einsum(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    equation = node.attr("equation").replace(" ", "")
    left, _, output = equation.partition("->")
    terms = left.split(",")
    if any(v.dims is None for v in inputs):
        return None
    if "..." in equation:
        spelled = _without_ellipsis(emitter, inputs, terms, output)
        if spelled is None:
            return None
        terms, output = spelled
    if any(len(set(t)) < len(t) for t in [*terms, output]):
        return None  # A diagonal.
    return contraction(emitter, node, inputs, terms, output)


def _without_ellipsis(emitter, inputs, terms, output):
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in "".join(terms)]
    lengths = [
        v.rank - len(t.replace("...", "")) if "..." in t else 0
        for t, v in zip(terms, inputs, strict=True)
    ]
    labels = "".join(free[: max(lengths)])
    spelled = []
    for term, length, value in zip(terms, lengths, inputs, strict=True):
        own = labels[len(labels) - length :]
        spelled.append(term.replace("...", own))
        at = term.find("...")
        for i in range(length):
            if emitter.sizes.is_one(value.dims[at + i]):
                return None
    return spelled, output.replace("...", labels)
