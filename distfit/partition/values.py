"""A tensor of the traced graph on the replicas: layout, shape, where it is computed."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from distfit.partition.layouts import BATCH, Dim, Layout, Size
from distfit.partition.program import Stage
from distfit.partition.tracing import Node


@dataclasses.dataclass(eq=False)
class Resource:
    """A variable or another resource that a graph captures.

    Attributes:
        kind: `"mirrored"`: each replica has its copy. `"summed"`: each replica has a
            part, and the value is their sum. `"single"`: there is one in this process.
        level: The level of the latest operation on it, to keep them in order.
        read: The cached value of a read, until the next write.
    """

    kind: str
    level: int = 0
    read: "Value | None" = None


@dataclasses.dataclass
class Element:
    """The layout of the elements of a list of tensors.

    Attributes:
        layout: Their layout.
        dims: Their global shape; None if their rank is unknown.
        sizes: As in `Value`, if they are the same for all elements.
    """

    layout: Layout
    dims: list[Dim] | None
    sizes: Any = None


class Value:
    """A tensor of the traced graph on the replicas.

    Attributes:
        layout: Its layout.
        dims: Its global shape; None if its rank is unknown.
        dtype: Its dtype.
        sizes: For a small tensor of integers derived from shapes, its elements as
            `Dim`s: an array of objects.
        level: The first level whose stage can use it.
        ready: The first level whose meetings can use it.
        home, tensor: The stage that computes it and its tensor there; for a value that
            comes from a meeting, None and a port.
        constant: For a constant, its node, which is copied wherever it is used.
        whole: The same value, replicated; None until it is needed.
        element: For a list of tensors, the layout of its elements; None if unknown.
        resource: For a handle, its resource.
        node: The node that outputs it.
        source: For a view of a partial sum, the node of the view and its inputs.
    """

    __slots__ = (
        *("layout", "dims", "dtype", "sizes", "level", "ready", "home", "tensor"),
        *("constant", "whole", "element", "resource", "node", "source"),
    )

    def __init__(
        self,
        layout: Layout,
        dims: Sequence[Dim] | None,
        dtype: tf.DType,
        *,
        level: int = 0,
        ready: int = 0,
        home: Stage | None = None,
        tensor: Any = None,
        sizes: Any = None,
        constant: Node | None = None,
        element: Element | None = None,
        resource: Resource | None = None,
    ):
        self.layout = layout
        # Any, because rules check for None first, which the type checker cannot see.
        self.dims: Any = None if dims is None else list(dims)
        self.dtype = dtype
        self.level = level
        self.ready = ready
        self.home = home
        self.tensor = tensor
        self.sizes = sizes
        self.constant = constant
        self.element = element
        self.resource = resource
        self.whole: Value | None = None
        self.node: Node | None = None
        self.source: tuple[Node, list[Value]] | None = None

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def is_replicated(self) -> bool:
        return self.layout.kind == "replicated"

    @property
    def is_partial(self) -> bool:
        return self.layout.kind == "partial"

    @property
    def has_rows(self) -> bool:
        return self.layout.kind == "rows"

    @property
    def has_known_sizes(self) -> bool:
        """Whether all its elements are known as sizes."""
        return self.sizes is not None and all(s is not None for s in self.sizes.flat)

    def local_shape(self) -> list[int | None] | None:
        """The static shape of a replica's part."""
        if self.dims is None:
            return None
        shape: list[int | None] = [d if isinstance(d, int) else None for d in self.dims]
        if self.has_rows:
            shape[self.layout.dim] = None
        return shape

    def __repr__(self) -> str:
        return f"<{self.dtype.name}{self.dims} {self.layout}>"


def may_be_size(tensor: tf.Tensor) -> bool:
    """Whether a tensor may hold sizes, or results of comparing them."""
    return tensor.dtype.is_integer or tensor.dtype.is_bool


def measured(dims: Iterable[Any]) -> Iterator[str]:
    """The symbols in dimensions that are read off a tensor: all except the rows."""
    for dim in dims:
        if isinstance(dim, Size):
            yield from (symbol for symbol in dim.symbols if symbol != BATCH)
