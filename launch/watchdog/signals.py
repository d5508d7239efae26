"""Makes SIGTERM and Ctrl-C end a process even if its main thread hangs.

Python runs a signal handler between two instructions of the main thread, so not while
that waits in TensorFlow for a missing worker. A second thread therefore learns of
signals as well, and ends the process if the handler does not run.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from launch.watchdog import forced_exit

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 5.0  # seconds; `docker stop` sends SIGKILL after 10
_POLL = 0.05  # seconds


@contextlib.contextmanager
def raised(
    record: Callable[[BaseException], object] = lambda error: None,
    *,
    patience: float = _PATIENCE,
) -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit(143)`, and Ctrl-C `KeyboardInterrupt`.

    This lets the process clean up, and save what it has. If the main thread does not
    raise it within `patience`, the process exits without cleanup, with code 143 or 130.
    Signals that are ignored, or have another handler, are left alone.

    Call it from the main thread.

    Args:
        record: called before such an exit, with the error that could not be raised.
        patience: how many seconds the main thread has to raise it.
    """
    heard: set[int] = set()

    def handle(number: int, frame: object) -> None:
        heard.add(number)
        raise _exception(number)

    def insist(number: int) -> None:
        deadline = time.monotonic() + patience
        # Only while this handler is installed: user code may have replaced it.
        while signal.getsignal(number) is handle and number not in heard:
            if time.monotonic() > deadline:
                _end(number, record)
            time.sleep(_POLL)

    try:
        with _handled(handle), _told_of_signals(insist):
            yield
    except Exception as error:
        if signal.SIGTERM in heard:  # TensorFlow may have turned it into another error
            raise _exception(signal.SIGTERM) from error
        raise


@contextlib.contextmanager
def _handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Installs `handle` for the signals that have Python's default handler."""
    former = {
        number: signal.signal(number, handle)
        for number in _NUMBERS
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    }

    def restore() -> None:
        for number, handler in former.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)

    # Runs in the child before let_go(), which unblocks signals there.
    os.register_at_fork(after_in_child=restore)
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def _told_of_signals(tell: Callable[[int], None]) -> Iterator[None]:
    """Calls `tell`, in a thread, with each signal that this process receives.

    A forked child, such as one that loads data, inherits the pipe. Its signals must not
    arrive here, so they stay blocked until it has let go of the pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # Python itself writes to it, in its C handler
    masks = threading.local()  # signal masks of threads that fork

    def listen() -> None:
        while number := os.read(reading, 1)[0]:
            tell(number)

    def hold_back() -> None:
        masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)

    def let_come() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.former)

    def let_go() -> None:
        current = signal.set_wakeup_fd(-1)
        if current != writing:
            signal.set_wakeup_fd(current)
        let_come()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    os.register_at_fork(
        before=hold_back, after_in_parent=let_come, after_in_child=let_go
    )
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.write(writing, bytes(1))  # no signal has the number 0
        thread.join()
        os.close(reading)
        os.close(writing)


def _end(number: int, record: Callable[[BaseException], object]) -> None:
    name = signal.Signals(number).name

    def last_words() -> None:
        text = f"launch: ended by {name}, in a call that does not return"
        print(text, file=sys.stderr, flush=True)
        record(_exception(number))

    forced_exit.at_once(128 + number, last_words)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
