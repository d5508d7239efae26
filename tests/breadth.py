"""How broad the tests are.

By default each behaviour is tested once, in its hardest variant. `make test-exhaustive`
sets EXHAUSTIVE: all numbers of replicas, all sizes of batches, more random examples.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# The workers of a cluster pick those variants that have as many replicas as they have.
EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE")) or "TF_CONFIG" in os.environ


def pick(few: Sequence[T], every: Sequence[T]) -> list[T]:
    """The variants of a test: `few`, or `every` one in the exhaustive tests."""
    return list(every if EXHAUSTIVE else few)


def examples(few: int, many: int) -> int:
    """How many random examples a property test draws."""
    return many if EXHAUSTIVE else few
