"""Layouts: how a tensor is distributed over N replicas; sizes that depend on rows.

A dimension of a tensor is an `int` where its size is known, else a `Size`: a product of
symbols. The symbol `BATCH` is the number of rows of the global batch; every other
unknown size gets a symbol of its own, so two sizes compare equal only where that is
proven.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

BATCH = "rows"
_symbols = itertools.count()


@dataclasses.dataclass(frozen=True)
class Size:
    """`factor` times the product of `symbols`, e.g. 3 · rows · d17."""

    factor: int
    symbols: tuple[str, ...]

    def __repr__(self) -> str:
        factor = [str(self.factor)] if self.factor != 1 else []
        return "·".join([*factor, *self.symbols])


Dim = int | Size
ROWS = Size(1, (BATCH,))


def unknown() -> Size:
    """A size about which nothing is known; equal only to itself."""
    return Size(1, (f"d{next(_symbols)}",))


def is_known(dim: Any) -> bool:
    """Whether a dimension is a number."""
    return not isinstance(dim, Size)


def depends_on_rows(dim: Any) -> bool:
    """Whether a dimension is a multiple of the number of rows."""
    return isinstance(dim, Size) and BATCH in dim.symbols


def product(dims: Iterable[Dim]) -> Dim:
    """The product of dimensions."""
    factor = 1
    symbols: list[str] = []
    for dim in dims:
        if isinstance(dim, Size):
            factor *= dim.factor
            symbols += dim.symbols
        else:
            factor *= int(dim)
    return Size(factor, tuple(sorted(symbols))) if symbols and factor else factor


def quotient(dividend: Dim, divisor: Dim) -> Dim | None:
    """The exact quotient of dimensions; None if it is not known to be one."""
    a, b = _parts(dividend), _parts(divisor)
    if b[0] == 0 or a[0] % b[0]:
        return None
    left = list(a[1])
    for symbol in b[1]:
        if symbol not in left:
            return None
        left.remove(symbol)
    factor = a[0] // b[0]
    return Size(factor, tuple(left)) if left and factor else factor


def _parts(dim: Dim) -> tuple[int, tuple[str, ...]]:
    return (dim.factor, dim.symbols) if isinstance(dim, Size) else (int(dim), ())


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor is distributed: `REPLICATED`, `PARTIAL`, or made by `by_rows`.

    Attributes:
        kind: `"replicated"`: every replica has the full tensor. `"partial"`: the tensor
            is the sum of the replicas' parts. `"rows"`: a replica has its rows of
            dimension `dim`, whose size is `blocks · rows · inner`, in that order.
    """

    kind: str
    dim: int = 0
    blocks: Dim = 1
    inner: Dim = 1

    @property
    def size(self) -> Dim:
        """The global size of the dimension that is split by rows."""
        return product([self.blocks, ROWS, self.inner])

    def moved(self, dim: int) -> "Layout":
        """The same layout, with the rows in another dimension."""
        return dataclasses.replace(self, dim=dim)

    def __repr__(self) -> str:
        if self.kind != "rows":
            return self.kind
        return f"rows({self.dim}: {self.blocks}·rows·{self.inner})"


REPLICATED = Layout("replicated")
PARTIAL = Layout("partial")


def by_rows(dim: int, blocks: Dim = 1, inner: Dim = 1) -> Layout:
    """The layout that splits dimension `dim`, of `blocks · rows · inner`, by rows."""
    return Layout("rows", dim, blocks, inner)


class Sizes:
    """What is known about sizes: the number of rows, if the input pipeline fixes it.

    With a fixed number, sizes that depend on the rows can be compared as numbers.

    Args:
        rows: The number of rows of every global batch, or None if it may change.
        few_rows: Whether a batch of an unknown number of rows may leave a replica
            without any.

    Attributes:
        needs_rows: Whether a rule assumed that every replica has a row.
    """

    def __init__(self, rows: int | None = None, few_rows: bool = False):
        self.rows = rows
        self.few_rows = few_rows
        self.needs_rows = False

    def number(self, dim: Dim) -> Dim:
        """A dimension, as a number if it is known."""
        if self.rows is None or not depends_on_rows(dim):
            return dim
        factor, symbols = _parts(dim)
        rest = tuple(s for s in symbols if s != BATCH)
        factor *= self.rows ** (len(symbols) - len(rest))
        return Size(factor, rest) if rest and factor else factor

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether two dimensions are proven equal."""
        return self.number(a) == self.number(b)

    def is_one(self, dim: Dim) -> bool:
        """Whether a dimension is proven to be 1."""
        return self.number(dim) == 1

    def broadcast(self, shapes: Sequence[Sequence[Dim]]) -> list[Dim]:
        """The broadcast shape; its sizes are unknown where they are not proven."""
        rank = max(map(len, shapes))
        return [
            self._broadcast_dims(
                [s[i - rank + len(s)] for s in shapes if i - rank + len(s) >= 0]
            )
            for i in range(rank)
        ]

    def _broadcast_dims(self, dims: Sequence[Dim]) -> Dim:
        larger: list[Dim] = []
        for dim in dims:
            if not self.is_one(dim) and not any(self.same(dim, d) for d in larger):
                larger.append(dim)
        if not larger:
            return 1
        if len(larger) == 1:
            return larger[0]
        numbers = [d for d in larger if is_known(self.number(d))]
        # A symbolic size may be 1, or equal to that number.
        return numbers[0] if len(numbers) == 1 else unknown()
