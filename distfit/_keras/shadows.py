"""Replaces methods of single objects temporarily, in one thread.

No class is patched. Other threads that use the objects meanwhile get the original
methods.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# One block at a time: two that shadow the same object would undo each other's work.
_shadowing = threading.RLock()


@contextlib.contextmanager
def shadowed(
    find: Callable[[], Sequence[Any]],
    methods_of: Callable[[Any], Mapping[str, Callable]],
) -> Iterator[Sequence[Any]]:
    """Replaces methods of objects for the duration of the block, in this thread.

    Yields the objects; those created in the block are not among them.

    Args:
        find: Returns the objects.
        methods_of: Returns the methods that replace an object's own, by name. Methods
            that are already shadowed stay as they are.
    """
    owner = threading.get_ident()
    with _shadowing:
        replaced: list[tuple[Any, str]] = []
        try:
            found = find()
            for thing in found:
                for name, method in methods_of(thing).items():
                    if name in vars(thing):
                        continue
                    own = _only_in(owner, method, getattr(thing, name))
                    object.__setattr__(thing, name, own)
                    replaced.append((thing, name))
            yield found
        finally:
            for thing, name in replaced:
                object.__delattr__(thing, name)


def _only_in(thread: int, method: Callable, stock: Callable) -> Callable:
    def either(*args, **kwargs):
        if threading.get_ident() == thread:
            return method(*args, **kwargs)
        return stock(*args, **kwargs)

    return either
