"""The values of --model and --dataset: names in distfit, or functions of the user.

A function is written `package.module:function`. Names and modules are checked without
importing anything, so that a typo is reported before TensorFlow loads.
"""

import ast
import difflib
import functools
import importlib
import importlib.machinery
import importlib.util
import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from launch.errors import UsageError


def is_path(value: str) -> bool:
    """Whether `value` has the form `package.module:function`."""
    return ":" in value


@functools.cache
def declared(file: str, name: str = "NAMES") -> Any:
    """Returns a literal of a file of distfit, such as that of "models/__init__.py".

    It is parsed, not imported: importing any part of distfit imports TensorFlow.
    """
    spec = importlib.util.find_spec("distfit")
    if spec is None or spec.origin is None:
        raise UsageError(
            "distfit is not installed. Received: no package of that name. "
            "Install the package that provides this command."
        )
    source = pathlib.Path(spec.origin).parent.joinpath(file).read_text()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            if [ast.unparse(target) for target in statement.targets] == [name]:
                return ast.literal_eval(statement.value)
    raise LookupError(f"{file} assigns no literal {name}.")


def check(flag: str, value: str, names: Sequence[str]) -> None:
    """Raises a `UsageError` unless `value` is one of `names` or a path to a module."""
    if is_path(value):
        check_path(flag, value)
    else:
        check_name(flag, value, names, or_else="a path package.module:function")


def check_name(
    flag: str, value: str, names: Sequence[str], *, or_else: str | None = None
) -> None:
    """Raises a `UsageError` unless `value` is one of `names`."""
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        raise UsageError(
            f"Unknown {flag}. Received: --{flag}={value}. "
            + (f"Did you mean {near[0]}? " if near else "")
            + f"Choose one of {', '.join(names)}{f', or {or_else}' if or_else else ''}."
        )


def load_function(flag: str, value: str) -> Callable:
    """Imports the function that a path names.

    Raises:
        UsageError: the module fails to import, or has no such function.
    """
    module_name, _, function_name = value.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"The module of --{flag} fails to import: {type(error).__name__}: {error} "
            f"({place(error)}). Received: --{flag}={value}. "
            f"Make `import {module_name}` work in Python first."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"The module of --{flag} has no such function. "
            f"Received: --{flag}={value}. Define {function_name}(config) in "
            f"{module.__file__}."
        )
    return function


def place(error: Exception) -> str:
    """Returns the file and line that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def check_path(flag: str, value: str) -> None:
    """Raises a `UsageError` unless `value` is a path to a module that is there."""
    module, _, function = value.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise UsageError(
            f"--{flag} is not a path to a function. Received: --{flag}={value}. "
            "Write it as package.module:function."
        )
    if not _module_exists(module):
        raise UsageError(
            f"There is no module of that name. Received: --{flag}={value}. "
            f"Start the command in the folder that {module} is imported from, "
            "or install it."
        )


def _module_exists(name: str) -> bool:
    # Not find_spec(name): for a.b it imports a, which may import TensorFlow.
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = importlib.machinery.PathFinder.find_spec(
            f"{spec.name}.{part}", spec.submodule_search_locations
        )
    return spec is not None
