"""Where the time of a run went, over all its restarts: with made-up times."""

import json

import pytest

from launch import run_files
from launch.run.ledger import Ledger

# Of each start: when it began, failed and had ended. The next one begins 2 s later.
FAILURES = [(100, 112, 113), (115, 127, 128), (130, 150, 151)]
BEGAN = 153  # of the fourth, which takes 5 s to load


@pytest.fixture
def ledger(monkeypatch):
    def ledger(failures):
        if failures:
            monkeypatch.setenv(run_files.RESTART_VARIABLE, json.dumps(failures))
        return Ledger(BEGAN, BEGAN + 5, None)

    return ledger


def of_failures(ledger):
    found = ledger.so_far()
    parts = ("lost", "noticing", "waiting")
    return found["restarts"], *(found["seconds"][part] for part in parts)


def saved_at(time, **seconds):
    return {"seconds": seconds, "restarts": 1, "time": time}


def test_a_first_start_has_lost_nothing(ledger):
    assert of_failures(ledger([])) == (0, 0, 0, 0)


def test_all_failures_before_the_first_checkpoint_count(ledger):
    assert of_failures(ledger(FAILURES)) == (3, 12 + 12 + 20, 3, 6)


def test_failures_count_from_the_checkpoint_that_a_start_goes_on_from(ledger):
    """That has counted the first one. The second lost 7 s, the third all it did."""
    times = ledger(FAILURES)
    times.set_state(saved_at(120, waiting=2.0, noticing=1.0, lost=12.0, steps=4.0))
    assert of_failures(times) == (3, 12 + 7 + 20, 3, 6)
    assert times.so_far()["seconds"]["steps"] == 4
    assert times.so_far()["seconds"]["starting"] == 5


def test_what_a_checkpoint_has_counted_is_not_counted_by_the_next_start(ledger):
    first = ledger(FAILURES)
    state = first.get_state()
    again = ledger([*FAILURES, (BEGAN, state["time"] + 10, state["time"] + 11)])
    again._began = state["time"] + 13
    again.set_state(state)
    found = of_failures(again)
    assert found == pytest.approx((4, 44 + 10, 3 + 1, 6 + 2), abs=1e-3)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_rollback_counts_nothing_twice(ledger, goes_on):
    times = ledger(FAILURES)
    state = saved_at(120, steps=4.0) if goes_on else times.get_state()
    if goes_on:
        times.set_state(state)
    before = times.so_far()
    times.set_state(state)
    assert times.so_far() == before
