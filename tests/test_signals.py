"""A signal raises in a responsive process, and ends one whose main thread hangs."""

import contextlib
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]

# `hang()` waits in C forever, and lets other threads run, as a collective does.
PROGRAM = """
import asyncio, ctypes, multiprocessing, os, signal, sys, time
from launch.watchdog import signals

def hang():
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):
        libc.pthread_mutex_lock(lock)

def ready():
    print("ready", flush=True)

def record(error):
    print("recorded", repr(error), flush=True)

saving = 25.0
{before}
try:
    with signals.raised(record, patience=1.0, saving=saving) as heard:
{body}
    print("left", signal.set_wakeup_fd(-1), flush=True)
except BaseException as error:
    print("raised", repr(error), flush=True)
    raise
"""


class Run:
    def __init__(self, body, before=""):
        body = "".join(f"        {line}\n" for line in body.strip().splitlines())
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(body=body, before=before)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # If the tests run in the background, children would ignore the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def send(self, number):
        """Sends a signal as soon as the program is ready for it."""
        assert self.process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # until it is in the call that follows
        self.process.send_signal(number)

    def end(self):
        """Returns the exit code, the output, and the seconds that it took."""
        began = time.monotonic()
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err, time.monotonic() - began


@pytest.fixture
def start():
    """`start(body)` starts the program; none is left afterwards."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            run = Run(*arguments)
            stack.callback(run.process.communicate)
            stack.callback(run.process.kill)
            return run

        yield start


@pytest.mark.parametrize("number, code", CODES)
def test_python_code_is_left_by_an_exception_and_cleans_up_at_leisure(
    start, number, code
):
    run = start(
        """
try:
    ready()
    time.sleep(60)
finally:
    time.sleep(2)
    print("saved", flush=True)
"""
    )
    run.send(number)
    ended, out, _, seconds = run.end()
    raised = "SystemExit(143)" if code == 143 else "KeyboardInterrupt()"
    assert out == f"saved\nraised {raised}\n"
    assert ended == (143 if code == 143 else -signal.SIGINT) and seconds > 1.8


@pytest.mark.parametrize("number, code", CODES)
def test_a_process_that_hangs_in_a_native_call_ends_and_is_recorded(
    start, number, code
):
    run = start("ready()\nhang()")
    run.send(number)
    ended, out, err, seconds = run.end()
    raised = "SystemExit(143)" if code == 143 else "KeyboardInterrupt()"
    name = signal.Signals(number).name
    assert (ended, out) == (code, f"recorded {raised}\n")
    assert err == f"launch: ended by {name}, in a call that does not return\n"
    assert 0.8 < seconds < 10


ASKED = """
asked = []
with {signals}.asking(lambda code: (asked.append(code), print("asked", flush=True))):
    ready()
    {then}
"""
WAIT = "[time.sleep(0.1) for _ in range({tenths})]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_what_asks_for_signals_is_asked_by_the_first_and_not_interrupted(start, number):
    body = ASKED.format(signals="heard", then=WAIT.format(tenths=20))
    run = start(body + "print(asked)")
    run.send(number)
    code, out, _, seconds = run.end()
    wanted = 130 if number == signal.SIGINT else 143
    assert code == 0 and out == f"asked\n[{wanted}]\nleft -1\n" and seconds > 1.3


def test_what_is_not_saved_in_time_is_lost_but_for_a_signal_ahead_of_time(start):
    body = ASKED.format(signals="heard", then=WAIT.format(tenths=40))
    runs = [start(body, "saving = 0.5") for _ in range(2)]
    for run, number in zip(runs, (signal.SIGTERM, signal.SIGUSR1), strict=True):
        run.send(number)
    code, _, err, seconds = runs[0].end()
    assert code == 143 and seconds < 3
    assert "ended by SIGTERM, before it has saved: --stop_timeout=0.5 has passed" in err
    code, out, err, _ = runs[1].end()
    assert code == 0 and out.endswith("left -1\n") and not err


def test_a_main_thread_in_native_code_is_asked_by_another_thread(start):
    """And has the time to save, not that of a process that hangs."""
    native = "ctypes.PyDLL(None).sleep(0) or hang_for(2)"
    before = "def hang_for(s): ctypes.CDLL(None).sleep(s)"
    body = ASKED.format(signals="heard", then=native)
    run = start(body + "print(asked)", before)
    run.send(signal.SIGTERM)
    code, out, _, _ = run.end()
    assert code == 0 and out == "asked\n[143]\nleft -1\n"


@pytest.mark.parametrize("then", [WAIT.format(tenths=200), "hang()"])
def test_a_second_signal_ends_at_once(start, then):
    run = start(ASKED.format(signals="heard", then=then))
    run.send(signal.SIGTERM)
    assert run.process.stdout.readline() == "asked\n"
    time.sleep(0.7)  # Within half a second it would be the first one again.
    run.process.send_signal(signal.SIGTERM)
    code, _, _, seconds = run.end()
    assert code == 143 and seconds < 5


def test_a_signal_that_is_sent_twice_at_once_is_one(start):
    run = start(ASKED.format(signals="heard", then=WAIT.format(tenths=20)) + "print()")
    run.send(signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.stdout.readline() == "asked\n"
    run.process.send_signal(signal.SIGTERM)
    code, out, _, _ = run.end()
    assert code == 0 and out == "\nleft -1\n"


def test_an_error_that_a_native_call_makes_of_the_signal_is_taken_back(start):
    run = start(
        """
try:
    ready()
    time.sleep(60)
except SystemExit:
    raise RuntimeError("of TensorFlow")
"""
    )
    run.send(signal.SIGTERM)
    code, out, _, _ = run.end()
    assert (code, out) == (143, "raised SystemExit(143)\n")


def test_a_handler_of_the_user_is_left_alone(start):
    run = start(
        """
signal.signal(signal.SIGTERM, lambda *_: print("theirs", flush=True))
ready()
time.sleep(2)
"""
    )
    run.send(signal.SIGTERM)
    code, out, _, seconds = run.end()
    assert code == 0 and out == "theirs\nleft -1\n" and seconds > 1.5


def test_a_signal_that_is_ignored_stays_ignored(start):
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    run = start("ready()\ntime.sleep(2)", ignore)
    run.send(signal.SIGINT)
    code, out, _, _ = run.end()
    assert code == 0 and out == "left -1\n"


def test_a_signal_to_a_forked_child_is_not_for_its_parent(start):
    run = start(
        """
context = multiprocessing.get_context("fork")
child = context.Process(target=time.sleep, args=(60,))
child.start()
child.terminate()
child.join()
print(child.exitcode)
time.sleep(1.5)
"""
    )
    code, out, _, _ = run.end()
    assert code == 0 and out == "-15\nleft -1\n"


def test_signal_handlers_of_asyncio_work_meanwhile(start):
    run = start(
        """
async def main():
    done = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, done.set)
    ready()
    await done.wait()
    print("theirs", flush=True)
asyncio.run(main())
time.sleep(1.5)
"""
    )
    run.send(signal.SIGTERM)
    code, out, _, _ = run.end()
    assert code == 0 and out == "theirs\nleft -1\n"
