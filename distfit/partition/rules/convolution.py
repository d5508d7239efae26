"""Convolutions: each replica computes the images of its rows.

They process images one by one, so rows in the first dimension stay, in any blocks. The
gradient of a filter is a sum over images, and so partial. Partial inputs are
all-reduced first.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distfit._keras import graphs
from distfit.partition.emission import Emitter
from distfit.partition.layouts import (
    PARTIAL,
    REPLICATED,
    Dim,
    Layout,
    Size,
    by_rows,
    product,
    quotient,
    unknown,
)
from distfit.partition.registry import rule
from distfit.partition.rules.sizes import elements_of, ints
from distfit.partition.tracing import Node
from distfit.partition.values import Value

# Their first input is the shape of the result.
_GRADIENTS_OF_IMAGES = (
    *("Conv2DBackpropInput", "Conv3DBackpropInputV2"),
    "DepthwiseConv2dNativeBackpropInput",
)


_GRADIENTS_OF_AVERAGES = ("AvgPoolGrad", "AvgPool3DGrad")


_CONVOLUTIONS = {
    *("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"),
    *("Conv3D", "Conv3DBackpropInputV2", "Conv3DBackpropFilterV2"),
}


def batched(
    emitter: Emitter, inputs: Sequence[Value], images: Sequence[int]
) -> tuple[list[Value], Layout] | None:
    """Splits inputs whose first dimension is the images by the same rows.

    Args:
        emitter: The emitter.
        inputs: The inputs of an operation.
        images: Which of them have the images; all others are replicated.

    Returns:
        The inputs and the layout of images; None where matching rows are not proven.
    """
    values = [
        v if i in images and not v.is_partial else emitter.whole(v)
        for i, v in enumerate(inputs)
    ]
    of_images = [values[i] for i in images]
    if any(not v.dims for v in of_images):
        return None
    if all(v.is_replicated for v in of_images):
        return values, REPLICATED
    lead = next((v for v in of_images if v.has_rows and v.layout.dim == 0), None)
    if lead is None:
        return None
    layout = lead.layout
    for i in images:
        value: Any = values[i]
        if value.layout != layout:
            if not emitter.sizes.same(value.dims[0], layout.size):
                return None
            values[i] = emitter.cut(emitter.whole(value), layout)
    return values, layout


def emitted(
    emitter: Emitter,
    node: Node,
    inputs: list[Value],
    layout: Layout,
    dims: list[Dim] | None = None,
) -> list[Value] | None:
    """Emits an operation on images; `layout` and `dims` are those of its result."""
    if dims is not None and layout.kind == "rows":
        dims = [layout.size, *dims[1:]]
    if dims is not None and _is_grouped(emitter, node, inputs, dims):
        return [_compiled(emitter, node, inputs, layout, dims)]
    # Kernels cannot handle zero images: some fail, on CPU or on GPU, or leave their
    # result unwritten; those of oneDNN give it the shape of their input.
    if any(v.has_rows for v in inputs) and not emitter.all_have_rows():
        return None
    return emitter.op(node, inputs, layout, dims)


def _is_grouped(emitter: Emitter, node: Node, inputs: list[Value], dims: Any) -> bool:
    """Whether a convolution has groups of channels."""
    if node.type not in _CONVOLUTIONS:
        return False
    images, filter = inputs[0].dims or [], inputs[1].dims or []
    if node.type.startswith(("Conv2DBackpropInput", "Conv3DBackpropInput")):
        images = dims
    elif "BackpropFilter" in node.type:
        filter = dims
    channels = images[_channels(node, len(images))]
    return not emitter.sizes.same(channels, filter[-2])


def _channels(node: Node, rank: int) -> int:
    """The dimension of the channels of images."""
    return 1 if node.attr("data_format").startswith("NC") else rank - 1


def _compiled(emitter, node, inputs, layout: Layout, dims) -> Value:
    """An operation compiled by XLA: CPUs have no other kernel for groups.

    Keras does the same, in its own function.
    """

    @tf.function(autograph=False, jit_compile=True)
    def compiled(*tensors):
        graph = tf.compat.v1.get_default_graph()
        return graphs.copy_operation(graph, node.op, tensors)[0]

    return emitter.call(compiled, inputs, layout, dims)


# --- Sizes.


def _windowed(dim: Dim, window: Any, stride: int, padding: str) -> Dim:
    """The number of windows along a dimension.

    An unknown number gets a symbol named after its computation, so it is the same for
    all windows of the same kind over the same dimension.
    """
    if padding not in ("SAME", "VALID") or not isinstance(window, int):
        return unknown()
    lost = window - 1 if padding == "VALID" else 0
    if isinstance(dim, int):
        return max(-(-(dim - lost) // stride), 0)
    apart = lost == 0 or window <= stride
    exact = quotient(dim, stride) if apart else None
    return Size(1, (f"windows({dim}-{lost}/{stride})",)) if exact is None else exact


def window_dims(
    emitter: Emitter, node: Node, images: Value, windows: list[Any]
) -> list[Dim]:
    """The shape of the result of windows over images, which keep their channels."""
    (traced,) = node.outputs
    strides, given = node.attr("strides"), images.dims or []
    padding = node.attr("padding")
    dims = []
    for i, static in enumerate(traced.shape):
        if static is None:
            number = emitter.sizes.number(given[i])
            static = _windowed(number, windows[i], strides[i], padding)
        dims.append(static)
    return [given[0], *dims[1:]]


def _spread(emitter: Emitter, node: Node, filter: Value) -> list[Any]:
    """The span of a convolution's window in each dimension."""
    (traced,) = node.outputs
    rank = traced.shape.rank
    dilations = node.attr("dilations")
    first = 2 if node.attr("data_format").startswith("NC") else 1
    windows: list[Any] = [1] * rank
    for i in range(rank - 2):
        taps, at = emitter.sizes.number((filter.dims or [])[i]), first + i
        if isinstance(taps, int):
            windows[at] = (taps - 1) * dilations[at] + 1
        else:
            windows[at] = None
    return windows


