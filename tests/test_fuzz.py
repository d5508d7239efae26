"""Whatever is given, or lies in a folder: it is read, or refused by the right error.

Of a folder of checkpoints nothing is changed but what a killed process left unfinished.
"""

import functools
import json
import shutil
import string

import numpy as np
import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distfit.cluster import workers
from distfit.models import gan
from distfit.training import checkpoint, resuming
from launch import run_files
from launch.cluster import discovery
from launch.errors import UsageError
from launch.run import earlier, saving
from launch.settings import configuration, flags

WORDS = [
    *("train", "evaluate", "--", "-", "=", "--epochs", "--epochs=", "--epochs=1e3"),
    *("--config", "--config=", "--config.a.b", "--config.epochs=3", "--noconfig.x"),
    *("--fresh", "--nofresh", "--fresh=maybe", "--max_restarts=0", "--keep=-1"),
    *("--workers=a:1", "--worker_index=9", "--model=a:b", "--monitor=", "-h=1"),
]
ARGUMENTS = st.lists(
    st.one_of(st.sampled_from(WORDS), st.text(max_size=12)), max_size=6
)
VALUES = ["mnist", "multi_worker", "__main__:f", ":", "1epoch", "\ud800", "a\nb", "\0"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["worker", "chief", "host:1", "localhost:99999"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["cluster", "task", "worker", "chief", "type", "index"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
DEEP = "[" * 100_000
NESTED = functools.reduce(lambda inner, _: {"a": inner}, range(400), 1)
# What a training may have left as its settings, or someone else.
RECORDED = st.dictionaries(
    st.sampled_from(list(configuration.defaults()))
    | st.sampled_from(["latent_dim", "items", "a.b", "", "__class__", "_fields"])
    | st.text(max_size=4),
    JSON | st.sampled_from([*VALUES, NESTED]),
    max_size=6,
)
fuzz = settings(
    max_examples=examples(50, 2000),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(ARGUMENTS)
def test_any_command_line_is_read_or_refused_in_one_line(arguments):
    try:
        configuration.preview(flags.parse(arguments))
    except UsageError as error:
        assert "Received: " in str(error)


@fuzz
@given(JSON.map(json.dumps) | st.text(max_size=40))
def test_any_tf_config_is_a_cluster_or_refused_in_one_line(text):
    try:
        discovery.discover({"TF_CONFIG": text})
    except UsageError as error:
        assert "Received: " in str(error) and len(str(error)) < 1000


@fuzz
@given(
    st.text(string.printable, max_size=60)
    | st.sampled_from(
        [
            "def get_config(): return 3",
            "def get_config(): return {'epochs': 'x'}",
            "def get_config(): return {1: 2}",
            "def get_config(): raise SystemExit(4)",
            "import no_such_module",
            "get_config = 5",
            *(
                f"def get_config(): return {{{name!r}: {value}}}"
                for name in configuration.defaults()
                for value in ("None", "''", "-1", "[]", "float('nan')", "'a:b'")
            ),
        ]
    )
)
def test_any_configuration_file_is_used_or_refused(tmp_path, text):
    file = tmp_path / "config.py"
    file.write_text(text, errors="replace")
    try:
        configuration.preview(flags.parse([f"--config={file}"]))
    except UsageError as error:
        assert "Received: " in str(error)
    except SystemExit as end:  # It means what it means to Python.
        assert end.code == 4


@fuzz
@given(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_file_of_a_run_reads_as_a_dict_or_as_nothing(tmp_path, data):
    file = tmp_path / "config.json"
    file.write_bytes(data)
    found = run_files.read_json(file)
    assert found is None or isinstance(found, dict)


def test_json_may_be_nested_too_deep(tmp_path):
    file = tmp_path / checkpoint.MANIFEST
    file.write_text(DEEP)
    assert run_files.read_json(file) is None
    with pytest.raises(checkpoint.DamagedCheckpointError, match="not valid JSON"):
        checkpoint.read_manifest(tmp_path)
    with pytest.raises(UsageError, match="TF_CONFIG"):
        discovery.discover({"TF_CONFIG": DEEP})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    made = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        checkpoint.write(made, step, {"model/0": np.full(9, step)}, {"epoch": step})
    return made


FILES = ("manifest.json", "tensors.index", "tensors.data-00000-of-00001")


def contents(folder):
    """Whatever is not unfinished, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.relative_to(folder).parts[0].startswith(".unfinished-")
    }


@fuzz
@given(
    st.sampled_from(FILES),
    st.sampled_from(["flip", "cut", "grow", "replace", "delete", "folder"]),
    st.integers(0, 10_000),
    st.binary(max_size=40),
)
def test_any_damage_to_the_newest_checkpoint_leads_to_the_one_before(
    folder, tmp_path, name, how, place, data
):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = copy / "step-2" / name
    before = file.read_bytes()
    if how == "flip":
        changed = bytearray(before)
        changed[place % len(before)] ^= 1 + place % 255
        file.write_bytes(changed)
    elif how == "cut":
        file.write_bytes(before[: place % len(before)])
    elif how == "grow":
        file.write_bytes(before + b"x" + data)
    elif how == "replace":
        file.write_bytes(data)
    else:
        file.unlink()
    if how == "folder":
        file.mkdir()
    left = contents(copy)
    found = resuming._latest(copy)
    assert found.manifest["step"] == 1 and (found.arrays["model/0"] == 1).all()
    assert contents(copy) == left


@fuzz
@given(JSON)
def test_any_manifest_that_someone_else_has_written_is_refused(folder, tmp_path, value):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    content = {"format": checkpoint.FORMAT, "files": value}
    content["sha256"] = checkpoint._sha256_of(json.loads(json.dumps(content)))
    (copy / "step-2" / checkpoint.MANIFEST).write_text(json.dumps(content))
    assert resuming._latest(copy).manifest["step"] == 1


CONTENT = st.dictionaries(
    st.sampled_from(
        [
            *("step-1", "step-2", "step-02", "step-x", "mine", "step-3.0.of-another"),
            *(".unfinished-step-3", ".unfinished-old-step-1", ".unfinished-old-"),
        ]
    ),
    st.dictionaries(
        st.sampled_from([*FILES, "mine.txt"]),
        st.binary(max_size=9)
        | st.sampled_from([b"{}", b"[1]", b'{"format": 1}', b'{"format": 2}']),
        max_size=3,
    )
    | st.binary(max_size=9)  # A file instead of a folder.
    | st.just("good"),
    max_size=4,
)


@fuzz
@given(CONTENT)
def test_any_folder_of_checkpoints_is_read_or_refused_and_stays_as_it_is(
    folder, tmp_path, found
):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name, content in found.items():
        if content == "good":
            shutil.copytree(folder / "step-1", copy / name)
        elif isinstance(content, bytes):
            (copy / name).write_bytes(content)
        else:
            (copy / name).mkdir()
            for file, data in content.items():
                (copy / name / file).write_bytes(data)
    before = contents(copy)
    try:
        saved = resuming.load(workers.of(tf.distribute.get_strategy()), copy)
        assert saved is None or saved.manifest["step"] == 1
    except ValueError as error:
        assert str(error)
    assert before.items() <= contents(copy).items()


@pytest.fixture
def trained(tmp_path):
    """The folder of a training: a model of two epochs and the checkpoint of its end."""
    manifest = {"epoch": 2, "step of the epoch": 0, "stops": [False]}
    arrays = {"model/0": np.ones(2)}
    checkpoint.write(tmp_path / saving.CHECKPOINTS, 7, arrays, manifest)
    (tmp_path / saving.MODEL_FILE).touch()
    run_files.write_json(tmp_path / saving.RECORD, {"epochs": 2, "step": 7})
    return tmp_path


@fuzz
@given(RECORDED, st.sampled_from([1, 2, 3]))
def test_a_training_goes_on_or_is_refused_whatever_is_recorded(trained, found, epochs):
    (trained / configuration.FILE).write_text(json.dumps(found))
    line = flags.parse([f"--workdir={trained}", f"--epochs={epochs}"])
    try:
        assert earlier.check(configuration.preview(line)) == (epochs == 2)
    except UsageError as error:
        assert "Received: " in str(error)


@fuzz
@given(RECORDED)
def test_a_training_is_evaluated_or_refused_whatever_is_recorded(trained, found):
    (trained / configuration.FILE).write_text(json.dumps(found))
    line = flags.parse(["evaluate", f"--workdir={trained}"])
    try:
        config = configuration.resolve(line, gan.get_config())
        assert config.workdir == str(trained)
        earlier.tell_changes("Evaluating", found, config)
    except UsageError as error:
        assert "Received: " in str(error)


@fuzz
@given(JSON | st.dictionaries(st.sampled_from(["epochs", "step"]), JSON, max_size=2))
def test_a_model_of_any_record_is_taken_up_or_refused(trained, value):
    (trained / configuration.FILE).write_text("{}")
    (trained / saving.RECORD).write_text(json.dumps(value))
    config = configuration.preview(flags.parse([f"--workdir={trained}", "--epochs=2"]))
    assert earlier.check(config) in (True, False)
    assert saving._is_latest(trained) in (True, False)
