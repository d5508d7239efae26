"""The error that ends a launch before any work: exit code 2."""


class UsageError(Exception):
    """Flags, a configuration or a file that no run can start with.

    The message is one line: what is wrong, `Received: name=value`, what to do.
    """
