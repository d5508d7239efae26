"""The rules by type of operation, and the operations that only move elements."""

from collections.abc import Callable, Sequence

# Rules for layouts. A rule takes an Emitter, the node and the values of its inputs, and
# returns the values of its outputs, or None if it does not apply.
RULES: dict[str, Callable] = {}


# Rules for operations on sizes. A rule takes an Emitter, the node and the values of its
# inputs, and returns the elements of each output, None for unknown ones; or None.
SIZE_RULES: dict[str, Callable] = {}


# Rules for operations that repeat their inputs. A rule takes an Emitter, the replicated
# value of the output and a layout by rows, and returns only a replica's rows; or None.
CUT_RULES: dict[str, Callable] = {}


def rule(*types: str) -> Callable:
    """Registers a rule for types of operations."""

    return _registered(RULES, types)


def size_rule(*types: str) -> Callable:
    """Registers a rule for types of operations on sizes."""
    return _registered(SIZE_RULES, types)


def cut_rule(*types: str) -> Callable:
    """Registers how to compute only a replica's rows of a replicated output."""
    return _registered(CUT_RULES, types)


def _registered(table: dict[str, Callable], types: Sequence[str]) -> Callable:
    def register(function: Callable) -> Callable:
        for type in types:
            if type in table:
                raise ValueError(f"There is already a rule. Received: type={type!r}.")
            table[type] = function
        return function

    return register


# Linear operations that return the same elements in another shape.
VIEWS = {
    *("Identity", "StopGradient", "Snapshot", "PreventGradient"),
    *("Reshape", "Squeeze", "ExpandDims", "Transpose"),
}
