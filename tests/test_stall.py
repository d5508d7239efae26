"""Which worker holds the others up, and when a watchdog ends a worker."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch import run_files
from launch.supervisor import root_cause
from launch.watchdog import forced_exit, progress, stall
from launch.watchdog.progress import Progress

ROOT = pathlib.Path(__file__).parents[1]
IN, BETWEEN = stall.IN_STEP, stall.BETWEEN_STEPS


def at(worker, step, phase, entered, alive=100.0, reading=False):
    return Progress(worker, step, phase, entered, 50.0, alive, 1234, "a-host", reading)


PLACES = {
    "one between steps": (
        [at(0, 58, IN, 58), at(1, 57, BETWEEN, 57), at(2, 58, IN, 58)],
        "worker 1 between steps after step 57, while workers 0, 2 wait in step 58",
    ),
    "two behind": (
        [at(0, 58, IN, 58), at(1, 57, BETWEEN, 57), at(2, 57, "saving", 57)],
        "worker 1 between steps after step 57 and worker 2 saving after step 57, "
        "while worker 0 waits in step 58",
    ),
    "executions of ten steps": (
        [at(0, 21, IN, 3), at(1, 20, BETWEEN, 2)],
        "worker 1 between steps after step 20, while worker 0 waits in step 21",
    ),
    "before the first step": (
        [at(0, 1, IN, 1), at(1, 0, "preparing", 0)],
        "worker 1 preparing, while worker 0 waits in step 1",
    ),
    "before the model is built": (
        [at(0, 0, progress.BEFORE_STEPS, 3), at(1, 0, progress.MAKING_DATA, 1)],
        "worker 1 making the data, while worker 0 waits before the first step",
    ),
    "some have not joined": (
        [at(0, 0, progress.waiting_for([1]), 0), at(1, 0, progress.JOINING, 0)],
        "worker 0 waiting for worker 1 to join and worker 1 waiting to join the others "
        "at the same time",
    ),
    "all equally far": (
        [at(i, 58, IN, 58) for i in range(3)],
        "workers 0, 1, 2 in step 58 at the same time",
    ),
    "one whose data do not come": (
        [at(0, 58, IN, 58), at(1, 58, IN, 58, reading=True)],
        "worker 1 in step 58, making its data, while worker 0 waits in step 58",
    ),
    "all make data": (
        [at(i, 58, IN, 58, reading=True) for i in range(2)],
        "workers 0, 1 in step 58 at the same time",
    ),
    "alone": ([at(0, 58, IN, 58)], "worker 0 in step 58"),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_worker_that_did_not_come_is_named(case):
    found, expected = PLACES[case]
    places = {p.worker: p for p in found}
    assert progress.explain(places, len(found), silence=30) == expected


def test_a_worker_that_is_silent_is_named_though_it_is_as_far():
    found = {0: at(0, 58, IN, 58), 1: at(1, 58, IN, 58, alive=60.0)}
    text = progress.explain(found, 2, silence=30)
    assert text.startswith("worker 1 not responding since ")
    assert text.endswith("(process 1234 on a-host), while worker 0 waits in step 58")
    assert "not responding" not in progress.explain(found, 2, silence=50)


def test_one_that_joins_waits_for_the_one_that_is_silent():
    waits = at(0, 0, progress.waiting_for([1, 2]), 0)
    found = {0: waits, 1: at(1, 0, "preparing", 0, alive=60.0)}
    text = progress.explain(found, 2, silence=30)
    assert text.endswith(", while worker 0 waits for workers 1, 2 to join")


def test_without_files_of_others_a_worker_tells_where_it_is_itself():
    text = progress.explain({1: at(1, 58, IN, 58)}, 3, silence=30)
    unknown = "workers 0, 2 without a progress file in the working folder"
    assert text == f"worker 1 in step 58, {unknown}"


def test_progress_is_read_as_it_was_written(tmp_path):
    progress.write(tmp_path, at(1, 3, IN, 3))
    assert progress.read(tmp_path, 1) == at(1, 3, IN, 3)
    assert progress.read(tmp_path, 0) is None
    run_files.progress(tmp_path, 1).write_text('{"worker": 1}')
    assert progress.read(tmp_path, 1) is None


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Watched:
    """A watchdog without threads, with a clock and an exit that the test controls."""

    def __init__(self, workdir, index=0, num_workers=2, timeout=10.0):
        self.clock = Clock()
        self.codes = []
        self.dog = stall.Watchdog(
            workdir,
            index,
            num_workers,
            timeout,
            clock=self.clock,
            exit=self.codes.append,
            poll=0.5,
        )

    def pass_time(self, seconds):
        for _ in range(int(seconds * 2)):
            self.clock.now += 0.5
            self.dog.write()
            self.dog.look()
            if self.codes:
                break


def test_no_note_for_the_timeout_ends_the_worker_and_is_recorded(tmp_path, capfd):
    watched = Watched(tmp_path)
    progress.write(tmp_path, dataclasses.replace(at(1, 7, BETWEEN, 7), alive=4e9))
    for step in range(1, 9):
        watched.dog.note(step, IN)
    watched.pass_time(9)
    assert watched.codes == []
    watched.pass_time(3)
    assert watched.codes == [1]
    found = root_cause.read(tmp_path, 0)
    assert (found.type, found.code, found.traceback) == ("StallError", 1, "")
    assert found.message.startswith("No progress for 10 s. Received: ")
    assert not found.follows
    err = capfd.readouterr().err
    assert "test_stall.py" in err  # the stacks
    assert err.endswith(f"launch: {found.message}\n")


def test_the_stages_before_the_first_step_are_told_apart(tmp_path):
    waits, works = Watched(tmp_path, index=0), Watched(tmp_path, index=1)
    for phase in (progress.MAKING_DATA, progress.BUILDING, progress.BEFORE_STEPS):
        waits.dog.note(0, phase)
    works.dog.note(0, progress.MAKING_DATA)
    works.dog.note(0, progress.BUILDING)
    works.pass_time(1)
    waits.pass_time(11)
    assert (
        "Received: worker 1 building the model, while worker 0 waits before the first "
        "step. See" in root_cause.read(tmp_path, 0).message
    )


def test_who_waits_for_others_to_join_says_so_and_which_were_seen(tmp_path):
    watched = Watched(tmp_path, num_workers=3)
    seen = at(1, 0, progress.waiting_for([2]), 0, alive=4e9)
    progress.write(tmp_path, seen)
    watched.dog.note(0, progress.waiting_for([2]))
    watched.pass_time(11)
    message = root_cause.read(tmp_path, 0).message
    assert "workers 0, 1 waiting for worker 2 to join, worker 2 without a" in message
    assert message.endswith("start late, have ended for good, or not reach each other.")


def test_what_a_worker_of_a_former_run_has_left_says_nothing(tmp_path):
    left = dataclasses.replace(at(1, 7, BETWEEN, 7), alive=time.time() - 60)
    progress.write(tmp_path, left)
    watched = Watched(tmp_path)
    watched.pass_time(11)
    assert "worker 1 without a progress file" in root_cause.read(tmp_path, 0).message


def test_a_worker_removes_what_it_left_in_a_former_run_itself(tmp_path):
    run_files.clear_worker(tmp_path, 0)
    for index in range(2):
        progress.write(tmp_path, at(index, 7, BETWEEN, 7))
        root_cause.record(tmp_path, index, ValueError("wrong"), 1)
    run_files.clear_worker(tmp_path, 0)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "worker-1.error.json",
        "worker-1.progress.json",
    }


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "log, expected",
    [
        (None, ("the stacks in stderr:", "the stacks in each worker's stderr:")),
        (
            "/a/logs/worker-0.log",
            ("in /a/logs/worker-0.log:", "in /a/logs/worker-*.log:"),
        ),
    ],
)
def test_the_message_says_where_the_stacks_are(
    tmp_path, monkeypatch, log, expected, num_workers
):
    monkeypatch.delenv("DISTFIT_WORKER_LOG", raising=False)
    if log is not None:
        monkeypatch.setenv("DISTFIT_WORKER_LOG", log)
    watched = Watched(tmp_path, num_workers=num_workers)
    watched.pass_time(11)
    assert expected[num_workers - 1] in root_cause.read(tmp_path, 0).message


def test_a_process_without_peers_says_where_it_is_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(stall, "_makes_data", lambda: True)
    watched = Watched(tmp_path, num_workers=1)
    watched.dog.note(3, IN)
    watched.pass_time(11)
    message = root_cause.read(tmp_path, 0).message
    assert "Received: in step 3, making its data. See" in message


def test_notes_keep_a_worker_alive(tmp_path):
    watched = Watched(tmp_path)
    for step in range(20):
        watched.dog.note(step, BETWEEN)
        watched.pass_time(6)
    assert watched.codes == []


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    watched = Watched(tmp_path)
    watched.pass_time(2)
    watched.clock.now += 3600
    watched.dog.look()
    assert watched.codes == []
    watched.pass_time(10)
    assert watched.codes == [1]


def test_the_file_says_how_far_the_worker_is_and_that_it_is_alive(tmp_path):
    watched = Watched(tmp_path, index=1)
    watched.dog.note(1, IN)
    watched.dog.note(1, BETWEEN)
    watched.dog.note(2, IN)
    watched.pass_time(1)
    first = progress.read(tmp_path, 1)
    assert (first.step, first.phase, first.entered) == (2, IN, 2)
    watched.pass_time(5)
    later = progress.read(tmp_path, 1)
    assert later.alive > first.alive and later.time == first.time


def test_the_file_is_written_at_most_once_a_second(tmp_path, monkeypatch):
    times = []
    watched = Watched(tmp_path)
    monkeypatch.setattr(progress, "write", lambda *_: times.append(watched.clock.now))
    for step in range(20):
        watched.dog.note(step, IN)
        watched.pass_time(0.5)
    assert len(times) == 10


def test_a_folder_that_cannot_be_written_is_said_once_and_not_fatal(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file in the way")
    watched = Watched(tmp_path)
    watched.pass_time(8)
    assert capsys.readouterr().err.count("cannot write progress") == 1
    watched.pass_time(8)
    assert watched.codes == [1]


def test_without_a_folder_a_worker_still_ends(capfd):
    watched = Watched(None)
    watched.dog.note(3, IN)
    watched.pass_time(11)
    assert watched.codes == [1]
    assert "worker 0 in step 3" in capfd.readouterr().err


@pytest.mark.parametrize("timeout", [0, None])
def test_without_a_timeout_there_is_no_thread(tmp_path, timeout):
    with stall.Watchdog(tmp_path, 0, 2, timeout) as dog:
        dog.note(1, IN)
        assert dog._threads == []
    assert not (tmp_path / "logs").exists()


def test_the_threads_watch_and_end_with_the_context(tmp_path, capfd):
    codes = []
    with stall.Watchdog(tmp_path, 0, 1, 0.1, exit=codes.append, poll=0.02) as dog:
        while not codes:
            pass
    assert not any(thread.is_alive() for thread in dog._threads) and codes[0] == 1
    assert progress.read(tmp_path, 0) is not None


def test_a_folder_that_hangs_when_read_is_said_and_keeps_nobody(tmp_path, capfd):
    path = run_files.progress(tmp_path, 1)
    path.parent.mkdir()
    os.mkfifo(path)  # opening it blocks until somebody writes
    watched = Watched(tmp_path)
    watched.dog.note(3, IN)
    watched.pass_time(11)
    assert watched.codes == [1]
    err = capfd.readouterr().err
    assert f"worker 0 in step 3; the folder {tmp_path} does not respond. See" in err


def test_a_folder_that_hangs_when_written_keeps_nobody(tmp_path, monkeypatch, capfd):
    hangs, codes = threading.Event(), []

    def write(*_):
        hangs.wait(60)

    monkeypatch.setattr(progress, "write", write)
    monkeypatch.setattr(root_cause, "record", write)
    monkeypatch.setattr(forced_exit, "_LAST_WORDS", 0.5)
    began = time.monotonic()
    with stall.Watchdog(tmp_path, 0, 2, 0.2, exit=codes.append, poll=0.02):
        while not codes:
            time.sleep(0.01)
    assert codes[0] == 1 and time.monotonic() - began < 10
    assert "No progress for 0.2 s" in capfd.readouterr().err
    hangs.set()


def run(script, **options):
    return subprocess.run(
        [sys.executable, "-c", "from launch.watchdog import stall\n" + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_a_native_call_that_lets_no_thread_run_ends_with_stacks():
    result = run(
        "import ctypes\n"
        "stall._LATER_IN_C = 0\n"
        "with stall.Watchdog(None, 0, 2, 1.0) as dog, dog.in_native_call():\n"
        "    ctypes.PyDLL(None).sleep(50)  # and keeps the interpreter's lock\n"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Timeout (0:00:01)!"), result.stderr


def test_a_native_call_that_returns_is_watched_no_longer():
    result = run(
        "import time\n"
        "stall._LATER_IN_C = 0\n"
        "dog = stall.Watchdog(None, 0, 2, 0.5)\n"
        "with dog.in_native_call():\n"
        "    pass\n"
        "time.sleep(1)\n"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_crash_is_told_while_stderr_is_replaced():
    result = run(
        "import os, tempfile\n"
        "stall.enable_stack_dumps()\n"
        "with tempfile.TemporaryFile() as held:\n"
        "    os.dup2(held.fileno(), 2)\n"
        "    os.abort()\n"
    )
    assert result.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in result.stderr
