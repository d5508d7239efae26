"""Logs that cost nothing unless they are read."""

import functools
from collections.abc import Callable


class LazyLogs(dict):
    """Logs that are fetched from the devices on first access.

    They are a `dict` because some callbacks, such as TensorBoard, require one. It
    starts with a placeholder: C code, such as that of `json`, reads the length before
    the entries.

    Args:
        read: Returns the logs.
    """

    def __init__(self, read: Callable[[], dict]):
        super().__init__({"": None})
        self._read: Callable[[], dict] | None = read

    def read(self) -> None:
        """Reads the logs, unless that was done."""
        if self._read is not None:
            read, self._read = self._read, None
            super().clear()
            super().update(read())

    def __bool__(self) -> bool:
        return True

    def __reduce__(self):
        return dict, (dict(self),)


def _reads_first(method: Callable) -> Callable:
    @functools.wraps(method)
    def reading(self, *args, **kwargs):
        self.read()
        return method(self, *args, **kwargs)

    return reading


for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__"),
    *("__len__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__"),
    *("__setitem__", "clear", "copy", "get", "items", "keys", "pop", "popitem"),
    *("setdefault", "update", "values"),
):
    setattr(LazyLogs, _name, _reads_first(getattr(dict, _name)))
