"""Operations that every replica computes in full, by line, with their share of a step.

The share is measured in elements: for each operation those that it reads or those that
it writes, whichever are more. It does not measure time, but separates what limits the
speed of many replicas from what is negligible.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from distfit.partition.tracing import Node

# Stands for sizes that are unknown in the trace, such as the rows of a batch.
_OPEN_SIZE = 32
# A smaller share of the elements of a step is not reported.
_TRIFLE = 0.01


@dataclasses.dataclass(frozen=True)
class Finding:
    """An operation that every replica computes in full.

    Attributes:
        type: The type of the operation.
        line: Where the user's code creates it, as `file:line  source`.
        elements: The elements that it reads or writes, as `elements_of` counts them.
    """

    type: str
    line: str
    elements: int


@dataclasses.dataclass(frozen=True)
class InFull:
    """The operations of one type and line that every replica computes in full.

    Attributes:
        operation: The type of the operations.
        line: Where the user's code creates them, as `file:line  source`.
        share: Their share of the elements of the step, from 0 to 1.
    """

    operation: str
    line: str
    share: float


def elements_of(node: Node) -> int:
    """The number of elements that a node reads or writes, whichever is more."""
    read = sum(_elements(tensor.shape) for tensor in node.op.inputs)
    written = sum(_elements(tensor.shape) for tensor in node.outputs)
    return max(read, written)


def _elements(shape) -> int:
    if shape.rank is None:
        return 1
    return math.prod(_OPEN_SIZE if size is None else size for size in shape)


def merged(findings: Iterable[Finding], total: int) -> list[InFull]:
    """Findings by type and line, the largest first.

    Args:
        findings: The findings of a step.
        total: The elements of all operations of the step.
    """
    found: dict[tuple[str, str], int] = {}
    for finding in findings:
        key = (finding.type, finding.line)
        found[key] = found.get(key, 0) + finding.elements
    total = max(total, sum(found.values()), 1)  # `total` omits the bodies of loops.
    by_share = [InFull(*key, elements / total) for key, elements in found.items()]
    return sorted(by_share, key=lambda entry: -entry.share)


def not_partitioned(findings: Sequence[Finding], total: int) -> str | None:
    """One line about what every replica computes in full; None if it is negligible.

    Args:
        findings: The findings of a step.
        total: The elements of all operations of the step.
    """
    entries = merged(findings, total)
    share = sum(entry.share for entry in entries)
    if share < _TRIFLE:
        return None
    worst = entries[0]
    others = len(entries) - 1
    more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
    return (
        f"{percent(share)} of the step is computed in full on every replica: "
        f"{worst.operation} at {worst.line}{more}. The numbers are right, but more "
        "replicas do not speed this part up. `distfit.verify` lists all."
    )


def percent(share: float) -> str:
    """A share as text, e.g. `25 %`."""
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"
