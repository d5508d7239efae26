"""Exits a process whose main thread is stuck in a native call."""

import os
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

_LAST_WORDS = 10.0  # seconds

_T = TypeVar("_T")


def at_once(
    code: int,
    last_words: Callable[[], object],
    *,
    exit: Callable[[int], object] = os._exit,
) -> None:
    """Calls `last_words` for at most 10 s, then exits this process.

    `last_words` may write to a file system or a pipe that blocks. Other threads keep
    running meanwhile.

    Args:
        code: the exit code.
        last_words: called in a separate thread.
        exit: ends the process without unwinding anything.
    """
    try:
        within(_LAST_WORDS, last_words)
    finally:
        exit(code)


def within(seconds: float, do: Callable[[], _T]) -> _T | None:
    """Returns the result of `do()`; None if it takes longer or fails.

    An error is printed with its traceback.
    """
    done: list[_T] = []

    def run() -> None:
        try:
            done.append(do())
        except Exception:
            traceback.print_exc()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done[0] if done else None
