"""What an earlier run has left decides whether a run goes on, has finished, may not."""

import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from distfit.training import checkpoint
from launch import run_files
from launch.errors import RunError, UsageError
from launch.run import earlier, saving
from launch.settings import configuration


def config(folder, **settings):
    made = configuration.defaults()
    made.update({"workdir": str(folder), "epochs": 3, **settings})
    return made


def leave(folder, done=None, of_step=0, stops=False, model=3, **settings):
    """Makes the files of an earlier run.

    Its checkpoint, if `done`, is of so many epochs and steps of the next; its model, if
    any, is that of so many epochs.
    """
    configuration.write(config(folder, **settings))
    if model:
        (folder / saving.MODEL_FILE).write_bytes(b"a model")
        run_files.write_json(folder / saving.RECORD, {"epochs": model, "step": 7})
    if done is not None:
        manifest = {"epoch": done, "step of the epoch": of_step, "stops": [stops]}
        checkpoint.write(
            folder / saving.CHECKPOINTS, 7, {"model/0": np.ones(2)}, manifest
        )


def test_nothing_is_in_the_way_in_a_new_folder_or_after_a_run_that_saved_nothing(
    tmp_path,
):
    assert not earlier.check(config(tmp_path))
    leave(tmp_path, model=None, seed=2)
    assert not earlier.check(config(tmp_path))


@pytest.mark.parametrize(
    "left, finished",
    [
        ({"done": 3}, True),
        ({"done": 2, "stops": True, "model": 9}, True),  # It had stopped itself.
        ({"done": 1, "stops": True, "model": 2}, True),
        ({"done": None}, True),
        ({"done": 2, "model": 2}, False),
        ({"done": 3, "model": None}, False),
        ({"done": 3, "model": 1}, False),  # Killed before it could save the new one.
        ({"done": 0, "of_step": 5, "stops": True, "model": None}, False),
    ],
)
def test_a_run_has_finished_once_its_epochs_and_its_model_are_there(
    tmp_path, left, finished
):
    leave(tmp_path, **left)
    assert earlier.check(config(tmp_path)) == finished


def test_more_epochs_go_on_and_what_has_changed_is_named(tmp_path, capsys):
    leave(tmp_path, 3)
    assert not earlier.check(config(tmp_path, epochs=5, verbose=0))
    assert capsys.readouterr().out == (
        "Going on with other settings: epochs=5, which was 3, "
        "verbose=0, which was None.\n"
    )


def test_an_evaluation_names_what_it_does_in_another_way(tmp_path, capsys):
    leave(tmp_path, 3, dataset="mnist", seed=4)
    recorded = configuration.recorded(tmp_path)
    same = config(tmp_path / "moved", dataset="mnist", seed=4)
    earlier.tell_changes("Evaluating", recorded, same)
    assert capsys.readouterr().out == ""
    earlier.tell_changes("Evaluating", recorded, config(tmp_path, dataset="other"))
    assert capsys.readouterr().out == (
        "Evaluating with other settings: dataset='other', which was 'mnist', "
        "seed=1337, which was 4.\n"
    )


@pytest.mark.parametrize("name, value", [("learning_rate", 0.5), ("batch_size", 8)])
def test_other_settings_are_refused_and_nothing_is_changed(tmp_path, name, value):
    leave(tmp_path, 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=rf"Received: {name}={value}, which was"):
        earlier.check(config(tmp_path, **{name: value}))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_more_epochs_without_checkpoints_are_refused(tmp_path):
    leave(tmp_path)
    with pytest.raises(UsageError, match="no checkpoints to go on from"):
        earlier.check(config(tmp_path, epochs=5))


@pytest.mark.parametrize(
    "left, begun",
    [
        ({"done": 2, "of_step": 1, "model": None}, 3),
        ({"done": 2, "model": 2}, 2),
        ({"done": None, "model": 2}, 2),
    ],
)
def test_epochs_that_were_trained_cannot_be_taken_back(tmp_path, left, begun):
    """Nor is a model of two epochs that of one."""
    leave(tmp_path, **left)
    earlier.check(config(tmp_path, epochs=begun))
    text = f"epoch {begun} had begun. Give --epochs={begun} or more"
    for epochs in range(1, begun):
        with pytest.raises(UsageError, match=text):
            earlier.check(config(tmp_path, epochs=epochs))


class Thing:
    """Something that JSON cannot hold, and whose text has an address."""


def test_settings_without_a_text_of_their_own_are_the_same_again(tmp_path):
    leave(tmp_path, 2, model=None, thing=Thing(), rate=float("nan"))
    assert not earlier.check(config(tmp_path, thing=Thing(), rate=float("nan")))


