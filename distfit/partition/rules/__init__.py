"""What each operation does with layouts, a file a family.

`emission.rule` registers a rule for types of operations. A rule answers only what it
can prove from known sizes; anything else is computed in full on every replica. Read
`elementwise.py` first.
"""

from distfit.partition.rules import (  # noqa: F401
    control_flow,
    convolution,
    elementwise,
    linalg,
    lists,
    products,
    random,
    reductions,
    shapes,
    sizes,
    sparse,
    variables,
)
