"""Finds the live objects of a class; neither Keras nor TensorFlow lists them."""

import gc
import threading
from typing import Any

_clearing: list[threading.Thread] = []


def clear_beside(held: list) -> None:
    """Clears a list whose tensors may take long to be destroyed, in another thread.

    TensorFlow 2.21 destroys a tensor without the lock of the interpreter, while the
    garbage collector still lists it: a look at all objects would crash. Therefore
    `instances_of` waits for these threads.
    """
    thread = threading.Thread(target=held.clear, daemon=True)
    thread.start()
    _clearing[:] = [each for each in _clearing if each.is_alive()] + [thread]


def instances_of(*classes: type) -> list[Any]:
    """All live objects of some classes and their subclasses.

    It makes one pass over all objects, however many classes there are.

    They are found as referrers of their class. A list of all objects would hold tuples
    that other threads are still building, and make those threads fail.
    """
    for thread in list(_clearing):
        thread.join()
    kinds = set().union(*map(_with_subclasses, classes))
    # Not isinstance(): it reads `__class__`, which lazy modules and proxies define.
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))
