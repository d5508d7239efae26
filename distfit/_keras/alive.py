"""Objects of a class, wherever they are held: nobody keeps a list of them."""

import gc
from typing import Any


def instances_of(*classes: type) -> list[Any]:
    """All objects of some classes and of their subclasses that are alive.

    It goes through all objects once, however many classes there are.

    They are found as what refers to their class. A list of all objects would hold
    tuples that other threads are just making, and these would fail to finish them.
    """
    kinds = set().union(*map(_with_subclasses, classes))
    # Not isinstance(): that asks the object, which may be a lazy module or a proxy.
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))
