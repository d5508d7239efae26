"""How broad the tests are.

By default each behaviour is tested once, in its hardest variant. `make test-exhaustive`
sets EXHAUSTIVE: all numbers of replicas, all sizes of batches, more random examples.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")

EXHAUSTIVE = bool(os.environ.get("EXHAUSTIVE"))

# For tests of what others hold by default, each in its part.
only_exhaustive = pytest.mark.skipif(not EXHAUSTIVE, reason="an exhaustive test")


def pick(few: Sequence[T], every: Sequence[T]) -> list[T]:
    """The variants of a test: `few`, or `every` one in the exhaustive tests."""
    return list(every if EXHAUSTIVE else few)


def numbers_of_replicas(few: Sequence[T], every: Sequence[T]) -> list[T]:
    """As `pick`, for the parameter `replicas` of a test.

    Workers get all numbers, and run the variants with as many replicas as they have.
    """
    return list(every) if "TF_CONFIG" in os.environ else pick(few, every)


def examples(few: int, many: int) -> int:
    """How many random examples a property test draws."""
    return many if EXHAUSTIVE else few
