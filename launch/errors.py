"""Errors that need no traceback: their message is one line that says it all."""

import pathlib


class UsageError(Exception):
    """Flags, a configuration or a file that no run can start with.

    Exit code 2. The message says what is wrong, `Received: name=value`, what to do.
    """


class RunError(Exception):
    """What ends a run that has begun, and is no mistake in its code: a full disk, say.

    Exit code 1.
    """


def unwritten(file: pathlib.Path, error: OSError) -> RunError:
    """The error for a result that cannot be written any more."""
    return RunError(
        f"A result cannot be written ({error.strerror or error}). Received: {file}. "
        "Once that is mended, the same command goes on from the last checkpoint, if "
        "there is one."
    )
