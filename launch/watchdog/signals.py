"""Makes SIGTERM and Ctrl-C end a process even if its main thread hangs.

Python runs a signal handler between two instructions of the main thread, so not while
that waits in TensorFlow for a missing worker. A second thread therefore learns of
signals as well, and ends the process if the handler does not run.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from launch.watchdog import forced_exit

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 5.0  # seconds; `docker stop` sends SIGKILL after 10
SAVING = 25.0  # seconds to save, once asked to; clusters mostly allow 30
_AT_ONCE = 1.0  # seconds, once a second signal has come
_POLL = 0.05  # seconds
_HANGS = "in a call that does not return"
# Seconds within which a second signal is the first one again: `timeout`, for one, sends
# it to a process and to its group.
SAME_SIGNAL = 0.5


class Signals:
    """The signals to this process, and what they do.

    Args:
        saving: how many seconds what was asked has, see `time_to_save`.
    """

    def __init__(self, saving: float = SAVING) -> None:
        self._saving = saving
        self._ask: Callable[[int], object] | None = None
        self._first: float | None = None  # when the first one came
        self._told = 0  # how many signals a thread has heard of
        self._handled = 0  # how often Python has called the handler
        self._raised = False  # whether one has raised an error in the main thread
        self._asked = False
        self.was_terminated = False

    @contextlib.contextmanager
    def asking(self, ask: Callable[[int], object]) -> Iterator[None]:
        """Within it, the first signal calls `ask` with the exit code, and raises none.

        What was asked has `time_to_save` to end the process. A second signal raises at
        once.
        """
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def handle(self, number: int, frame: object) -> None:
        """Python's handler, which runs in the main thread."""
        self._handled += 1
        if self._asked and self._is_the_same():
            return
        if self._ask is not None and not self._asked:
            self._asked, self._first = True, time.monotonic()
            self._ask(_code(number))
        elif self._ask is None or max(self._told, self._handled) > 1:
            self._raised = True
            self.was_terminated = number != signal.SIGINT
            raise _exception(number)

    def _is_the_same(self) -> bool:
        return self._first is not None and (
            time.monotonic() - self._first < SAME_SIGNAL
        )

    def insist(
        self,
        number: int,
        record: Callable[[BaseException], object],
        patience: float,
    ) -> None:
        """Ends the process if the handler, or what it has asked, does not."""
        if self._asked and self._told and self._is_the_same():
            return
        self._told += 1
        began = time.monotonic()
        asks = self._ask is not None and self._told == 1
        if asks and not self._asked:  # The main thread may be long in native code.
            self._asked, self._first = True, time.monotonic()
            self._ask(_code(number))  # type: ignore[misc]
        elif self._told > 1:
            patience = min(patience, _AT_ONCE)
        # Only while this handler is installed: user code may have replaced it.
        while signal.getsignal(number) == self.handle and not self._raised:
            waiting = asks and self._ask is not None
            if asks and not waiting:  # It was in time.
                return
            limit = time_to_save(number, self._saving) if waiting else patience
            if time.monotonic() - began > limit:
                late = f"before it has saved: --stop_timeout={limit:g} has passed"
                _end(number, late if waiting else _HANGS, record)
            time.sleep(_POLL)


def time_to_save(number: int, seconds: float) -> float:
    """How many seconds a signal leaves to save.

    Slurm's SIGUSR1 comes as long before the SIGTERM of a job's end as the job has asked
    for: that one is the limit.
    """
    return math.inf if number == signal.SIGUSR1 else seconds


@contextlib.contextmanager
def raised(
    record: Callable[[BaseException], object] = lambda error: None,
    *,
    patience: float = _PATIENCE,
    saving: float = SAVING,
) -> Iterator[Signals]:
    """Makes SIGTERM and SIGUSR1 raise `SystemExit(143)`, Ctrl-C `KeyboardInterrupt`.

    This lets the process clean up, and save what it has; see `Signals.asking`. If the
    main thread does not raise it within `patience`, the process exits without cleanup,
    with code 143 or 130. Signals that are ignored, or have another handler, are left
    alone.

    Call it from the main thread.

    Args:
        record: called before such an exit, with the error that could not be raised.
        patience: how many seconds the main thread has to raise it.
        saving: how many seconds what is asked instead has; see `time_to_save`.
    """
    signals = Signals(saving)

    def insist(number: int) -> None:
        arguments = (number, record, patience)
        threading.Thread(target=signals.insist, args=arguments, daemon=True).start()

    try:
        with _handled(signals.handle), _told_of_signals(insist):
            yield signals
    except Exception as error:
        if signals.was_terminated:  # TensorFlow may have turned it into another error
            raise SystemExit(_code(signal.SIGTERM)) from error
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
            if signal.getsignal(number) == handle:
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


def _end(number: int, why: str, record: Callable[[BaseException], object]) -> None:
    name = signal.Signals(number).name

    def last_words() -> None:
        print(f"launch: ended by {name}, {why}", file=sys.stderr, flush=True)
        record(_exception(number))

    forced_exit.at_once(_code(number), last_words)


def _exception(number: int) -> BaseException:
    interrupted = number == signal.SIGINT
    return KeyboardInterrupt() if interrupted else SystemExit(_code(number))


def _code(number: int) -> int:
    """The exit code: Slurm's SIGUSR1 announces the SIGTERM of a job's end."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
