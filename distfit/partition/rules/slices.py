"""Slices, and paddings, which are their gradients."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from distfit.partition.emission import Emitter
from distfit.partition.layouts import Dim, by_rows, unknown
from distfit.partition.registry import rule
from distfit.partition.rules.blocks import blocks_in, taken_blocks
from distfit.partition.rules.sizes import elements_of
from distfit.partition.tracing import Node
from distfit.partition.values import Value


@rule("StridedSlice")
def _strided_slice(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    value = inputs[0]
    spec = _Slices.of(emitter, node, value, inputs[1:])
    if spec is None:
        return None
    given = [emitter.whole(v) for v in inputs[1:]]
    if not value.has_rows:
        return emitter.op(node, [value, *given], value.layout, spec.dims)
    if spec.rows is None:
        return None
    if spec.rows != "all":
        return _slice_of_blocks(emitter, node, value, inputs[1:], spec)
    # An end at the number of all rows is beyond a replica's rows, so takes all of them.
    layout = value.layout.moved(spec.row_dim)
    return emitter.op(node, [value, *given], layout, spec.dims)


def _slice_of_blocks(emitter, node, value, given, spec) -> list[Value] | None:
    """`both[:n]`: the first blocks of rows."""
    taken = taken_blocks(emitter, value, *spec.rows)
    if spec.only_rows:
        return [taken]
    laid = spec.of_all_rows(emitter, given)
    if laid is None:
        return None
    layout = taken.layout.moved(spec.row_dim)
    return emitter.op(node, [taken, *laid], layout, spec.dims)


class _Slices:
    """What a StridedSlice takes of each dimension.

    Attributes:
        dims: The shape of the result.
        rows: `"all"` if it takes all rows; `(first, last)` blocks; None for anything
            else.
        row_dim: The dimension of the result that has the rows.
        only_rows: Whether nothing but rows is sliced.
        row_entry: Which entry of begin and end is that of the rows.
    """

    dims: list[Dim]
    rows: Any = "all"
    row_dim = 0
    only_rows = True
    row_entry = 0
    _traced: tf.TensorShape

    @classmethod
    def of(cls, emitter: Emitter, node: Node, value: Value, given: list[Value]):
        """From a slice, or from its gradient, whose last input is like the result."""
        is_slice = node.type == "StridedSlice"
        elements = [elements_of(v) for v in given]
        if value.dims is None or elements[2] is None:
            return None
        count = len(elements[2])
        begins, ends, steps = (e or [None] * count for e in elements)
        steps = ["?" if step is None else step for step in steps]
        masks = {
            name: node.attr(f"{name}_mask")
            for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
        }
        spec = cls()
        spec.dims = []
        result = node.outputs[0] if is_slice else node.op.inputs[-1]
        spec._traced = result.shape
        source = 0
        for i in range(count):
            if masks["ellipsis"] >> i & 1:
                later = sum(not masks["new_axis"] >> j & 1 for j in range(i + 1, count))
                while source < value.rank - later:
                    spec._keep(value, source)
                    source += 1
                continue
            if masks["new_axis"] >> i & 1:
                spec.dims.append(1)
                spec.only_rows = False
                continue
            if source >= value.rank:
                return None
            begin = None if masks["begin"] >> i & 1 else begins[i]
            end = None if masks["end"] >> i & 1 else ends[i]
            known_begin = masks["begin"] >> i & 1 or begins[i] is not None
            known_end = masks["end"] >> i & 1 or ends[i] is not None
            shrink = bool(masks["shrink_axis"] >> i & 1)
            if value.has_rows and source == value.layout.dim:
                spec.row_entry = i
            spec._take(
                emitter,
                value,
                source,
                begin if known_begin else "?",
                end if known_end else "?",
                steps[i],
                shrink,
            )
            source += 1
        while source < value.rank:
            spec._keep(value, source)
            source += 1
        return spec

    def _keep(self, value: Value, source: int) -> None:
        if value.has_rows and source == value.layout.dim:
            self.row_dim = len(self.dims)
        self.dims.append(value.dims[source])

    def _take(self, emitter, value, source, begin, end, step, shrink) -> None:
        size = value.dims[source]
        is_rows = value.has_rows and source == value.layout.dim
        if shrink:
            self.only_rows = False
            if is_rows:
                self.rows = None
            return
        same = emitter.sizes.same
        from_start = begin is None or begin == 0
        to_end = end is None or (end != "?" and same(end, size))
        if step == 1 and from_start and to_end:
            self._keep(value, source)
            return
        if is_rows:
            self.row_dim = len(self.dims)
            self.rows = _block_borders(emitter, value, begin, end, step)
            if self.rows is None:
                self.dims.append(unknown())
                return
            first, last = self.rows
            layout = value.layout
            self.dims.append(by_rows(source, last - first, layout.inner).size)
            return
        self.only_rows = False
        number = self._traced[len(self.dims)] if self._traced.rank else None
        length = _length(emitter, size, begin, end, step)
        if length is None:
            length = number
        self.dims.append(unknown() if length is None else length)

    def of_all_rows(self, emitter: Emitter, given: list[Value]) -> Any:
        """Begin, end and step that take all rows and leave the rest unchanged."""
        laid = []
        for value, all_rows in zip(given, (0, 2**31 - 1, 1), strict=True):
            elements = elements_of(value)
            if elements is None:
                return None
            elements[self.row_entry] = all_rows
            if not emitter.can_compute(elements):
                return None
            laid.append(emitter.known(elements, value.dtype))
        return laid


def _block_borders(emitter, value, begin, end, step) -> tuple[int, int] | None:
    """The first and last block that a slice of rows takes; None if it splits one."""
    blocks = value.layout.blocks
    if step != 1 or "?" in (begin, end) or not isinstance(blocks, int):
        return None
    borders = []
    for border, default in ((begin, 0), (end, blocks)):
        many: int | None = default
        if border is not None:
            many = blocks_in(emitter, border, value.layout.inner)
        if many is None:
            return None
        borders.append(min(many + blocks if many < 0 else many, blocks))
    first, last = borders
    return (first, last) if 0 <= first < last else None


def _length(emitter, size, begin, end, step) -> int | None:
    size = emitter.sizes.number(size)
    given = [begin, end, step]
    if not isinstance(size, int) or not all(
        g is None or isinstance(g, int) for g in given
    ):
        return None
    return len(range(*slice(begin, end, step).indices(size)))


@rule("Slice")
def _slice(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, begin, size = inputs
    begins, sizes = elements_of(begin), elements_of(size)
    if value.dims is None or begins is None or sizes is None:
        return None
    if not value.has_rows:
        dims = _sliced_dims(emitter, value, begins, sizes)
        given = [value, emitter.whole(begin), emitter.whole(size)]
        return emitter.op(node, given, value.layout, dims)
    at = value.layout.dim
    blocks = _sliced_blocks(emitter, value, begins[at], sizes[at])
    if blocks is None:
        return None
    if blocks != (0, value.layout.blocks):
        value = taken_blocks(emitter, value, *blocks)
    begins[at], sizes[at] = 0, -1  # All rows of these blocks.
    if not emitter.can_compute([*begins, *sizes]):
        return None
    dims = _sliced_dims(emitter, value, begins, sizes)
    local = [emitter.known(begins, begin.dtype), emitter.known(sizes, size.dtype)]
    return emitter.op(node, [value, *local], value.layout, dims)


def _sliced_dims(emitter: Emitter, value: Value, begins, sizes) -> list[Dim]:
    dims: list[Dim] = []
    for at, many, dim in zip(begins, sizes, value.dims or (), strict=True):
        number = emitter.sizes.number(dim)
        if many is not None and many != -1:
            dims.append(many)
        elif at == 0 and many == -1:
            dims.append(dim)
        elif many == -1 and isinstance(number, int) and isinstance(at, int):
            dims.append(number - at)
        else:
            dims.append(unknown())
    return dims


def _sliced_blocks(emitter: Emitter, value: Value, begin, size) -> Any:
    """The first and last block of rows that are taken; None if one is split."""
    lies, sizes = value.layout, emitter.sizes
    whole = size is not None and (size == -1 or sizes.same(size, lies.size))
    if begin == 0 and whole:
        return 0, lies.blocks
    first = blocks_in(emitter, begin, lies.inner)
    if first is None or not isinstance(lies.blocks, int):
        return None
    many = lies.blocks - first if size == -1 else blocks_in(emitter, size, lies.inner)
    if many is None or many < 1 or first < 0 or first + many > lies.blocks:
        return None
    return first, first + many


@rule("StridedSliceGrad")
def _strided_slice_grad(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """The gradient of a slice, put back into zeros of the shape that was sliced."""
    shape, *given, gradient = inputs
    dims = elements_of(shape)
    if dims is None or gradient.dims is None or not emitter.can_compute(dims):
        return None
    if not gradient.has_rows:
        laid = [emitter.whole(v) for v in (shape, *given)]
        return emitter.op(node, [*laid, gradient], gradient.layout, dims)
    # As for a slice of a tensor with these dims, split by rows in one of them.
    for source in _sources(emitter, dims, gradient):
        spec = _Slices.of(emitter, node, source, given)
        if spec is None or spec.rows is None or spec.row_dim != gradient.layout.dim:
            continue
        if spec.rows == "all" and source.layout.blocks == gradient.layout.blocks:
            shape = emitter.local_shape(dims, source.layout, shape.dtype)
            laid = [shape, *(emitter.whole(v) for v in given), gradient]
            return emitter.op(node, laid, source.layout, dims)
        if spec.rows != "all":
            found = _padded_blocks(emitter, node, gradient, source, given, spec)
            if found is not None:
                return found
    return None


def _sources(emitter: Emitter, dims: list[Any], gradient: Value) -> Iterator[Value]:
    """Values by rows whose slice may have the rows of the gradient."""
    inner = gradient.layout.inner
    for at, dim in enumerate(dims):
        many = blocks_in(emitter, dim, inner)
        if many:
            yield Value(by_rows(at, many, inner), dims, gradient.dtype)


def _padded_blocks(
    emitter: Emitter, node: Node, gradient: Value, source: Value, given: Any, spec: Any
) -> list[Value] | None:
    """The gradient of `both[:n]`: zeros for the blocks that were not taken."""
    (first, last), at = spec.rows, source.layout.dim
    blocks: Any = source.layout.blocks
    if last - first != gradient.layout.blocks:
        return None
    if not spec.only_rows:
        layout = by_rows(at, last - first, source.layout.inner)
        laid = spec.of_all_rows(emitter, given)
        if laid is None:
            return None
        shape = emitter.local_shape(source.dims or (), layout, laid[0].dtype)
        (gradient,) = emitter.op(node, [shape, *laid, gradient], layout, source.dims)

    def padded(tensor):
        one = tf.math.floordiv(tf.shape(tensor)[at], last - first)
        paddings: list[Any] = [[0, 0]] * source.rank
        paddings[at] = [first * one, (blocks - last) * one]
        return tf.pad(tensor, paddings)

    return [emitter.call(padded, [gradient], source.layout, source.dims)]


@rule("Pad", "PadV2", "MirrorPad", "MirrorPadGrad")
def _pad(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    value, where, *rest = inputs
    numbers = elements_of(where)
    if value.is_partial and node.type != "Pad":
        value = emitter.whole(value)
    if value.dims is None or numbers is None:
        return None
    given = [emitter.whole(v) for v in (where, *rest)]
    dims = _padded_dims(emitter, node, value.dims, numbers)
    if not value.has_rows:
        return emitter.op(node, [value, *given], value.layout, dims)
    at = value.layout.dim
    if numbers[2 * at] != 0 or numbers[2 * at + 1] != 0:
        return _padded_rows(emitter, node, value, numbers, given, dims)
    if node.type.startswith("Mirror"):
        return [_mirrored(emitter, node, value, given, dims)]
    return emitter.op(node, [value, *given], value.layout, dims)


def _padded_dims(emitter: Emitter, node: Node, dims: list[Dim], numbers) -> list[Dim]:
    padded: list[Dim] = []
    for i, dim in enumerate(dims):
        before, after = numbers[2 * i : 2 * i + 2]
        number: Any = emitter.sizes.number(dim)
        if before == 0 and after == 0:
            padded.append(dim)
        elif all(isinstance(n, int) for n in (before, number, after)):
            more = before + after
            padded.append(number + (-more if node.type == "MirrorPadGrad" else more))
        else:
            padded.append(unknown())
    return padded


def _padded_rows(emitter, node, value, numbers, given, dims) -> list[Value] | None:
    """The gradient of a slice of blocks of rows: more blocks, of zeros."""
    lies, at = value.layout, value.layout.dim
    ends = numbers[2 * at : 2 * at + 2]
    before, after = (blocks_in(emitter, n, lies.inner) for n in ends)
    if node.type not in ("Pad", "PadV2") or not isinstance(lies.blocks, int):
        return None
    if before is None or after is None or min(before, after) < 0:
        return None
    layout = by_rows(at, before + lies.blocks + after, lies.inner)
    dims[at] = layout.size

    def padded(tensor, paddings, *constant):
        one = tf.math.floordiv(tf.shape(tensor)[at], lies.blocks)
        of_rows = tf.cast([[before * one, after * one]], paddings.dtype)
        paddings = tf.concat([paddings[:at], of_rows, paddings[at + 1 :]], 0)
        return tf.pad(tensor, paddings, constant_values=constant[0] if constant else 0)

    return [emitter.call(padded, [value, *given], layout, dims)]


def _mirrored(emitter, node, value, given, dims) -> Value:
    """With an extra row of zeros, as the kernels refuse tensors without elements."""
    at = value.layout.dim

    def mirrored(tensor, paddings):
        one: list[Any] = [[0, 0]] * value.rank
        one[at] = [0, 1]
        operation = getattr(tf.raw_ops, node.type)
        more = operation(input=tf.pad(tensor, one), paddings=paddings, mode=mode)
        size = [-1] * value.rank
        size[at] = tf.shape(tensor)[at]
        return tf.slice(more, [0] * value.rank, tf.stack(size))

    mode = node.attr("mode")
    return emitter.call(mirrored, [value, *given], value.layout, dims)
