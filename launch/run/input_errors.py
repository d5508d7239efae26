"""Tells data and settings that cannot be trained from a mistake in a model's code."""

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
    """Turns what distfit and Keras refuse into a `UsageError`, so without a traceback.

    An error with a line of the user's own code in its traceback passes as it is: there
    the traceback is what helps.

    Args:
        unless: whether work has begun, from when on nothing is refused any more.

    Raises:
        UsageError: with the message of the library.
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
