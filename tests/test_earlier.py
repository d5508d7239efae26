"""What an earlier run has left decides whether a run goes on, has finished, may not."""

import json

import numpy as np
import pytest

from distfit.training import checkpoint
from launch.errors import UsageError
from launch.run import earlier, saving
from launch.settings import configuration


def config(folder, **settings):
    made = configuration.defaults()
    made.update({"workdir": str(folder), "epochs": 3, **settings})
    return made


def leave(folder, epochs_done=None, stops=False, model=True, **settings):
    """Makes the files of an earlier run."""
    configuration.write(config(folder, **settings))
    if model:
        (folder / saving.MODEL_FILE).write_bytes(b"a model")
    if epochs_done is not None:
        manifest = {"epoch": epochs_done, "stops": stops}
        checkpoint.write(
            folder / saving.CHECKPOINTS, 7, {"model/0": np.ones(2)}, manifest
        )


def test_nothing_is_in_the_way_in_a_new_folder_or_after_a_run_that_saved_nothing(
    tmp_path,
):
    assert not earlier.check(config(tmp_path))
    leave(tmp_path, model=False, seed=2)
    assert not earlier.check(config(tmp_path))


@pytest.mark.parametrize(
    "left, finished",
    [
        ({"epochs_done": 3}, True),
        ({"epochs_done": 4}, True),
        ({"epochs_done": 1, "stops": True}, True),
        ({"epochs_done": None}, True),
        ({"epochs_done": 2}, False),
        ({"epochs_done": 3, "model": False}, False),
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


def test_a_fresh_run_leaves_every_earlier_one_in_a_folder_of_its_own(tmp_path, capsys):
    for seed in (1, 2):
        leave(tmp_path, 3, seed=seed)
        earlier.set_aside(tmp_path)
        assert not earlier.check(config(tmp_path))
    earlier.set_aside(tmp_path)  # Nothing is left to move.
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {"earlier-1", "earlier-2"}
    for seed in (1, 2):
        aside = tmp_path / f"earlier-{seed}"
        assert json.loads((aside / configuration.FILE).read_text())["seed"] == seed
        assert (aside / saving.MODEL_FILE).exists()
        assert checkpoint.steps(aside / saving.CHECKPOINTS) == [7]
    assert capsys.readouterr().out.count("The earlier run is in ") == 2
