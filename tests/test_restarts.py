"""When a run that has failed is started again: with made-up failures, no processes."""

import json
import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import run_files
from launch.run import saving
from launch.settings import configuration
from launch.supervisor import supervisor
from launch.supervisor.restarts import Restarts
from launch.supervisor.root_cause import End, Failure

KILLED = End(0, -9, 1.0)
PREEMPTED = End(1, 143, 1.0)
INVALID = End(0, 2, 1.0)


def error(step, message="wrong", type="ValueError"):
    return End(0, 1, 1.0, failure=Failure(0, 1.0, type, message, "", 1, step))


def test_without_restarts_there_are_none():
    restarts = Restarts(0)
    assert restarts.after(KILLED, 0) is None and restarts.reason == ""


def test_pauses_double_and_the_number_is_limited():
    restarts = Restarts(3)
    assert [restarts.after(KILLED, 0) for _ in range(4)] == [1.0, 2.0, 4.0, None]
    assert restarts.reason == "3 restarts without a later checkpoint"


def test_a_later_checkpoint_sets_the_count_back():
    restarts = Restarts(1)
    assert [restarts.after(KILLED, step) for step in (0, 5, 9, 9)] == [1, 1, 1, None]


def test_preemptions_have_a_count_of_their_own():
    restarts = Restarts(1)
    ends = [KILLED, PREEMPTED, KILLED]
    assert [restarts.after(end, 0) for end in ends] == [1.0, 1.0, None]


def test_invalid_input_ends_a_run():
    assert Restarts(5).after(INVALID, 0) is None


def test_the_same_error_at_the_same_step_twice_ends_a_run_whatever_was_saved():
    restarts = Restarts(5)
    assert restarts.after(error(7), 5) == 1.0
    assert restarts.after(error(7), 6) is None
    assert "the same error at the same place, step 7, twice" in restarts.reason


def test_other_errors_other_steps_and_what_lies_between_do_not():
    restarts = Restarts(5)
    for end in (error(7), error(8), error(8, "other"), KILLED, error(8, "other")):
        assert restarts.after(end, 0) is not None


def test_who_waits_in_vain_for_a_host_that_has_ended_for_good_ends_the_second_time():
    restarts = Restarts(5)
    waited = error(0, "No progress. Received: worker 1 waiting", "StallError")
    assert [restarts.after(end, 0) for end in (KILLED, waited, waited)] == [1, 2, None]


def test_an_error_that_follows_from_a_lost_worker_is_no_reason_of_its_own():
    restarts = Restarts(5)
    lost = error(7, "socket closed", "UnavailableError")
    assert [restarts.after(lost, 0) for _ in range(3)] == [1.0, 2.0, 4.0]


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(
            st.sampled_from([KILLED, PREEMPTED, error(1), error(2)]), st.integers(0, 3)
        ),
        max_size=60,
    ),
)
def test_it_ends_unless_there_is_progress(most, failures):
    """Between two later checkpoints there are at most `most` restarts of each kind."""
    restarts, best, since = Restarts(most), 0, 0
    for end, step in failures:
        if step > best:
            best, since = step, 0
        pause = restarts.after(end, step)
        if pause is None:
            return
        since += 1
        assert since <= 2 * most and 1.0 <= pause <= 60.0


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """`run(start, **options)`: the exit code, and what the supervisor has said.

    `start(n, environment)` takes the place of start number n of the workers: it
    returns how they ended.
    """
    monkeypatch.setattr("launch.supervisor.restarts._FIRST_PAUSE", 0.01)

    class Outputs:
        shown = b""

        def say(self, text):
            print(text, end="")

    def run(start, **options):
        groups = []

        def run_once(*arguments):
            *_, more, received, stop_timeout = arguments
            options = (received, False, stop_timeout)
            groups.append(supervisor._Group(tmp_path, Outputs(), *options))
            groups[-1]._ends = start(len(groups), more)
            return groups[-1]

        monkeypatch.setattr(supervisor, "_run_once", run_once)
        options = {"num_workers": 2, "max_restarts": 9, **options}
        return supervisor.run([], workdir=tmp_path, **options), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "number, code, last",
    [
        (signal.SIGINT, 130, "launch: interrupted"),
        (signal.SIGTERM, 143, "launch: terminated"),
    ],
)
def test_a_signal_between_two_starts_ends_a_run(run, number, code, last):
    def start(n, environment):
        os.kill(os.getpid(), number)
        return [KILLED]

    # If the tests run in the background, the signal may be ignored.
    former = signal.signal(number, signal.default_int_handler)
    try:
        ended, said = run(start)
        assert (ended, said.splitlines()[-1]) == (code, last)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, former)


def test_a_run_that_succeeds_after_a_failure_has_succeeded(run):
    code, said = run(lambda n, environment: [KILLED] if n < 3 else [])
    assert code == 0 and said.count("launch: starting again in ") == 2


def checkpoints(monkeypatch, folder, index, workdir):
    """The callback that saves, as a worker of a supervisor makes it."""
    log = str(run_files.log(folder, index))
    monkeypatch.setenv(run_files.LOG_VARIABLE, log)
    config = configuration.defaults()
    config.workdir = str(workdir)
    return saving.checkpoints(config)


def test_a_worker_tells_which_checkpoint_it_goes_on_from_and_which_it_has_saved(
    monkeypatch, tmp_path
):
    """On another host than the chief's it sees no checkpoint."""
    worker = checkpoints(monkeypatch, tmp_path, 1, tmp_path / "elsewhere")
    for step, is_saved, latest in ((3, False, 0), (5, True, 5), (8, True, 8)):
        worker.begin(step, 0, is_saved)
        assert run_files.latest_saved(tmp_path, [0, 1]) == latest
    assert run_files.latest_saved(tmp_path, [0]) == 0
    run_files.clear(tmp_path, "1")  # Before the next start.
    assert run_files.latest_saved(tmp_path, [0, 1]) == 0


def test_a_folder_that_cannot_be_written_ends_no_training(monkeypatch, tmp_path):
    (tmp_path / run_files.FOLDER).write_text("a file in the way")
    checkpoints(monkeypatch, tmp_path, 0, tmp_path).begin(5, 0)


def test_a_run_goes_on_as_long_as_its_worker_knows_of_later_checkpoints(
    run, monkeypatch, tmp_path
):
    def start(n, environment):
        worker = checkpoints(monkeypatch, tmp_path, 1, tmp_path / "elsewhere")
        worker.begin(min(n, 4), 0)
        return [End(1, -9, 1.0)]

    code, said = run(start, num_workers=None, index=1, max_restarts=1)
    assert code == 1 and said.count("starting again") == 4
    end = "launch: not started again: 1 restarts without a later checkpoint"
    assert said.splitlines()[-1] == end


def test_each_start_is_told_of_the_failures_before_it(run):
    told = []

    def start(n, environment):
        told.append(json.loads(environment.get(run_files.RESTART_VARIABLE, "[]")))
        return [End(0, -9, time.time())] if n < 4 else []

    run(start)
    assert [len(failures) for failures in told] == [0, 1, 2, 3]
    times = [time for failure in told[-1] for time in failure]
    assert times == sorted(times)
