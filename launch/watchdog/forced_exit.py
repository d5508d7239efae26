"""Ends a process whose main thread cannot be asked to: it waits in a native call."""

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
    """Ends this process after its last words, without them if they take over 10 s.

    They may go to a file system or a pipe that blocks. The rest of the process goes on
    meanwhile.

    Args:
        code: the exit code.
        last_words: called in a thread of its own.
        exit: ends the process without unwinding anything.
    """
    try:
        within(_LAST_WORDS, last_words)
    finally:
        exit(code)


def within(seconds: float, do: Callable[[], _T]) -> _T | None:
    """Returns what `do()` returns, None if that takes longer or fails.

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
