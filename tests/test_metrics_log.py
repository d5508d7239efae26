"""`metrics.jsonl` has every epoch once, whatever has stopped the training before."""

import json
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distfit
from launch.errors import RunError
from launch.run.metrics_log import MetricsLog


def new(path):
    return MetricsLog(path, distfit.callbacks.NonFinite())


def epochs(path):
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


def run(log, first, last):
    for epoch in range(first, last):
        log.on_epoch_begin(epoch)
        log.on_epoch_end(epoch, {"loss": 1.0 / (epoch + 1)})


@mock.patch("os.fsync", mock.Mock())  # It takes most of the time.
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_every_epoch_is_there_once(tmp_path_factory, stops):
    """Each stop loses what was written after the checkpoint it goes on from."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log, done = new(path), 0
    for saved, lost in stops:
        run(log, done, done + saved)
        done += saved
        state = log.get_state()
        run(log, done, done + lost)
        log = new(path)
        log.set_state(json.loads(json.dumps(state)))
    run(log, done, done + 1)
    assert epochs(path) == list(range(1, done + 2))


def test_a_half_written_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = new(path)
    run(log, 0, 2)
    with path.open("a") as file:
        file.write('{"epoch": 3, "sec')
    again = new(path)
    again.set_state(log.get_state())
    run(again, 2, 3)
    assert epochs(path) == [1, 2, 3]


def test_a_new_training_replaces_the_file_with_its_first_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run(new(path), 0, 3)
    again = new(path)
    again.on_train_begin()
    assert epochs(path) == [1, 2, 3]
    run(again, 0, 1)
    assert epochs(path) == [1]


def test_batches_that_were_left_out_are_named(tmp_path):
    log = new(tmp_path / "metrics.jsonl")
    log._non_finite.skipped = [[1, 4], [2, 7]]
    run(log, 0, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line).get("skipped_steps") for line in lines]
    assert found == [[4], [7], None]


def test_workers_that_do_not_write_have_the_same_state(tmp_path):
    logs = [new(tmp_path / "metrics.jsonl"), new(None)]
    for log in logs:
        run(log, 0, 2)
    one, other = (log.get_state() for log in logs)
    assert one["lines"] == other["lines"] == 2
    assert one["seconds of the epoch"] == pytest.approx(
        other["seconds of the epoch"], abs=1.0
    )


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path, is_new):
    path = tmp_path / "metrics.jsonl"
    log = new(path)
    if is_new:
        path.mkdir()
        cause = "Is a directory"
    else:
        run(log, 0, 1)
        path.unlink()
        path.symlink_to("/dev/full")
        cause = "No space left on device"
    with pytest.raises(RunError) as caught:
        run(log, 1, 2)
    assert str(caught.value) == (
        f"A result cannot be written ({cause}). Received: {path}. Once that is mended, "
        "the same command goes on from the last checkpoint, if there is one."
    )
