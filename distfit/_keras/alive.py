"""Finds the live objects of a class; neither Keras nor TensorFlow lists them."""

import gc
from typing import Any


def instances_of(*classes: type) -> list[Any]:
    """All live objects of some classes and their subclasses.

    It makes one pass over all objects, however many classes there are.

    They are found as referrers of their class. A list of all objects would hold tuples
    that other threads are still building, and make those threads fail.
    """
    kinds = set().union(*map(_with_subclasses, classes))
    # Not isinstance(): it reads `__class__`, which lazy modules and proxies define.
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))
