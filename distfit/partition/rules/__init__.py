"""What each operation does with layouts, a file a family.

`registry.rule` registers a rule for types of operations. A rule answers only what it
can prove from known sizes; anything else is computed in full on every replica. Read
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