def _from_elements(shape: Value, static: tf.TensorShape) -> list[Dim]:
    """A shape that is given as an input, as far as it is known."""
    elements = elements_of(shape) or []
    if len(elements) != static.rank:
        elements = [None] * static.rank
    return [
        d if d is not None else unknown() if s is None else s
        for d, s in zip(elements, static, strict=True)
    ]


# --- Convolution.


@rule("Conv2D", "Conv3D", "DepthwiseConv2dNative")
def _convolution(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    images, filter = inputs
    if not images.dims or filter.dims is None:
        return None
    windows = _spread(emitter, node, filter)
    dims = window_dims(emitter, node, images, windows)
    of_each = filter.dims[-2] if node.type == "DepthwiseConv2dNative" else 1
    dims[_channels(node, len(dims))] = product([of_each, filter.dims[-1]])
    found = batched(emitter, inputs, [0])
    return found and emitted(emitter, node, *found, dims)


@rule(*_GRADIENTS_OF_IMAGES)
def _convolution_of_gradient(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """The gradient of images; a transposed convolution."""
    shape, filter, gradient = inputs
    return _to_shape(emitter, node, shape, [filter, gradient])


@rule(*_GRADIENTS_OF_AVERAGES)
def _average_gradient(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    shape, gradient = inputs
    return _to_shape(emitter, node, shape, [gradient])


def _to_shape(
    emitter: Emitter, node: Node, shape: Value, factors: list[Value]
) -> list[Value] | None:
    """An operation whose first input is the shape of its result, and the last images.

    It needs the shape of a replica's part.
    """
    (traced,) = node.outputs
    if traced.shape.rank is None:
        return None
    dims = _from_elements(shape, traced.shape)
    found = batched(emitter, factors, [len(factors) - 1])
    if found is None:
        return None
    laid, layout = found
    if layout.kind == "rows":
        dims = [layout.size, *dims[1:]]
        shape = _shape_of_rows(emitter, shape, laid[-1], dims)
    return emitted(emitter, node, [emitter.whole(shape), *laid], layout, dims)


def _shape_of_rows(
    emitter: Emitter, shape: Value, images: Value, dims: list[Dim]
) -> Value:
    if shape.dims == [2]:  # Only height and width.
        return shape
    if emitter.can_compute(dims):
        return emitter.local_shape(dims, images.layout, shape.dtype)

    def replaced(whole, tensor):
        rows = tf.shape(tensor, whole.dtype)[:1]
        return tf.concat([rows, whole[1:]], 0)

    given = [emitter.whole(shape), images]
    return emitter.call(replaced, given, REPLICATED, [len(dims)])


@rule(
    *("Conv2DBackpropFilter", "Conv3DBackpropFilterV2"),
    *("DepthwiseConv2dNativeBackpropFilter", "Dilation2DBackpropFilter"),
)
def _filter_gradient(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """The gradient of a filter: a sum over images."""
    images, filter, gradient = inputs
    if node.type == "Dilation2DBackpropFilter":
        dims: Any = filter.dims
    else:
        dims = _from_elements(filter, node.outputs[0].shape)
    found = batched(emitter, inputs, [0, 2])
    if found is None or dims is None:
        return None
    laid, layout = found
    result = PARTIAL if layout.kind == "rows" else REPLICATED
    return emitted(emitter, node, laid, result, dims)


# --- Space as more images: dilated convolutions.


@rule("SpaceToBatchND", "SpaceToBatch", "BatchToSpaceND", "BatchToSpace")
def _space_and_images(
    emitter: Emitter, node: Node, inputs: list[Value]
) -> list[Value] | None:
    """Each image becomes several, or the other way round.

    The first pixels of all images come first, then their second pixels: these are
    blocks of rows.
    """
    times = _images_for_one(node, inputs)
    found = batched(emitter, inputs, [0])
    if times is None or found is None or node.outputs[0].shape.rank is None:
        return None
    laid, layout = found
    to_images = node.type.startswith("SpaceToBatch")
    dims = emitter.static_dims(node.outputs[0])
    rows: Any = (inputs[0].dims or [])[0]
    if layout.kind == "rows":
        blocks = _blocks(layout.blocks, times, to_images)
        if blocks is None:
            return None
        layout = by_rows(0, blocks, layout.inner)
        return emitter.op(node, laid, layout, [layout.size, *dims[1:]])
    images = product([rows, times]) if to_images else quotient(rows, times)
    dims[0] = dims[0] if images is None else images
    return emitter.op(node, laid, layout, dims)


def _images_for_one(node: Node, inputs: list[Value]) -> int | None:
    if node.type in ("SpaceToBatch", "BatchToSpace"):
        return node.attr("block_size") ** 2
    sizes = ints(inputs[1])
    return None if sizes is None else int(product(sizes))  # type: ignore[arg-type]


def _blocks(blocks: Dim, times: int, to_images: bool) -> Dim | None:
    return product([blocks, times]) if to_images else quotient(blocks, times)
