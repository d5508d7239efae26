"""Separates bad data and settings from mistakes in a model's code."""

import contextlib
import importlib.util
import pathlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator

from launch.errors import UsageError

_LIBRARIES = ("distfit", "launch", "keras", "tensorflow", "ml_collections", "numpy")


@contextlib.contextmanager
def as_usage_errors(unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turns errors of distfit and Keras into a `UsageError`, shown without a traceback.

    An error whose traceback contains user code passes unchanged: it needs the
    traceback.

    Args:
        unless: whether work has begun; errors pass unchanged from then on.

    Raises:
        UsageError: with the library's message.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if unless() or not _is_of_libraries(error):
            raise
        raise UsageError(str(error)) from error


def _is_of_libraries(error: Exception) -> bool:
    folders = [pathlib.Path(sysconfig.get_path("stdlib"))]
    for name in _LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folders.append(pathlib.Path(spec.origin).parent)
    return all(
        any(folder in pathlib.Path(frame.filename).parents for folder in folders)
        for frame in traceback.extract_tb(error.__traceback__)
    )