def test_settings_that_an_earlier_version_did_not_have_had_their_defaults(tmp_path):
    leave(tmp_path, 2, model=None)
    file = tmp_path / configuration.FILE
    recorded = json.loads(file.read_text())
    del recorded["seed"], recorded["keep"]
    file.write_text(json.dumps(recorded))
    assert not earlier.check(config(tmp_path))


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    script = (
        "import pathlib, sys; from launch.run import earlier\n"
        "earlier.lock(pathlib.Path(sys.argv[1]))\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match="Another run is at work"):
            earlier.lock(tmp_path)
        other.kill()
    earlier.lock(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\x00"])
def test_results_without_readable_settings_are_refused(tmp_path, text):
    leave(tmp_path, 2)
    file = tmp_path / configuration.FILE
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UsageError, match="without its settings"):
        earlier.check(config(tmp_path))


def test_a_damaged_latest_checkpoint_is_passed_over(tmp_path):
    leave(tmp_path, 3)
    newer = tmp_path / saving.CHECKPOINTS / "step-9"
    newer.mkdir()
    (newer / checkpoint.MANIFEST).write_text("{")
    assert earlier.check(config(tmp_path))


def test_a_run_that_is_started_again_is_not_fresh_twice(tmp_path, monkeypatch):
    monkeypatch.setenv(run_files.RUN_VARIABLE, "a run")
    leave(tmp_path, 3)
    assert not earlier.was_set_aside(tmp_path)
    earlier.set_aside(tmp_path)
    assert earlier.was_set_aside(tmp_path)
    monkeypatch.setenv(run_files.RUN_VARIABLE, "another run")
    assert not earlier.was_set_aside(tmp_path)


@pytest.mark.parametrize("is_supervised", [False, True])
def test_logs_of_an_earlier_run_go_with_it_unless_the_supervisor_has_moved_them(
    tmp_path, monkeypatch, is_supervised
):
    if is_supervised:
        monkeypatch.setenv(run_files.LOG_VARIABLE, str(run_files.log(tmp_path, 0)))
    leave(tmp_path, 3)
    logs = {"logs-1/worker-0.log", "logs/worker-0.log", "logs/worker-1.log"}
    for name in logs:
        run_files.write_text(tmp_path / name, "said")
    earlier.set_aside(tmp_path)
    place = tmp_path if is_supervised else tmp_path / "earlier-1"
    found = {p for p in tmp_path.rglob("*.log")}
    assert found == {place / name for name in logs}


def test_a_fresh_run_leaves_every_earlier_one_in_a_folder_of_its_own(tmp_path, capsys):
    for seed in (1, 2):
        leave(tmp_path, 3, seed=seed)
        earlier.set_aside(tmp_path)
        assert not earlier.was_set_aside(tmp_path)  # No supervisor starts it again.
        assert not earlier.check(config(tmp_path))
    earlier.set_aside(tmp_path)  # Nothing is left to move.
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {"earlier-1", "earlier-2", "logs"}
    for seed in (1, 2):
        aside = tmp_path / f"earlier-{seed}"
        assert json.loads((aside / configuration.FILE).read_text())["seed"] == seed
        assert (aside / saving.MODEL_FILE).exists()
        assert checkpoint.steps(aside / saving.CHECKPOINTS) == [7]
    assert capsys.readouterr().out.count("The earlier run is in ") == 2


class Unsaved:
    """A model that finds the disk full."""

    def save(self, file):
        file.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_model_is_on_the_disk_before_and_after_it_is_renamed(tmp_path, monkeypatch):
    """As all results are; see test_root_cause.py."""
    renamed, replace = [], run_files.replace

    def note(draft, path):
        renamed.append(path.name)
        replace(draft, path)

    class Saved:
        def save(self, file):
            file.write_bytes(b"new")

    monkeypatch.setattr(run_files, "replace", note)
    assert saving.save(Saved(), tmp_path, 3, 7) == saving.MODEL_FILE
    assert renamed == [saving.MODEL_FILE, saving.RECORD]
    assert (tmp_path / saving.MODEL_FILE).read_bytes() == b"new"


@pytest.mark.parametrize("step, again", [(7, "saves it."), (None, "trains it anew, ")])
def test_a_model_that_cannot_be_saved_is_trained_again_only_without_checkpoints(
    tmp_path, step, again
):
    leave(tmp_path)
    with pytest.raises(RunError, match=f"No space left.*the same command {again}"):
        saving.save(Unsaved(), tmp_path, 3, step)
    assert (tmp_path / saving.MODEL_FILE).read_bytes() == b"a model"
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize(
    "number, expected, what",
    [
        (errno.ENOSPC, RunError, "No space left on device). Received: {0}/config.json"),
        (errno.EACCES, UsageError, "Permission denied). Received: --workdir={0}. "),
    ],
)
def test_a_full_disk_is_no_invalid_input_but_a_folder_that_is_closed_is(
    tmp_path, monkeypatch, number, expected, what
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(expected, match=re.escape(what.format(tmp_path))):
        configuration.write(config(tmp_path))
