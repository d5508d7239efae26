"""What each operation does with layouts, one file per family.

`registry.rule` registers a rule for types of operations. A rule applies only where
known sizes prove it right; anything else is computed in full on every replica. Read
`elementwise.py` first.
"""

from distfit.partition.rules import (  # noqa: F401
    blocks,
    control_flow,
    convolution,
    elementwise,
    images,
    linalg,
    lists,
    order,
    products,
    random,
    reductions,
    repeats,
    shapes,
    sizes,
    slices,
    sparse,
    stateful_random,
    variables,
)
