"""Pooling, resizing, colors: each replica computes the images of its rows."""

from typing import Any

from distfit.partition.emission import Emitter
from distfit.partition.layouts import unknown
from distfit.partition.registry import rule
from distfit.partition.rules.convolution import batched, emitted, window_dims
from distfit.partition.rules.sizes import elements_of
from distfit.partition.tracing import Node
from distfit.partition.values import Value


@rule("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D")
def _pool(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    found = batched(emitter, inputs, [0])
    if found is None:
        return None
    dims = window_dims(emitter, node, inputs[0], node.attr("ksize"))
    return emitted(emitter, node, *found, dims)


# The inputs whose first dimension is the images, as it is for all results.
_IMAGES = {
    **dict.fromkeys(["MaxPoolV2", "Dilation2D", "ExtractImagePatches"], [0]),
    **dict.fromkeys(["ExtractVolumePatches", "SpaceToDepth", "DepthToSpace"], [0]),
    **dict.fromkeys(["CombinedNonMaxSuppression", "DrawBoundingBoxesV2"], [0, 1]),
}


@rule(*_IMAGES)
def _of_images(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    found = batched(emitter, inputs, _IMAGES[node.type])
    shapes = [emitter.static_dims(traced) for traced in node.outputs]
    if found is None or not all(shapes):
        return None
    laid, layout = found
    first = layout.size if layout.kind == "rows" else (inputs[0].dims or [])[0]
    return emitter.op(node, laid, layout, tuple([first, *s[1:]] for s in shapes))


# The inputs whose first dimension is the images, and the one with the result's shape.
_ALIKE = {
    **dict.fromkeys(["MaxPoolGrad", "MaxPoolGradV2", "MaxPool3DGrad"], ([0, 1, 2], 0)),
    **dict.fromkeys(["MaxPoolGradGrad", "MaxPoolGradGradV2"], ([0, 1, 2], 1)),
    **dict.fromkeys(["MaxPool3DGradGrad"], ([0, 1, 2], 1)),
    **dict.fromkeys(["LRN"], ([0], 0)),
    **dict.fromkeys(["LRNGrad"], ([0, 1, 2], 0)),
    **dict.fromkeys(["Dilation2DBackpropInput"], ([0, 2], 0)),
    **dict.fromkeys(["ResizeBilinearGrad", "ResizeBicubicGrad"], ([0, 1], 1)),
    **dict.fromkeys(["ScaleAndTranslateGrad"], ([0, 1], 1)),
}


@rule(*_ALIKE)
def _alike(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    images, like = _ALIKE[node.type]
    found = batched(emitter, inputs, images)
    return found and emitted(emitter, node, *found, inputs[like].dims)


@rule(
    *("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic", "ResizeArea"),
    *("ScaleAndTranslate", "ResizeNearestNeighborGrad"),
)
def _resize(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    images, size = inputs[:2]
    if not images.dims:
        return None
    return _resized(emitter, node, inputs, [0], size)


def _resized(
    emitter: Emitter, node: Node, inputs: list[Value], images: list[int], size: Value
) -> list[Value] | None:
    found = batched(emitter, inputs, images)
    (traced,) = node.outputs
    if found is None or traced.shape.rank != 4:
        return None
    dims: Any = list(inputs[0].dims or ())
    for i, element in zip((1, 2), elements_of(size) or [None] * 2, strict=True):
        static = traced.shape[i]
        dims[i] = static if element is None else element
        dims[i] = unknown() if dims[i] is None else dims[i]
    return emitted(emitter, node, *found, dims)


@rule("ImageProjectiveTransformV2", "ImageProjectiveTransformV3")
def _transform(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    images, transforms, size = inputs[:3]
    if not images.dims or not transforms.dims:
        return None
    one_for_all = emitter.sizes.is_one(transforms.dims[0])
    return _resized(emitter, node, inputs, [0] if one_for_all else [0, 1], size)


@rule("AdjustContrastv2", "AdjustHue", "AdjustSaturation", "RGBToHSV", "HSVToRGB")
def _colors(emitter: Emitter, node: Node, inputs: list[Value]) -> list[Value] | None:
    """Operations on the colors of a pixel or, for contrast, with an image's mean."""
    images, *rest = [emitter.whole(v) if v.is_partial else v for v in inputs]
    if images.dims is None:
        return None
    last = 3 if node.type == "AdjustContrastv2" else 1
    if images.has_rows and images.layout.dim >= images.rank - last:
        return None
    given = [images, *(emitter.whole(v) for v in rest)]
    return emitter.op(node, given, images.layout, images.dims)
