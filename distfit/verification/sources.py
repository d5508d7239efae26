"""Where in the user's code something happens."""

import ast
import inspect
import pathlib
import sysconfig
import textwrap
import traceback
from collections.abc import Iterable

import keras
import numpy as np
import optree
import tensorflow as tf

_DISTFIT = pathlib.Path(__file__).parents[1]
# Whatever lies here is not the user's; the reference models stand for a user's code.
_LIBRARIES = (
    *(f"{pathlib.Path(inspect.getfile(m)).parent}/" for m in (keras, tf, np, optree)),
    f"{_DISTFIT}/",
    f"{_DISTFIT.parent / 'launch'}/",
)
_PYTHON = f"{sysconfig.get_path('stdlib')}/"
_PACKAGES = f"{sysconfig.get_path('purelib')}/"
_EXAMPLES = f"{_DISTFIT / 'models'}/"
# The file whose frames separate the step from whoever has it inspected.
_TRACER = str(_DISTFIT / "probe.py")


def is_users(filename: str) -> bool:
    """Whether a file belongs neither to the libraries nor to Python itself."""
    if filename.startswith(_EXAMPLES):
        return True
    of_python = filename.startswith(_PYTHON) and not filename.startswith(_PACKAGES)
    return not (of_python or filename.startswith(("<", *_LIBRARIES)))


def place_in(
    frames: Iterable[traceback.FrameSummary], skip: str | None = None
) -> str | None:
    """`file:line` of the innermost of the user's frames inside of a traced step.

    Args:
        frames: A stack, from the outermost frame; one without a step counts as a whole.
        skip: Name of functions to look past.
    """
    for frame in reversed(_inside_step(frames)):
        if is_users(frame.filename) and frame.name != skip:
            return f"{frame.filename}:{frame.lineno}"
    return None


def place_of_error(error: BaseException) -> str | None:
    """`file:line` of the user's code that an exception came through."""
    return place_in(traceback.extract_tb(error.__traceback__))


def calling_place(skip: str | None = None) -> str | None:
    """`file:line` of the user's code that is running in a traced step."""
    return place_in(traceback.extract_stack(), skip)


def direct_caller() -> str | None:
    """`file:line` of whoever called the function that asks this, if it is the user."""
    frame = traceback.extract_stack(limit=3)[0]
    return f"{frame.filename}:{frame.lineno}" if is_users(frame.filename) else None


def called_by(function: str) -> bool:
    """Whether a function of that name is running in a traced step."""
    frames = _inside_step(traceback.extract_stack())
    return any(frame.name == function for frame in frames)


def place_of_attribute(cls: type, name: str) -> str | None:
    """`file:line` where a method of the user's class first changes `self.name`."""
    for owner in cls.__mro__:
        try:
            file = inspect.getsourcefile(owner) or "<unknown>"
            lines, first = inspect.getsourcelines(owner)
        except (OSError, TypeError):  # Typed in, made by `type()`, or built in.
            continue
        if not is_users(file):
            continue
        tree = ast.parse(textwrap.dedent("".join(lines)))
        found = [
            getattr(node, "lineno", first)
            for method in ast.walk(tree)
            if isinstance(method, ast.FunctionDef)
            and method.name not in ("__init__", "build")
            for node in ast.walk(method)
            if _changes(node, name)
        ]
        if found:
            return f"{file}:{first + min(found) - 1}"
    return None


def _changes(node: ast.AST, name: str) -> bool:
    """Whether a node assigns `self.name`, or calls a method of it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _is_own(node.func.value, name)
    return _is_own(node, name) and isinstance(getattr(node, "ctx", None), ast.Store)


def _is_own(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _inside_step(frames: Iterable[traceback.FrameSummary]) -> list:
    frames = list(frames)
    tracers = [i for i, frame in enumerate(frames) if frame.filename == _TRACER]
    return frames[tracers[-1] + 1 :] if tracers else frames
