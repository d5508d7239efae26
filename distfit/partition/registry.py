"""Which rule an operation has, and which operations only move elements."""

from collections.abc import Callable, Sequence

# For each type of operation, what it does with layouts. A rule is given an Emitter, the
# node and the values of its inputs, and returns the values of its outputs, or None if
# it cannot tell.
RULES: dict[str, Callable] = {}


# For operations on sizes: given an Emitter, the node and the values of its inputs, the
# elements of each output, where None is one that is not known; or None.
SIZE_RULES: dict[str, Callable] = {}


# For operations that repeat what they are given: given an Emitter, the value of their
# output, which is replicated, and a layout by rows, its rows; or None.
CUT_RULES: dict[str, Callable] = {}


def rule(*types: str) -> Callable:
    """Registers a rule for types of operations."""

    return _registered(RULES, types)


def size_rule(*types: str) -> Callable:
    """Registers what types of operations do with sizes."""
    return _registered(SIZE_RULES, types)


def cut_rule(*types: str) -> Callable:
    """Registers how the rows of what types of operations give are had without all."""
    return _registered(CUT_RULES, types)


def _registered(table: dict[str, Callable], types: Sequence[str]) -> Callable:
    def register(function: Callable) -> Callable:
        for type in types:
            if type in table:
                raise ValueError(f"There is a rule for {type} already.")
            table[type] = function
        return function

    return register


# Linear operations that give the same elements in another shape.
VIEWS = {
    *("Identity", "StopGradient", "Snapshot", "PreventGradient"),
    *("Reshape", "Squeeze", "ExpandDims", "Transpose"),
}
