"""Stateless random draws: exactly those of one device.

A stateless draw is a function of its seed, so every replica could draw all and keep its
rows. Philox is counter-based: element `i` comes from the counter plus `i // group`, so
a replica starts at its first row and draws only its own. The full draw is kept as
`Value.whole`: another layout that is needed later costs no exchange, and TensorFlow
drops the full draw if it is unused.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    REPLICATED,
    ROWS,
    Dim,
    Layout,
    by_rows,
    product,
    quotient,
    unknown,
)
from distfit.partition.program import Port
from distfit.partition.registry import rule
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value

_PHILOX, _AUTO = 1, 3  # `tf.random.Algorithm`: kernels take Philox for auto_select.


_MOST_BLOCKS = 4


# For these, XLA advances the counter as kernels do.
_UNIFORM = {
    *("StatelessRandomUniformV2", "StatelessRandomUniformIntV2"),
    *("StatelessRandomUniformFullIntV2",),
}


@rule(*_UNIFORM, "StatelessRandomNormalV2", "StatelessTruncatedNormalV2")
def _draw(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    """A draw of `group` elements for each `steps` of the counter.

    CPU and GPU kernels draw like that. In XLA, a normal draw depends on the whole
    shape; there, and where the algorithm may not be Philox, the full draw is cut.
    """
    whole = _in_full(emitter, node, inputs, inputs[0])
    layout = rows_of(emitter, inputs[0], whole.dims)
    if layout is None:
        return [whole]
    counts = _counts(emitter, inputs[3]) and (
        node.type in _UNIFORM or not _is_compiled(emitter)
    )
    if not counts or not _is_in_spans(emitter, layout, whole.dims):
        return [emitter.cut(whole, layout)]

    def drawn(size, counter, key, alg, *bounds):
        return _raw(node, size, key, counter, alg, bounds)

    given = [emitter.whole(v) for v in inputs[1:]]
    group = 2 if whole.dtype.size == 8 else 4
    # 256 numbers are reserved for each truncated one, and a step gives 4.
    steps = 64 * group if node.type == "StatelessTruncatedNormalV2" else 1
    part = _in_spans(emitter, given, whole.dims, layout, drawn, group, steps)
    part.whole = whole
    return [part]


def _is_compiled(emitter: Emitter) -> bool:
    """Whether XLA may compile the draw."""
    return emitter.jit or bool(tf.config.optimizer.get_jit())


@rule(
    *("StatelessRandomUniform", "StatelessRandomNormal", "StatelessTruncatedNormal"),
    *("StatelessRandomUniformInt", "StatelessRandomUniformFullInt"),
    *("StatelessParameterizedTruncatedNormal",),
)
def _draw_all(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    whole = _in_full(emitter, node, inputs, inputs[0])
    layout = rows_of(emitter, inputs[0], whole.dims)
    return [whole if layout is None else emitter.cut(whole, layout)]


def _in_full(
    emitter: Emitter, node: Node, inputs: Sequence[Value], shape: Value
) -> Value:
    """The full draw, on every replica."""
    if any(v.has_rows and v.whole is None for v in inputs):
        emitter.report(node)
    given = [emitter.whole(v) for v in inputs]
    (whole,) = emitter.op(node, given, REPLICATED, drawn_shape(emitter, node, shape))
    return whole


def drawn_shape(emitter: Emitter, node: Node, shape: Value, *more: Value) -> Any:
    """The dims of a draw: the elements of its shape vector, then the dims of `more`."""
    elements = elements_of(shape)
    if elements is None or any(v.dims is None for v in more):
        return emitter.static_dims(node.outputs[0])
    dims = [unknown() if e is None else e for e in elements]
    return [*dims, *(d for v in more for d in v.dims or ())]


def _raw(node: Node, size, key, counter, alg, bounds: Sequence) -> tf.Tensor:
    operation = getattr(tf.raw_ops, node.type)
    given = dict(shape=[size], key=key, counter=counter, alg=alg)
    if bounds:
        return operation(**given, minval=bounds[0], maxval=bounds[1])
    return operation(**given, dtype=node.outputs[0].dtype)


def _counts(emitter: Emitter, alg: Value) -> bool:
    """Whether the algorithm is known to be Philox."""
    return ints(alg) in ([_PHILOX], [_AUTO])


# --- The layout of a draw.


def rows_of(
    emitter: Emitter, shape: Value, dims: Sequence[Dim] | None
) -> Layout | None:
    """The layout of a draw, of which only sizes are given: it affects only speed."""
    if not dims:
        return None
    layout = _of_source(emitter, shape, dims) or _of_sizes(emitter, dims)
    if layout is None or not emitter.can_compute([layout.blocks, layout.inner]):
        return None
    return layout


def _of_source(emitter: Emitter, shape: Value, dims: Sequence[Dim]) -> Layout | None:
    """The layout of the tensor whose shape it is, as in `normal(tf.shape(x))`."""
    for source in _measured(emitter, shape.node):
        for at, dim in enumerate(dims):
            if emitter.sizes.same(dim, source.layout.size):
                return source.layout.moved(at)
    return None


_MOVES_SIZES = {
    *("Pack", "ConcatV2", "StridedSlice", "Slice", "GatherV2", "Unpack", "Reshape"),
    *("Cast", "Identity", "Squeeze", "ExpandDims", "Mul", "Prod", "Maximum"),
}


def _measured(emitter: Emitter, node: Node | None) -> Iterator[Value]:
    """The tensors with rows from whose shapes a vector of sizes is computed."""
    seen: set[Node] = set()
    stack = [] if node is None else [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.type in ("Shape", "Size"):
            source = emitter.values.get(node.inputs[0])
            if source is not None and source.has_rows:
                yield source
        elif node.type in _MOVES_SIZES:
            stack += [edge.node for edge in reversed(node.inputs)]


def _of_sizes(emitter: Emitter, dims: Sequence[Dim]) -> Layout | None:
    if emitter.sizes.rows is not None:
        is_rows = emitter.sizes.rows > 1 and emitter.sizes.same(dims[0], ROWS)
        return by_rows(0) if is_rows else None
    for at, dim in enumerate(dims):
        inner = quotient(dim, ROWS)
        if inner is not None:
            return by_rows(at, 1, inner)
    return None


# --- Drawing only a replica's own elements.


def _is_in_spans(emitter: Emitter, layout: Layout, dims: Any) -> bool:
    """Whether a replica's elements are a few contiguous spans."""
    return (
        layout.dim == 0
        and isinstance(layout.blocks, int)
        and 1 <= layout.blocks <= _MOST_BLOCKS
        and emitter.can_compute([layout.inner, *dims[1:]])
    )


def _in_spans(
    emitter: Emitter,
    inputs: Sequence[Value],
    dims: Any,
    layout: Layout,
    drawn: Callable,
    group: int = 1,
    steps: int = 1,
) -> Value:
    """The rows of a replica, drawn from its first element on.

    Args:
        emitter: The emitter.
        inputs: Key, counter, algorithm and other inputs of the operation.
        dims: The shape of the draw.
        layout: Its layout, by rows of the first dimension.
        drawn: Takes a size, the counter, the key, the algorithm and the other inputs,
            and returns a vector of elements.
        group: How many elements are drawn at a time.
        steps: How far the counter advances for them.
    """
    dims = [layout.size, *dims[1:]]
    row = emitter.known(product([layout.inner, *dims[1:]]), tf.int64)
    local = emitter.local_shape(dims, layout)
    blocks: Any = layout.blocks

    def own(shape, row, total, start, count, key, counter, *others):
        rows = (total, start, count)
        total, start, count = (tf.cast(n, tf.int64) * row for n in rows)
        parts = []
        for block in range(blocks):
            first = block * total + start
            base = first // group
            # As on one device, only the very last group may be cut short.
            end = tf.minimum(-(-(first + count) // group) * group, blocks * total)
            begun = _advanced(counter, base * steps)
            some = drawn(end - base * group, begun, key, *others)
            parts.append(tf.slice(some, [first - base * group], [count]))
        return tf.reshape(tf.concat(parts, 0), shape)

    ports = [_port(p) for p in _row_ports(emitter)]
    value = emitter.call(own, [local, row, *ports, *inputs], layout, dims)
    value.tensor.set_shape(value.local_shape())
    return value


def _row_ports(emitter: Emitter) -> list[Port]:
    return [emitter.rows.total, emitter.rows.start, emitter.rows.count]


def _port(port: Port) -> Value:
    """The value of a port that describes a replica's rows, a scalar."""
    value = Value(REPLICATED, [], tf.int32)
    value.tensor = port
    return value


def _advanced(counter: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """A counter of 128 bits, as two words with the low one first, advanced by steps."""
    low, high = tf.unstack(tf.bitcast(counter, tf.int64), num=2)
    lowest = tf.constant(tf.int64.min, tf.int64)
    later = low + steps
    # As unsigned numbers, the sum is less than `low` if it has overflowed.
    carry = tf.bitwise.bitwise_xor(later, lowest) < tf.bitwise.bitwise_xor(low, lowest)
    high += tf.cast(carry, tf.int64)
    return tf.bitcast(tf.stack([later, high]), tf.uint64)


# --- Stateless draws with parameters.


@rule("StatelessRandomGammaV3")
def _gamma(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    """Each element has 256 steps of the counter, in the order of the alphas.

    That is the order of the elements if there is one draw for each alpha, or only one
    alpha. XLA has no such operation.
    """
    shape, key, counter, alg, alpha = inputs
    dims = elements_of(shape)
    if alpha.is_partial:
        alpha = emitter.whole(alpha)
    layout = _rows_of_gamma(emitter, shape, dims, alpha)
    if layout is None or not _counts(emitter, alg):
        return with_parameters(emitter, node, inputs, 0, [4])

    def drawn(size, counter, key, alg, alpha):
        flat = tf.reshape(alpha, [] if single else [-1])
        return tf.raw_ops.StatelessRandomGammaV3(
            shape=[size], key=key, counter=counter, alg=alg, alpha=flat
        )

    single = emitter.sizes.is_one(product(alpha.dims or ()))
    given = [emitter.whole(v) for v in (key, counter, alg)]
    given.append(alpha if single else emitter.to(alpha, layout))
    part = _in_spans(emitter, given, dims, layout, drawn, steps=256)
    if not _at_hand(emitter, alpha).has_rows:
        part.whole = _in_full(emitter, node, inputs, shape)
    return [part]


def _rows_of_gamma(
    emitter: Emitter, shape: Value, dims: Any, alpha: Value
) -> Layout | None:
    """The layout of a draw if a replica can draw only its own elements; else None."""
    if not dims or alpha.dims is None or any(d is None for d in dims):
        return None
    layout = alpha.layout if alpha.has_rows else rows_of(emitter, shape, dims)
    single = emitter.sizes.is_one(product(alpha.dims)) and not alpha.has_rows
    one_each = len(dims) == alpha.rank and all(
        emitter.sizes.same(a, b) for a, b in zip(dims, alpha.dims, strict=True)
    )
    if layout is None or layout.blocks != 1 or not (single or one_each):
        return None
    return layout if _is_in_spans(emitter, layout, dims) else None


@rule("StatelessRandomPoisson", "StatelessRandomGammaV2")
def _of_one(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return with_parameters(emitter, node, inputs, 0, [2])


@rule("StatelessRandomBinomial")
def _binomial(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value]:
    return with_parameters(emitter, node, inputs, 0, [2, 3])


def with_parameters(
    emitter: Emitter, node: Node, inputs: list[Value], shape_at: int, at: list[int]
) -> list[Value]:
    """A draw whose shape ends with that of its parameters, in full on every replica.

    An element is a function of its index and of its own parameters. So a replica that
    has those of its rows can draw its rows, whatever the parameters of other rows.
    """
    shape = inputs[shape_at]
    dims = elements_of(shape)
    given = [_at_hand(emitter, v) for v in inputs]
    layouts = {
        v.layout.moved(v.layout.dim + len(dims) - v.rank)
        for v in (given[i] for i in at)
        if v.has_rows and dims is not None
    }
    if not layouts and not any(v.has_rows for v in given):
        whole = _in_full(emitter, node, given, shape)
        layout = rows_of(emitter, shape, whole.dims)
        return [whole if layout is None else emitter.cut(whole, layout)]
    (layout,) = layouts if len(layouts) == 1 else (None,)
    others = [v for i, v in enumerate(given) if i not in at]
    if (
        layout is None
        or dims is None
        or any(v.has_rows for v in others)
        or not emitter.sizes.same(dims[layout.dim], layout.size)
        or not _can_pad(emitter, layout)
    ):
        return _cut_again(emitter, _in_full(emitter, node, given, shape), layout)
    given = [_padded(emitter, v) for v in given]
    (drawn,) = emitter.op(node, given, REPLICATED, drawn_shape(emitter, node, shape))
    return [_own_rows(emitter, drawn, layout)]


def _at_hand(emitter: Emitter, value: Value) -> Value:
    """A value, replicated unless that takes a gather."""
    needs_gather = value.has_rows and value.whole is None
    return value if needs_gather else emitter.whole(value)


def _cut_again(emitter: Emitter, whole: Value, layout: Layout | None) -> list[Value]:
    if layout is None or whole.dims is None:
        return [whole]
    if not emitter.sizes.same(whole.dims[layout.dim], layout.size):
        return [whole]
    return [emitter.cut(whole, layout)]


def _can_pad(emitter: Emitter, layout: Layout) -> bool:
    return layout.blocks == 1 and emitter.can_compute([layout.inner])


def _padded(emitter: Emitter, value: Value) -> Value:
    """A replica's own rows, padded with ones, which are valid parameters."""
    if not value.has_rows:
        return value
    layout, rank = value.layout, value.rank

    def among_ones(tensor, total, start, count, inner):
        paddings = [[0, 0]] * rank
        paddings[layout.dim] = [start * inner, (total - start - count) * inner]
        return tf.pad(tensor, tf.stack(paddings), constant_values=1)

    inner = emitter.known(layout.inner, tf.int32)
    ports = [_port(p) for p in _row_ports(emitter)]
    return emitter.call(among_ones, [value, *ports, inner], REPLICATED, value.dims)


def _own_rows(emitter: Emitter, drawn: Value, layout: Layout) -> Value:
    """A replica's rows of a draw that is correct only in these rows."""
    rows = emitter.cut(drawn, layout)
    rows.whole = None
    return rows


@rule("StatelessMultinomial")
def _multinomial(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """Draws for each row of logits.

    Kernels split the batch between threads, and the draw depends on where. So the batch
    keeps its size.
    """
    logits = inputs[0]
    if logits.dims is None:
        return None
    given = [_at_hand(emitter, v) for v in inputs]
    dims = [logits.dims[0], (elements_of(inputs[1]) or [None])[0]]
    dims = [unknown() if d is None else d for d in dims]
    if not any(v.has_rows for v in given):
        (whole,) = emitter.op(node, given, REPLICATED, dims)
        return _cut_again(emitter, whole, logits.layout if logits.has_rows else None)
    layout = logits.layout
    if any(v.has_rows for v in given[1:]) or layout.dim != 0:
        return None
    if not _can_pad(emitter, layout):
        return None
    given = [_padded(emitter, v) for v in given]
    (drawn,) = emitter.op(node, given, REPLICATED, dims)
    return [_own_rows(emitter, drawn, layout)]


@rule("StatelessShuffle")
def _shuffle(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """With rows in another dimension, all replicas shuffle the first one alike."""
    value, *others = inputs
    value = emitter.whole(value) if value.is_partial else value
    given = [emitter.whole(v) for v in others]
    if value.has_rows and value.layout.dim != 0:
        return emitter.op(node, [value, *given], value.layout, value.dims)
    if value.has_rows and value.whole is None:
        emitter.report(node)
    (whole,) = emitter.op(node, [emitter.whole(value), *given], REPLICATED, value.dims)
    return [emitter.cut(whole, value.layout) if value.has_rows else whole]
